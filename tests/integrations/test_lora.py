"""Members of families as adapters of peft on a base, within a measured error."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import huggingface_hub
import numpy as np
import peft
import pytest
import torch
import transformers
from command_line import surgery as command
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from tiny_transformers import TINY, save_tiny, tiny
from transformers.pytorch_utils import Conv1D

import surgery
from surgery.artifact.adaptercard import Base, with_base
from surgery.artifact.export import export
from surgery.errors import ArtifactError, ExportError, LoadError, OutputError, PlanError, SurgeryWarning

MODEL = "adapter_model.safetensors"
KINDS = {"bert": 3, "gpt2_classifier": 2, "llama": 2, "vit": 3}


def tuned(kind: str, rank: int, noise: float = 0.0) -> torch.nn.Module:
    """A model whose linear layers differ from the base by products of some rank, and whose norms and biases do."""
    net = copy.deepcopy(tiny(kind))
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, (torch.nn.Linear, Conv1D)):
                out, into = module.weight.shape
                module.weight += 0.05 * draw(out, rank) @ draw(rank, into) / rank + noise * draw(out, into)
                if module.bias is not None:
                    module.bias += 0.01 * draw(module.bias.numel())
            elif isinstance(module, torch.nn.LayerNorm):
                module.weight += 0.05 * draw(*module.weight.shape)
    return net


@pytest.mark.parametrize("kind", KINDS)
def test_opened_by_peft(kind, tmp_path: Path):
    base = save_tiny(kind, tmp_path / "base")
    tuned(kind, KINDS[kind]).save_pretrained(tmp_path / "tuned")
    joint = surgery.join([surgery.load_member(str(tmp_path / "tuned"), name="net")])
    said: list[str] = []
    folder = export(
        joint, "net", tmp_path / "adapter", format="lora", base=str(base), max_error=1e-4, say=said.append
    )
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base) and config["r"] <= KINDS[kind]
    assert "output moved by <0.01% of the member's" in said[1]
    card = ModelCard.load(folder / "README.md")
    assert "[More Information Needed]" not in card.content and str(tmp_path) not in card.content
    assert "output" in card.text and "(relative L2; at most 0.01%" in card.text and TINY[kind][0] in card.text
    assert card.data.library_name == "peft" and card.data.base_model is None  # a folder is nothing on the hub
    opened = peft.PeftModel.from_pretrained(
        getattr(transformers, TINY[kind][0]).from_pretrained(base), folder
    ).eval()
    inputs = joint.members["net"].inputs
    with torch.no_grad():
        theirs = opened(*inputs.args, **inputs.kwargs)[0]
        ours = joint["net"](*inputs.args, **inputs.kwargs)[0]
    assert float((theirs - ours).norm() / ours.norm()) < 1e-4
    again = surgery.load_member(str(folder), name="again")  # merged, as surgery reads adapters
    wanted = joint.collapse("net")
    assert all(torch.allclose(t, wanted[n], atol=1e-5) for n, t in again.module.state_dict().items())


def test_a_relative_base_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_tiny("bert", tmp_path / "sub" / "base")
    tuned("bert", 2).save_pretrained(tmp_path / "tuned")
    joint = surgery.join([surgery.load_member("tuned", name="net")])
    folder = export(joint, "net", "adapter", format="lora", base="sub/base", max_error=0.1)
    plan = surgery.plan_export(joint, "net", format="lora", base="sub/base", max_error=0.1)
    assert plan.nbytes == sum(t.nbytes for t in load_file(folder / "adapter_model.safetensors").values())
    assert plan.files.keys() == {"README.md", "adapter_config.json"} and "output moved by" in plan.notes[-1]
    named = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(tmp_path / "sub" / "base")  # not what the hub could have under that name


def test_ranks_follow_the_bound(tmp_path):
    base = save_tiny("bert", tmp_path / "base")
    tuned("bert", 2, noise=0.002).save_pretrained(tmp_path / "tuned")
    joint = surgery.join([surgery.load_member(str(tmp_path / "tuned"), name="net")])
    sizes = []
    for bound in (0.2, 1e-6):
        folder = export(joint, "net", tmp_path / f"a{bound}", format="lora", base=str(base), max_error=bound)
        sizes.append(sum(t.numel() for t in load_file(folder / "adapter_model.safetensors").values()))
    assert sizes[0] < sizes[1]
    whole = sum(t.numel() for t in joint.collapse("net").values())
    assert sizes[1] <= whole


def test_products_alone_where_the_rest_hardly_counts(tmp_path):
    """The form that servers run: neither biases nor whole modules."""
    base, before = save_tiny("bert", tmp_path / "base"), tiny("bert")
    net = tuned("bert", 2)
    with torch.no_grad():
        for name, tensor in net.named_parameters():
            if tensor.ndim == 1 or "embeddings" in name:
                tensor.copy_(before.get_parameter(name) * (1 + 1e-5))
    net.save_pretrained(tmp_path / "tuned")
    joint = surgery.join([surgery.load_member(str(tmp_path / "tuned"), name="net")])
    said: list[str] = []
    folder = export(joint, "net", tmp_path / "a", format="lora", base=str(base), say=said.append)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert not config["modules_to_save"] and not config["trainable_token_indices"]
    assert config["bias"] == "none" and not config["lora_bias"]
    assert all(name.endswith(("lora_A.weight", "lora_B.weight")) for name in load_file(folder / MODEL))
    assert "linear layers and nothing else, which servers run" in said[0]
    assert said[1].startswith("as the base has them: embeddings.word_embeddings, ")


def noise(like: torch.Tensor) -> torch.Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(0))


def with_other_rows(kind: str, folder: Path) -> surgery.JointModel:
    net = copy.deepcopy(tiny(kind))
    table = net.get_input_embeddings().weight
    with torch.no_grad():
        table *= 1 + 1e-6
        table[[3, 5]] += noise(table[[3, 5]])
    net.save_pretrained(folder)
    return surgery.join([surgery.load_member(str(folder), name="net")])


def test_of_tables_the_rows_that_differ(tmp_path):
    base, joint = save_tiny("bert", tmp_path / "base"), with_other_rows("bert", tmp_path / "tuned")
    np.savez(tmp_path / "real.npz", input_ids=np.array([[1, 3, 5, 2]]))
    how, said = {"format": "lora", "base": str(base), "max_error": 1e-3}, []
    how["calibrate"] = [str(tmp_path / "real.npz")]
    folder = export(joint, "net", tmp_path / "a", **how, say=said.append)
    saved = [tuple(t.shape) for name, t in load_file(folder / MODEL).items() if "token_adapter" in name]
    assert saved == [(2, 32)] and "2 rows of embeddings.word_embeddings" in said[0]
    opened = peft.PeftModel.from_pretrained(transformers.BertModel.from_pretrained(base), folder)
    ids = torch.tensor([[1, 3, 5, 2]])
    with torch.no_grad():
        theirs, ours = opened.eval()(ids)[0], joint["net"](ids)[0]
    assert float((theirs - ours).norm() / ours.norm()) < 1e-3
    assert "rows of a table" in {each.becomes for each in surgery.plan_export(joint, "net", **how).tensors}


def test_a_table_that_a_head_shares_is_refused(tmp_path):
    base, joint = save_tiny("bert_mlm", tmp_path / "base"), with_other_rows("bert_mlm", tmp_path / "tuned")
    with pytest.raises(ExportError, match=r"tied tensors .* are exported as plain"):
        export(joint, "net", tmp_path / "a", format="lora", base=str(base))


def test_errors_are_measured_on_what_is_given(tmp_path):
    """A row that made-up texts hardly use, and the given ones always."""
    base = save_tiny("bert", tmp_path / "base")
    net = copy.deepcopy(tiny("bert"))
    with torch.no_grad():
        row = net.get_input_embeddings().weight[7]
        row += noise(row)
        net.encoder.layer[0].output.dense.weight += 1e-6
    net.save_pretrained(tmp_path / "tuned")
    joint = surgery.join([surgery.load_member(str(tmp_path / "tuned"), name="net")])
    np.savez(tmp_path / "real.npz", input_ids=np.full((4, 6), 7))
    how, said = {"format": "lora", "base": str(base), "max_error": 0.3}, []
    export(joint, "net", tmp_path / "a", **how, say=said.append)
    assert "nothing else" in said[0] and "on made-up inputs" in said[-1]
    said.clear()
    real = [str(tmp_path / "real.npz")]
    folder = export(joint, "net", tmp_path / "b", **how, say=said.append, calibrate=real)
    assert "1 row of embeddings.word_embeddings" in said[0] and "on real inputs" in said[-1]
    assert "outputs on real inputs differ" in (folder / "README.md").read_text()
    with pytest.raises(LoadError, match="does not exist"):
        export(joint, "net", tmp_path / "c", **how, calibrate=["nowhere.txt"])
    with pytest.raises(PlanError, match=r"must be a list of files, found 'x.npz'; give \['x.npz'\]"):
        export(joint, "net", tmp_path / "c", **how, calibrate="x.npz")
    with pytest.raises(PlanError, match="`calibrate` are for the format lora, found plain"):
        export(joint, "net", tmp_path / "c", calibrate=["x.npz"])
    assert not (tmp_path / "c").exists()


@pytest.mark.slow  # a fit of a family
def test_relatives_of_an_artifact(tmp_path):
    """Members that are stored as a common matrix and products differ by a product of at most both ranks."""
    save_tiny("bert", tmp_path / "one")
    tuned("bert", 2).save_pretrained(tmp_path / "two")
    joint = surgery.fit(
        surgery.join([surgery.load_member(str(tmp_path / n), name=n) for n in ("one", "two")]), max_error=0.05
    )
    out = surgery.save(joint, tmp_path / "joint")
    base = export(out, "one", tmp_path / "plain")
    folder = export(out, "two", tmp_path / "adapter", format="lora", base=str(base), max_error=0.02)
    assert (folder / "adapter_model.safetensors").stat().st_size < (base / "model.safetensors").stat().st_size
    with pytest.raises(OutputError, match="`out` must be apart from what is read"):
        export(out, "two", base, format="lora", base=f"{base}?class=BertModel", overwrite=True)
    assert (base / "model.safetensors").exists()  # which nothing replaced, although surgery wrote it
    code, _, said = command("export", out, "--member", "two", "--format", "lora", "--base", base, "--out", base,
                            "--overwrite", "--dry-run")  # fmt: skip
    assert code == 2 and "--out must be apart from what is read" in said
    with pytest.raises(PlanError, match="is an adapter of peft itself; give the model that it belongs to"):
        export(out, "one", tmp_path / "again", format="lora", base=str(folder))


def test_what_is_refused(tmp_path):
    base = save_tiny("bert", tmp_path / "base")
    joint = surgery.join([surgery.load_member(str(base), name="net")])
    out = tmp_path / "out"
    with pytest.raises(PlanError, match="give that as `base`"):
        export(joint, "net", out, format="lora")
    with pytest.raises(PlanError, match="are for the format lora, found plain; leave them out"):
        export(joint, "net", out, format="plain", max_error=0.1)
    with pytest.raises(PlanError, match="`max_error` must be above 0, found -1"):
        export(joint, "net", out, format="lora", base=str(base), max_error=-1)
    with pytest.raises(ExportError, match="nothing for an adapter to say"):
        export(joint, "net", out, format="lora", base=str(base))
    with pytest.raises(ExportError, match=r"BertModel\) and .*vit .*differ"):
        export(joint, "net", out, format="lora", base=str(save_tiny("vit", tmp_path / "vit")))
    with pytest.raises(ExportError, match="`base` must be a model that can be loaded"):
        export(joint, "net", out, format="lora", base=str(tmp_path / "nothing"))
    with pytest.raises(OutputError):
        export(joint, "net", base, format="lora", base=str(base))
    assert not out.exists()


class OfOther(torch.nn.Linear):
    """A linear layer that is not torch's own."""


def moved(net: torch.nn.Module) -> torch.nn.Module:
    net = copy.deepcopy(net)
    with torch.no_grad():
        for tensor in net.parameters():
            tensor += 0.1
    return net


def adapted(net: torch.nn.Module, tmp_path: Path, *shape: int, **options) -> Path:
    """An adapter of a module that was moved, on a factory of what it was."""
    torch.save(net, tmp_path / "net.pt")
    (tmp_path / "nets.py").write_text(
        f"import torch\n\n\ndef net():\n    made = torch.load({str(tmp_path / 'net.pt')!r}, weights_only=False)\n"
        f"    return made, (torch.ones({shape}),)\n"
    )
    member = surgery.load_member(moved(net), name="net", inputs=(torch.ones(shape),))
    options = {"format": "lora", "base": f"{tmp_path / 'nets.py'}:net", "max_error": 0.9, **options}
    return export(surgery.join([member]), "net", tmp_path / "out", trust_remote_code=True, **options)


@pytest.mark.parametrize(
    ("layers", "shape", "said"),
    [
        (
            [torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)],
            (1, 3, 6, 6),
            "has none; it has Conv2d, BatchNorm2d;",
        ),
        ([OfOther(4, 4), torch.nn.LayerNorm(4)], (2, 4), "has none; it has OfOther, LayerNorm;"),
        (None, (2, 4), "member 'net' is a single layer; export it as plain"),
    ],
)
def test_layers_at_which_peft_has_no_products(layers, shape, said, tmp_path):
    net = torch.nn.Linear(4, 4) if layers is None else torch.nn.Sequential(*layers)
    with pytest.raises(ExportError, match=said):
        adapted(net, tmp_path, *shape)


@pytest.mark.parametrize("bound", [1e-9, 1e-12])
def test_a_bound_below_rounding_says_what_can_be_had(bound, tmp_path):
    base = save_tiny("bert", tmp_path / "base")
    tuned("bert", 2).save_pretrained(tmp_path / "tuned")
    joint = surgery.join([surgery.load_member(str(tmp_path / "tuned"), name="net")])
    options = {"format": "lora", "base": str(base)}
    with pytest.raises(ExportError, match=r"which is rounding; .*ask for no less") as found:
        export(joint, "net", tmp_path / "a", max_error=bound, **options)
    said = str(found.value)
    assert f"at most {bound:.1e}" in said and "<0.01%" not in said
    enough = float(re.search(r"`max_error` of ([\d.e-]+)\)", said)[1])
    assert bound < enough < 1e-5
    assert export(joint, "net", tmp_path / "a", max_error=2 * enough, **options).is_dir()


def test_members_that_were_live_modules(tmp_path):
    """Advice that works: load it with the architecture, and export what comes of it."""
    net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
    adapted(net, tmp_path, 2, 4)
    member = surgery.load_member(moved(net), name="net", inputs=(torch.ones(2, 4),))
    folder = surgery.save(surgery.join([member]), tmp_path / "joint")
    options = {"format": "lora", "base": f"{tmp_path / 'nets.py'}:net", "max_error": 0.9}
    options |= {"trust_remote_code": True, "overwrite": True}
    with pytest.raises(
        ArtifactError, match=r"surgery.load\(FOLDER, modules=\{'net': module\}\)` .* can be exported"
    ):
        export(folder, "net", tmp_path / "out", **options)
    export(surgery.load(folder, modules={"net": copy.deepcopy(net)}), "net", tmp_path / "out", **options)


def test_a_base_has_a_name_on_the_hub(tmp_path, monkeypatch):
    base = save_tiny("bert", tmp_path / "local-base")
    tuned("bert", 2).save_pretrained(tmp_path / "tuned")
    joint = surgery.join([surgery.load_member(str(tmp_path / "tuned"), name="net")])
    folder = export(joint, "net", tmp_path / "a", format="lora", base=str(base), max_error=0.1)
    for dry_run in (True, False):
        with pytest.raises(
            PlanError, match=r"needs a base there, but adapter_config.json names .*local-base"
        ):
            surgery.push_to_hub(folder, "me/a", dry_run=dry_run)
    code, _, wrong = command("push", str(folder), "me/a", "--dry-run")
    assert code == 2 and "as --base, such as org/name" in wrong
    assert "as an adapter of me/base" in repr(
        surgery.push_to_hub(folder, "me/a", base="me/base", dry_run=True)
    )
    gone: dict[str, bytes] = {}

    class Hub:
        def __init__(self, token=None): ...

        def create_repo(self, repo, **options): ...

        def upload_folder(self, folder_path, allow_patterns, **options):
            gone.update({name: (folder_path / name).read_bytes() for name in allow_patterns})
            return type("Commit", (), {"commit_url": "https://hub/commit"})

    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    sizes = surgery.push_to_hub(folder, "me/a", base="me/base").files
    assert sizes == {name: len(content) for name, content in gone.items()}
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert "`local-base`, a local folder, with this" in before["README.md"].decode()
    assert gone[MODEL] == before[MODEL] and not any(b"local-base" in each for each in gone.values())
    assert json.loads(gone["adapter_config.json"])["base_model_name_or_path"] == "me/base"
    card = ModelCard(gone["README.md"].decode())
    assert card.text.lstrip().startswith(
        "# Adapter of base\n\n[me/base](https://huggingface.co/me/base) with this"
    )
    assert card.data.base_model == "me/base" and "BertModel.from_pretrained('me/base')" in card.text
    with pytest.raises(PlanError, match="`base` is for adapters"):
        surgery.push_to_hub(export(joint, "net", tmp_path / "plain"), "me/a", base="me/base")


@pytest.mark.parametrize(
    ("reference", "name", "kind", "revision"),
    [
        ("org/name", "org/name", "hub", ""),
        ("org/name@v1?class=BertModel", "org/name", "hub", "v1"),
        ("name", "name", "hub", ""),
        ("/gone/base", "base", "folder", ""),
        ("/gone/nets.py:net", "nets.py:net", "function", ""),
        ("nets.py:net", "nets.py:net", "function", ""),
        ("package.nets:net", "package.nets:net", "function", ""),
        ("timm:resnet18?num_classes=5=/gone/w.pth", "timm:resnet18?num_classes=5", "timm", ""),
    ],
)
def test_what_a_card_calls_a_base(reference, name, kind, revision):
    assert Base.of(reference) == Base(name, kind, revision)


def test_a_base_that_a_function_makes(tmp_path, monkeypatch):
    net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
    said: list[str] = []
    monkeypatch.chdir(tmp_path)
    folder = adapted(net, tmp_path, 2, 4, base="nets.py:net", say=said.append)
    text = (folder / "README.md").read_text()
    assert "# Adapter of nets.py:net\n\nThe model of the function `nets.py:net` with this adapter" in text
    assert "base = ...  # the Sequential" in text and 'PeftModel.from_pretrained(base, ".")' in text
    assert "local folder" not in text and str(tmp_path) not in text and "servers" not in text + said[0]
    named = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == f"{tmp_path / 'nets.py'}:net"
    with pytest.raises(PlanError, match=r"uploaded first, as a plain export \(`surgery push`\)"):
        surgery.push_to_hub(folder, "me/a", dry_run=True)
    card = with_base(text, "Sequential", Base.of(named), Base("me/net", "hub"))
    assert (
        "# Adapter of net\n\n[me/net](https://huggingface.co/me/net) with" in card and "nets.py" not in card
    )


def test_a_tied_head_is_not_saved_with_its_products(tmp_path):
    kind = transformers.LlamaForCausalLM
    config = transformers.LlamaConfig(
        vocab_size=99, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    net = kind(config)
    net.save_pretrained(tmp_path / "base")
    moved(net).save_pretrained(tmp_path / "tuned")
    joint = surgery.join([surgery.load_member(str(tmp_path / "tuned"), name="net")])
    options = {"format": "lora", "base": str(tmp_path / "base"), "max_error": 0.05}
    folder = export(joint, "net", tmp_path / "a", **options)
    assert not [name for name in load_file(folder / MODEL) if "base_layer" in name]
    opened = peft.PeftModel.from_pretrained(kind.from_pretrained(tmp_path / "base"), folder).eval()
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        theirs, ours = opened(ids)[0], joint["net"](ids)[0]
    assert float((theirs - ours).norm() / ours.norm()) < 0.05


def test_outputs_that_hardly_differ_between_inputs_are_warned_of(tmp_path):
    base = save_tiny("gpt2_classifier", tmp_path / "base")
    net = tuned("gpt2_classifier", 2, noise=0.02)
    net.save_pretrained(tmp_path / "tuned")
    joint = surgery.join([surgery.load_member(str(tmp_path / "tuned"), name="net")])
    how = {"format": "lora", "base": str(base), "max_error": 0.2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("surgery.artifact.formats.lora.between_inputs", lambda *_: 0.01)
        with pytest.warns(SurgeryWarning, match=r"Outputs of net \(by 1\.00% of their size"):
            export(joint, "net", tmp_path / "a", **how)
