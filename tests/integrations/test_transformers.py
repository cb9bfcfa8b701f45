"""transformers' plug-in: checkpoints of codes open by `from_pretrained` where surgery is imported, and nowhere else."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from artifacts import seeded
from resident_bodies import related
from safetensors import safe_open
from tiny_transformers import TINY, save_tiny, tiny

import surgery
from surgery.artifact.export import export
from surgery.artifact.formats.transformers import write_transformers
from surgery.errors import ArtifactError, ExportError, LoadError
from surgery.integrations.arrival import when_imported
from surgery.storage.codecs import encode, grouped
from surgery.storage.keys import PlainKey
from surgery.storage.stored import Stored, store
from surgery.storage.trim import drop_costly_banks

KINDS = ["bert_mlm", "gpt2", "t5", "clip", "wav2vec2", "whisper"]


def coded(joint: surgery.JointModel, bits: int = 4) -> Stored:
    """A joint model with its matrices as grouped integers."""
    stored = drop_costly_banks(store(joint))
    tensors = {
        key: encode(each.parts[""], grouped(bits, 16))
        if isinstance(key, PlainKey) and len(each.shape) > 1 and each.precision.is_native
        else each
        for key, each in stored.tensors.items()
    }
    return Stored(stored.plan, tensors, stored.aliases, stored.ties, stored.extra)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tiny BERTs with tied heads, in a joint model that shares hypermodules."""
    from transformers import BertConfig, BertForMaskedLM

    folder = tmp_path_factory.mktemp("joint")
    size = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    members = []
    for number, name in enumerate(("one", "two")):
        seeded(lambda: BertForMaskedLM(BertConfig(vocab_size=90, **size)), number).save_pretrained(
            folder / name
        )
        members.append(surgery.load_member(str(folder / name), name=name))
    joint = surgery.fit(surgery.join(members, block=(32, 32)), hypermodules=12)
    return surgery.save(joint, folder / "joint")


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(
        torch.equal(mine[n], theirs[n]) and mine[n].dtype == theirs[n].dtype for n in mine
    )


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_those_of_a_plain_export(kind, tmp_path):
    member = surgery.load_member(str(save_tiny(kind, tmp_path / "source")), name="net")
    joint = surgery.join([member])
    stored = coded(joint)
    plain = export(joint, "net", tmp_path / "plain")
    (tmp_path / "coded").mkdir()
    write_transformers(tmp_path / "coded", stored, joint.members["net"])
    kind = getattr(transformers, TINY[kind][0])
    loaded = kind.from_pretrained(tmp_path / "coded")
    wanted = kind.from_pretrained(plain)
    from surgery.storage.states import state_of

    state = state_of(stored, "net")
    own = {name: t for name, t in loaded.state_dict().items()}
    assert own.keys() == wanted.state_dict().keys()
    assert all(torch.equal(own[name], state[name].to(own[name])) for name in own if name in state)
    assert not any(torch.equal(t, wanted.state_dict()[n]) for n, t in own.items() if t.ndim > 1)
    loaded.save_pretrained(tmp_path / "again")
    assert "quantization_config" not in json.loads((tmp_path / "again" / "config.json").read_text())
    assert same(type(loaded).from_pretrained(tmp_path / "again"), loaded)


def test_shared_rows_are_generated(bert, tmp_path):
    from transformers import AutoModel, AutoModelForMaskedLM

    folder = export(bert, "two", tmp_path / "two", format="transformers")
    plain = AutoModelForMaskedLM.from_pretrained(export(bert, "two", tmp_path / "plain"))
    with safe_open(str(folder / "model.safetensors"), "pt") as file:
        assert any(name.startswith("surgery/dictionary/") for name in file.keys())  # noqa: SIM118
    loaded = AutoModelForMaskedLM.from_pretrained(folder)
    assert same(loaded, plain)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert same(AutoModel.from_pretrained(folder, add_pooling_layer=False), plain.bert)
    ids = torch.arange(12).view(2, 6)
    loaded(ids, labels=ids).loss.backward()  # an ordinary model: it trains
    assert all(p.grad is not None for p in loaded.bert.encoder.parameters())
    assert same(surgery.load_member(str(folder), name="again").module, plain)


@pytest.mark.parametrize("rank", [0, 2])
def test_relatives_are_generated(rank, tmp_path):
    """A shared matrix and products: to make a weight of them takes tensors that no file has."""
    kind, name = transformers.BertModel, "encoder.layer.0.output.dense.weight"
    for number in range(2):
        seeded(lambda: kind(tiny("bert").config), number).save_pretrained(tmp_path / f"m{number}")
    joint = related(
        lambda: [surgery.load_member(str(tmp_path / f"m{n}"), name=f"m{n}") for n in range(2)], name, rank
    )
    folder = export(joint, "m1", tmp_path / "coded", format="transformers")
    with safe_open(str(folder / "model.safetensors"), "pt") as file:
        assert any(("/contexts" if rank else "/shared") in each for each in file.keys())  # noqa: SIM118
    loaded = kind.from_pretrained(folder)
    assert same(loaded, kind.from_pretrained(export(joint, "m1", tmp_path / "plain")))
    assert torch.equal(loaded.state_dict()[name], joint.collapse("m1")[name])


@pytest.mark.parametrize(
    "how",
    [
        {"dtype": torch.bfloat16}, {"dtype": "auto"}, {"torch_dtype": torch.float16}, {"device_map": "cpu"},
        {"device_map": "auto"}, {"device_map": {"": "cpu"}, "dtype": torch.float64}, {"low_cpu_mem_usage": True},
        {"low_cpu_mem_usage": False, "dtype": torch.float16},
    ],
)  # fmt: skip
def test_ways_of_loading(how, bert, tmp_path):
    from transformers import AutoModelForMaskedLM

    folder, plain = (export(bert, "one", tmp_path / f, format=f) for f in ("transformers", "plain"))
    loaded, wanted = (AutoModelForMaskedLM.from_pretrained(f, **how) for f in (folder, plain))
    assert same(loaded, wanted)
    assert not getattr(loaded.config, "_is_quantized", False)


def test_another_head_and_what_is_refused(bert, tmp_path):
    from transformers import AutoConfig, AutoModelForMaskedLM, AutoModelForSequenceClassification

    folder = export(bert, "one", tmp_path / "one", format="transformers")
    other = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=7)
    assert other.classifier.weight.shape == (7, 64)
    with pytest.raises(LoadError, match='device_map="cuda:0"'):
        AutoModelForMaskedLM.from_pretrained(
            folder, device_map={"bert": "disk", "cls": "cpu"}, offload_folder=str(tmp_path / "off")
        )
    with pytest.raises((RuntimeError, LoadError), match=r"size|shape"):
        AutoModelForMaskedLM.from_pretrained(folder, vocab_size=91)
    config = AutoConfig.from_pretrained(folder)
    with pytest.raises(LoadError, match="`state_dict`"):
        transformers.BertForMaskedLM.from_pretrained(None, config=config, state_dict={})


def open_plain(joint: Path, tmp_path: Path) -> torch.nn.Module:
    return transformers.BertForMaskedLM.from_pretrained(export(joint, "one", tmp_path / "plain"))


def changed(folder: Path, **entries) -> Path:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"].update(entries)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"version": 2}, "version 1, but are of version 2"),
        ({"version": None}, "install the model-surgery"),
        ({"member": {"encoded": [["int99/64", "float32", [64, 64], ["x"]]]}}, "int99/64"),
        ({"member": 3}, "as a mapping"),
        ({"member": {"placements": [["x", 9, 0]]}}, "has view 9"),
        ({"banks": {}}, "does not exist"),
        ({"views": [{"bank": 1}]}, "describe its codes"),
    ],
)
def test_documents_of_others(entries, said, bert, tmp_path):
    from transformers import AutoModelForMaskedLM

    folder = changed(export(bert, "one", tmp_path / "one", format="transformers"), **entries)
    with pytest.raises(ArtifactError, match=said):
        AutoModelForMaskedLM.from_pretrained(folder)


def test_codes_that_are_missing(bert, tmp_path):
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForMaskedLM

    folder = export(bert, "one", tmp_path / "one", format="transformers")
    tensors = load_file(folder / "model.safetensors")
    lost = next(name for name in tensors if name.startswith("surgery/"))
    save_file({n: t for n, t in tensors.items() if n != lost}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ArtifactError, match=r"must|cannot be made"):
        AutoModelForMaskedLM.from_pretrained(folder)


def lose_a_marker(tensors: dict) -> None:
    del tensors[next(name for name, each in tensors.items() if not each.numel())]


def lose_what_is_plain(tensors: dict) -> None:
    del tensors[plain_name(tensors)]


def plain_name(tensors: dict) -> str:
    return next(name for name in sorted(tensors) if not name.startswith("surgery/") and tensors[name].numel())


def exchange(tensors: dict) -> None:
    shapes: dict[tuple, str] = {}
    for name in sorted(each for each in tensors if each.startswith("surgery/weights/")):
        tail = name.rpartition(":")[2], tensors[name].shape
        if tail in shapes and not torch.equal(tensors[name], tensors[shapes[tail]]):
            other = shapes[tail]
            tensors[name], tensors[other] = tensors[other], tensors[name]
            return
        shapes[tail] = name
    raise AssertionError("no two codes of one shape")


def flip(tensors: dict) -> None:
    name = max(tensors, key=lambda each: tensors[each].nbytes)
    tensors[name].reshape(-1).view(torch.uint8)[5] ^= 1


def change_what_is_plain(tensors: dict) -> None:
    tensors[plain_name(tensors)].add_(1)


def add(tensors: dict) -> None:
    tensors["more"] = torch.zeros(2)


@pytest.fixture(scope="module")
def as_codes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with codes of equal shapes, and with tensors as they are."""
    place = tmp_path_factory.mktemp("codes")
    joint = surgery.join([surgery.load_member(str(save_tiny("bert", place / "source")), name="net")])
    folder = place / "coded"
    folder.mkdir()
    write_transformers(folder, coded(joint), joint.members["net"])
    return folder


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lose_a_marker, "other tensors than were written; there is no "),
        (lose_what_is_plain, "other tensors than were written"),
        (add, "other tensors than were written"),
        (exchange, r"surgery/weights/\S+ holds other values .*; surgery/weights/\S+ holds other values"),
        (flip, "holds other values than were written"),
        (change_what_is_plain, "holds other values than were written"),
    ],
)
def test_files_that_are_not_what_was_written_raise(harm, said, as_codes, tmp_path):
    """Where transformers would warn and draw weights, or see nothing."""
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(as_codes, tmp_path / "coded"))
    tensors = load_file(folder / "model.safetensors")
    harm(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(LoadError, match=said):
        transformers.BertModel.from_pretrained(folder)


@pytest.mark.parametrize("sums", [None, {}, 3, {"names": "x"}, {"names": 1, "values": 2}])
def test_sums_of_others(sums, as_codes, tmp_path):
    folder = changed(Path(shutil.copytree(as_codes, tmp_path / "coded")), sums=sums)
    with pytest.raises(LoadError, match="no sums that can be read"):
        transformers.BertModel.from_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]["sums"]  # as before there were any
    (folder / "config.json").write_text(json.dumps(config))
    wanted = transformers.BertModel.from_pretrained(as_codes)
    assert same(transformers.BertModel.from_pretrained(folder), wanted)


def test_only_models_of_transformers(tmp_path):
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
    joint = surgery.join([surgery.load_member(net, name="net", inputs=torch.randn(2, 4))])
    with pytest.raises(ExportError, match=r"of kind module .*as plain or compressed"):
        export(joint, "net", tmp_path / "net", format="transformers")
    assert not (tmp_path / "net").exists()


def test_registering_twice_changes_nothing():
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    import surgery.integrations.transformers as plug_in

    before = AUTO_QUANTIZER_MAPPING["surgery"]
    plug_in.register()
    importlib.reload(plug_in)
    assert AUTO_QUANTIZER_MAPPING["surgery"] is before


def test_importing_surgery_imports_no_library():
    code = (
        "import importlib, sys, surgery\n"
        "assert not {'torch', 'transformers', 'numpy'} & {*sys.modules}\n"
        "before = len(sys.meta_path)\n"
        "importlib.reload(surgery)\n"
        "assert len(sys.meta_path) == before"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("first", [True, False])
def test_whichever_is_imported_first(first, tmp_path, monkeypatch, recwarn):
    (tmp_path / "library_x.py").write_text("known = []\n")
    (tmp_path / "plug_in_x.py").write_text("import library_x\nlibrary_x.known.append('here')\n")
    (tmp_path / "broken_x.py").write_text("from library_x import nothing\n")
    monkeypatch.syspath_prepend(tmp_path)
    finders = [*sys.meta_path]
    for name in ("plug_in_x", "broken_x"):
        for gone in ("library_x", "plug_in_x"):
            sys.modules.pop(gone, None)
        if first:
            importlib.import_module("library_x")
        when_imported("library_x", name)
        when_imported("library_x", name)
        library = importlib.import_module("library_x")
        assert library.known == (["here"] if name == "plug_in_x" else [])
        assert sys.meta_path == finders
    assert "broken_x could not be registered" in str(recwarn[0].message)
    assert type(library.__loader__).__name__ == "SourceFileLoader"


@pytest.mark.slow  # every library anew in a process of its own
def test_without_surgery_no_weights_rather_than_random_ones(bert, tmp_path):
    folder = export(bert, "one", tmp_path / "one", format="transformers")
    older = shutil.copytree(folder, tmp_path / "older")
    config = json.loads((older / "config.json").read_text())
    del config["transformers_weights"]  # whoever takes it away meets markers
    (older / "config.json").write_text(json.dumps(config))
    code = (
        "from transformers import AutoModelForMaskedLM\n"
        "for folder, how in (('one', {}), ('one', {'ignore_mismatched_sizes': True}), ('older', {})):\n"
        "    try: AutoModelForMaskedLM.from_pretrained(folder, **how)\n"
        "    except (OSError, RuntimeError) as error: print(type(error).__name__, error)"
    )
    said = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=tmp_path
    ).stdout.splitlines()
    assert "import-surgery-before-from_pretrained.safetensors" in said[0] and said[0] == said[1]
    assert said[2].startswith("RuntimeError") and "ignore_mismatched_sizes" in said[2]
    config = transformers.AutoConfig.from_pretrained(folder)
    assert same(
        transformers.BertForMaskedLM.from_pretrained(folder, config=config), open_plain(bert, tmp_path)
    )
    assert config.transformers_weights  # what was given stays what it was


def test_a_configuration_by_hand(bert, tmp_path):
    from surgery.integrations.transformers import SurgeryConfig

    coded, plain = (export(bert, "one", tmp_path / way, format=way) for way in ("transformers", "plain"))
    kind = transformers.BertForMaskedLM
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        assert same(
            kind.from_pretrained(coded, quantization_config=SurgeryConfig()), kind.from_pretrained(coded)
        )
    with pytest.raises(LoadError, match="holds ordinary weights: leave it out"):
        kind.from_pretrained(plain, quantization_config=SurgeryConfig())
    with pytest.raises(ValueError, match="quantized with SurgeryConfig but you are passing"):
        kind.from_pretrained(coded, quantization_config=transformers.GPTQConfig(bits=4))
