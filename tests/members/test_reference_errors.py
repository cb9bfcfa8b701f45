"""Everything about a reference that can be wrong is one sentence that says what to do."""

import json
import os
import struct
from pathlib import Path

import numpy
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from tiny_transformers import save_tiny, tiny

from surgery.errors import ConsentError, LoadError
from surgery.inputs.reading import read_arrays
from surgery.members.member import content_hash
from surgery.members.references import build_architecture, load_member
from surgery.permission import Permission


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    return {kind: save_tiny(kind, tmp_path_factory.mktemp(kind)) for kind in ("bert", "bert_mlm")}


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("timm") / "lite0.safetensors"
    save_file(timm.create_model("tf_efficientnet_lite0").state_dict(), path)
    return path


@pytest.fixture
def offline(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


# --- transformers folders that do not fit


def copy(folder: Path, target: Path, **changes) -> Path:
    """A copy of a folder with its config changed; None removes a key."""
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    config = {**json.loads((target / "config.json").read_text()), **changes}
    config = {key: value for key, value in config.items() if value is not None}
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_no_architectures_means_the_base_model(folders, tmp_path):
    folder = copy(folders["bert"], tmp_path / "a", architectures=None)
    assert load_member(str(folder)).origin.architecture == "BertModel"


def test_class_can_be_chosen_and_spare_tensors_dropped(folders, tmp_path):
    with pytest.raises(LoadError, match=r"missing \(bert\.pooler.*unexpected \(cls.*\?class=NAME"):
        load_member(f"{folders['bert_mlm']}?class=BertForNextSentencePrediction")
    member = load_member(f"{folders['bert_mlm']}?class=BertModel&unused=drop")
    assert member.origin.options["add_pooling_layer"] is False
    assert any(name.startswith("cls.") for name in member.origin.options["dropped"])
    again = build_architecture(member.origin, member.files)
    assert list(again.state_dict()) == list(member.module.state_dict())
    with pytest.raises(LoadError, match="NoSuchModel"):
        load_member(f"{folders['bert']}?class=NoSuchModel")
    with pytest.raises(LoadError, match="size"):
        load_member(f"{folders['bert']}?size=3")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_size": 16}, "of another shape"),
        ({"num_hidden_layers": 2}, r"16 missing \(.*and 8 more"),
        ({"model_type": "no-such-type", "architectures": None}, "no-such-type"),
        ({"model_type": None}, "must name a 'model_type'"),
        ({"architectures": ["T5Model"]}, "T5Model"),
    ],
)
def test_config_that_does_not_fit(folders, tmp_path, change, words):
    with pytest.raises(LoadError, match=words) as caught:
        load_member(str(copy(folders["bert"], tmp_path / "a", **change)))
    assert "\n" not in str(caught.value)


def test_damaged_weights(folders, tmp_path):
    folder = copy(folders["bert"], tmp_path / "a")
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for content in (whole[:-100], whole[:5], struct.pack("<Q", 1 << 40) + whole[8:], b""):
        path.write_bytes(content)
        with pytest.raises(LoadError, match="complete safetensors file"):
            load_member(str(folder))
    path.unlink()
    with pytest.raises(LoadError, match="no weights"):
        load_member(str(folder))
    (folder / "config.json").write_text("{")
    with pytest.raises(LoadError, match="is no JSON"):
        load_member(str(folder))
    (folder / "config.json").rename(folder / "readme.json")
    with pytest.raises(LoadError, match=r"no config\.json"):
        load_member(str(folder))
    (tmp_path / "empty").mkdir()
    (tmp_path / "artifact").mkdir()
    (tmp_path / "artifact" / "manifest.json").write_text("{}")
    with pytest.raises(LoadError, match=r"is an artifact.*plain export.*merge and train take"):
        load_member(str(tmp_path / "artifact"))
    with pytest.raises(LoadError, match="is empty"):
        load_member(str(tmp_path / "empty"))


def test_shards_and_pickles(folders, tmp_path):
    net = tiny("bert")
    net.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert content_hash(load_member(str(tmp_path / "shards")).module.state_dict()) == content_hash(
        net.state_dict()
    )
    next((tmp_path / "shards").glob("model-00002*")).unlink()
    with pytest.raises(LoadError, match="00002"):
        load_member(str(tmp_path / "shards"))
    folder = copy(folders["bert"], tmp_path / "pickle")
    (folder / "model.safetensors").unlink()
    torch.save(net.state_dict(), folder / "pytorch_model.bin")
    assert content_hash(load_member(str(folder)).module.state_dict()) == content_hash(net.state_dict())
    torch.save({**net.state_dict(), "evil": os.system}, folder / "pytorch_model.bin")
    with pytest.raises(LoadError, match="must hold tensors alone"):
        load_member(str(folder))


def test_non_finite_weights(folders, tmp_path):
    folder = copy(folders["bert"], tmp_path / "a")
    state = load_file(folder / "model.safetensors")
    state["pooler.dense.bias"][:3] = float("nan")
    state["encoder.layer.0.output.dense.weight"][0, 0] = float("inf")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        LoadError, match=r"output\.dense\.weight \(1 of 2,048\), pooler\.dense\.bias \(3 of 32\)"
    ):
        load_member(str(folder))
    assert load_member(str(folder), allow_nonfinite=True).origin.architecture == "BertModel"


def test_remote_code_runs_only_on_purpose(folders, tmp_path):
    folder = copy(
        folders["bert"], tmp_path / "a", model_type="house-made", architectures=["HouseModel"],
        auto_map={"AutoConfig": "house.HouseConfig", "AutoModel": "house.HouseModel"},
    )  # fmt: skip
    (folder / "house.py").write_text(
        "from pathlib import Path\nfrom transformers import BertConfig, BertModel\n"
        f"Path({str(tmp_path / 'ran')!r}).touch()\n"
        "class HouseConfig(BertConfig):\n    model_type = 'house-made'\n"
        "class HouseModel(BertModel):\n    config_class = HouseConfig\n"
    )
    with pytest.raises(ConsentError, match="trust_remote_code"):
        load_member(str(folder))
    assert not (tmp_path / "ran").exists()
    member = load_member(str(folder), trust_remote_code=True)
    assert (tmp_path / "ran").exists()
    assert not any(name.endswith(".py") for name in member.files)
    again = build_architecture(member.origin, member.files, permission=Permission.ALL)
    assert list(again.state_dict()) == list(member.module.state_dict())
    with pytest.raises(ConsentError, match="trust_remote_code"):
        build_architecture(member.origin, member.files)


def test_hub_that_cannot_be_reached(offline):
    for reference in ("org/name@main", "timm:tf_efficientnet_lite0", "timm/resnet18.a1_in1k"):
        with pytest.raises(LoadError, match="network"):
            load_member(reference)


# --- timm references that do not fit


def test_timm_errors(weights, folders, tmp_path):
    for reference, words in (
        ("timm:resnet1888", "did you mean resnet18"),
        ("timm:vit_tiny_patch16_224.no_such_tag", "no pretrained weights"),
        (f"timm:resnet18={tmp_path}/none.pth", "does not exist"),
        (f"timm:resnet18={weights}", "missing .*unexpected"),
        (
            f"timm:tf_efficientnet_lite0?num_classes=7={weights}",
            r"classifier\.weight \(file \(1000, 1280\), model",
        ),
        (f"timm:tf_efficientnet_lite0?nonsense=7={weights}", "nonsense"),
        (f"timm:tf_efficientnet_lite0?7={weights}", "key=value"),
        (f"timm:resnet18={folders['bert'] / 'config.json'}", "not from 'config.json'"),
    ):
        with pytest.raises(LoadError, match=words) as caught:
            load_member(reference)
        assert "\n" not in str(caught.value)


def test_timm_files_that_are_no_state_dicts(tmp_path):
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "text.pth").write_text("weights")
    for name in ("list.pth", "text.pth"):
        with pytest.raises(LoadError, match=r"state dict|tensors alone"):
            load_member(f"timm:test_vit={tmp_path / name}")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text('{"architecture": "test_vit"}')
    with pytest.raises(LoadError, match="must hold weights"):
        load_member(str(tmp_path / "folder"))


def test_references_are_looked_for_before_any_is_loaded(tmp_path, monkeypatch):
    """A reference that is not there is named at once, together with all others, also where there is no network."""
    import huggingface_hub.constants

    from surgery.members import references
    from surgery.pipeline.merge import prepare
    from surgery.settings.recipe import Recipe

    monkeypatch.setattr(references, "load_member", lambda *_, **__: pytest.fail("something was loaded"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    given = ["timm:resnet18?pretrained=false", "nothere", "timm:resnet1888", f"timm:resnet18={tmp_path}/gone.pth",
             f"{tmp_path}/gone.py:net"]  # fmt: skip
    with pytest.raises(LoadError) as found:
        prepare(Recipe.of({"models": [{"model": reference} for reference in given]}))
    for said in (
        "'nothere' is no local folder",
        "no model 'resnet1888'",
        "gone.pth does not exist",
        "gone.py of",
    ):
        assert said in str(found.value)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    asked = []

    def unreachable(url, **_):
        asked.append(url)
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", unreachable)
    with pytest.raises(LoadError, match="no network"):
        references.check_references(["org/nothere"])
    assert len(asked) == 1, "asked once, without trying again"


@pytest.mark.parametrize("ending", ["pth", "bin", "pt"])
def test_a_file_that_is_misnamed_is_called_by_what_it_is(weights, tmp_path, ending):
    other = tmp_path / f"lite0.{ending}"
    other.write_bytes(weights.read_bytes())
    with pytest.raises(
        LoadError, match=r"is a safetensors file by what it holds: call it lite0\.safetensors"
    ) as raised:
        load_member(f"timm:tf_efficientnet_lite0={other}")
    assert "weights_only" not in str(raised.value)
    torch.save({"w": torch.ones(2)}, tmp_path / "net.safetensors")
    with pytest.raises(LoadError, match=r"one that torch\.save wrote: call it net\.pth"):
        load_member(f"timm:tf_efficientnet_lite0={tmp_path / 'net.safetensors'}")


def test_folders_and_data_with_misnamed_files_are_called_by_what_they_are(folders, tmp_path):
    folder = copy(folders["bert"], tmp_path / "b")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(
        LoadError, match=r"is a safetensors file by what it holds: call it pytorch_model\.safetensors"
    ):
        load_member(str(folder))
    save_file({"arg0": torch.ones(2, 3)}, tmp_path / "x.npz")
    with pytest.raises(LoadError, match=r"call it x\.safetensors"):
        read_arrays(tmp_path / "x.npz")
    numpy.savez(tmp_path / "y.npz", arg0=numpy.ones(3))
    (tmp_path / "y.npz").rename(tmp_path / "y.safetensors")
    with pytest.raises(LoadError, match=r"one that numpy\.savez wrote: call it y\.npz"):
        read_arrays(tmp_path / "y.safetensors")
