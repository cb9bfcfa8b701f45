"""State dicts beyond plain parameters: extra state, names that hooks change, and tensors that hold no values."""

import copy
import json
from collections import OrderedDict

import pytest
import torch
from artifacts import member, seeded, stack
from nets import assert_same_bits
from safetensors.torch import load_file
from torch import nn

import surgery
from surgery.errors import ArtifactError, LoadError, OutputError
from surgery.members.extra_state import from_document, to_document
from surgery.members.member import content_hash, whole_state
from surgery.storage.keys import StateKey
from surgery.training.loop.state import restore, snapshot

VALUE = {
    "none": None, "steps": 3, "rate": 0.1, "most": float("inf"), "on": True, "text": "é",
    "list": [1, [2.5, "x"]], "pair": (1, (2,)), 7: OrderedDict(b=1, a=2), "raw": b"\0\1",
    "scale": torch.tensor([0.5, -0.0]), "empty": torch.zeros(0, 2), "half": torch.tensor(1.5).bfloat16(),
    "dtype": torch.float16, "device": torch.device("cpu"), "size": torch.Size([2, 3]),
}  # fmt: skip


class Counting(nn.Module):
    """Counts its passes in its extra state, and keeps what it is given there."""

    def __init__(self, value=None):
        super().__init__()
        self.line, self.out = nn.Linear(8, 8), nn.Linear(8, 8)
        self.value = value
        self.register_buffer("own", torch.arange(3), persistent=False)
        self.register_parameter("absent", None)

    def forward(self, x):
        return self.out(torch.relu(self.line(x)))

    def get_extra_state(self):
        return self.value

    def set_extra_state(self, state):
        self.value = state


class Outer(nn.Module):
    def __init__(self, value=None):
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(8, 8), Counting(value), nn.Linear(8, 4)

    def forward(self, x):
        return self.last(self.inner(self.first(x)))


def same(one, other):
    if isinstance(one, torch.Tensor):
        return (one.dtype, one.shape) == (other.dtype, other.shape) and torch.equal(one, other)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and all(map(same, one, other)) and len(one) == len(other)
    if isinstance(one, dict):
        return (
            type(one) is type(other) and list(one) == list(other) and all(same(one[k], other[k]) for k in one)
        )
    return type(one) is type(other) and one == other


def outer(value, name="net"):
    return member(seeded(lambda: Outer(value)), name, torch.zeros(2, 8))


def test_what_a_document_holds_comes_back_and_anything_else_is_named():
    content = to_document({"k": VALUE}, "net")
    assert same(from_document(json.loads(content)), {"k": VALUE})
    loop = []
    loop.append(loop)
    with pytest.raises(OutputError) as error:
        to_document({"a": {"f": print}, "b": [object()], "c": loop, "d": torch.zeros(2).to_sparse()}, "net")
    for part in (
        "'net'",
        "a['f'] (builtins.builtin_function_or_method)",
        "b[0] (builtins.object)",
        "too deeply",
        "d (",
    ):
        assert part in str(error.value)
    huge = {"tensor": ["float32", [10**9, 10**9], "AAAA"]}
    for bad in (
        {"tensor": ["float32", [3], ""]},
        {"dtype": "nn"},
        {"code": 1},
        huge,
        {"device": 3.5},
        {"dict": [1]},
    ):
        with pytest.raises(ValueError):
            from_document({"k": bad})
    with pytest.raises(ValueError):
        from_document([])


@pytest.mark.parametrize("value", [VALUE, torch.tensor([1.0, 2.0])], ids=["plain", "tensor"])
def test_extra_state_is_carried_everywhere(tmp_path, value):
    net = outer(value)
    whole = copy.deepcopy(net.module.state_dict())
    joint = surgery.join([net, outer(None, "other")], block=(8, 8))
    assert list(joint.collapse("net")) == list(whole)
    for twin in (joint.extract("net"), copy.deepcopy(joint)["net"]):
        assert same(twin.inner.value, value)
    Outer().load_state_dict(joint.collapse("net"), strict=True)
    assert content_hash(joint.collapse("net")) == content_hash(whole_state(Outer(value)) | whole)
    surgery.fit(joint, max_error=0)
    folder = surgery.save(joint, tmp_path / "joint")
    loaded = surgery.load(folder, modules={"net": Outer(), "other": Outer()})
    assert same(loaded["net"].inner.value, value) and loaded["other"].inner.value is None
    assert loaded.report.errors == {"net": 0.0, "other": 0.0}
    again = surgery.save(loaded, tmp_path / "again")
    for path in ("manifest.json", "members/net/extra_state.json"):
        assert (folder / path).read_bytes() == (again / path).read_bytes()
    assert surgery.verify(folder, modules={"net": seeded(lambda: Outer(value)), "other": seeded(Outer)}).ok
    plain = surgery.export(folder, "net", tmp_path / "plain")
    state = load_file(plain / "model.safetensors")
    if isinstance(value, torch.Tensor):
        Outer().load_state_dict(state, strict=True)
    else:
        left = from_document(json.loads((plain / "extra_state.json").read_bytes()))
        Outer().load_state_dict({**state, **left}, strict=True)
    small = surgery.export(folder, "net", tmp_path / "small", format="compressed")
    assert same(surgery.load(small, modules={"net": Outer()})["net"].inner.value, value)
    loaded["net"].inner.value = "changed"
    surgery.save(loaded, tmp_path / "changed")
    assert json.loads((tmp_path / "changed" / "manifest.json").read_text())["report"]["changed"] == ["net"]
    path = folder / "members" / "net" / "extra_state.json"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match=r"extra_state\.json"):
        surgery.load(folder, modules={"net": Outer(), "other": Outer()})


def test_a_run_keeps_and_restores_it_and_what_no_file_holds_is_refused_before(tmp_path):
    joint = surgery.join([outer({"steps": 1})], block=(8, 8))
    kept = snapshot(joint)
    joint["net"].inner.value = {"steps": 2}
    restore(joint, kept)
    assert joint["net"].inner.value == {"steps": 1}
    del kept[StateKey("extra", "net")]
    restore(joint, kept)
    joint["net"].inner.value = {"steps": print}
    with pytest.raises(OutputError, match=r"inner\._extra_state\['steps'\] \(builtins"):
        surgery.save(joint, tmp_path / "joint")
    task = surgery.Task("net", "net", [(torch.zeros(2, 8), torch.zeros(2, 4))], loss="mse")
    with pytest.raises(OutputError, match="of 'net' holds"):
        surgery.train(joint, [task], {"generations": 1}, cpu=True)
    assert joint.extract("net").inner.value == {"steps": print} and not list(tmp_path.iterdir())


def test_names_that_hooks_change_are_theirs_and_the_artifact_has_its_own(tmp_path):
    def build():
        net = seeded(stack, 3)

        def save(module, state, prefix, metadata):
            state[f"{prefix}renamed"] = state.pop(f"{prefix}2.weight")
            state[f"{prefix}note"] = "added"

        def restore(module, state, prefix, *rest):
            state[f"{prefix}2.weight"] = state.pop(f"{prefix}renamed")
            state.pop(f"{prefix}note")

        net.register_state_dict_post_hook(save)
        net.register_load_state_dict_pre_hook(restore)
        return net

    plain = {key: t.clone() for key, t in seeded(stack, 3).state_dict().items()}
    joint = surgery.join([member(build(), "net", torch.zeros(2, 8))])
    state = joint.collapse("net")
    assert state["note"] == "added" and "2.weight" not in state
    twin = build()
    twin.load_state_dict(state)
    folder = surgery.save(joint, tmp_path / "joint")
    loaded = surgery.load(folder, modules={"net": seeded(stack, 5)})
    assert_same_bits(loaded.collapse("net"), plain)


@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        (lambda net: net.register_buffer("few", torch.eye(3).to_sparse()), r"few \(sparse_coo\)"),
        (lambda net: net.register_buffer("rows", torch.eye(3).to_sparse_csr()), r"rows \(sparse_csr\)"),
        (lambda net: net.add_module("late", nn.LazyLinear(3)), r"late\.weight \(uninitialised\), late\.bias"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*")
def test_tensors_without_dense_values_are_named(spoil, found):
    net = seeded(stack, 1)
    spoil(net)
    with pytest.raises(LoadError, match=found):
        surgery.join([member(net, "net", torch.zeros(2, 8))])
