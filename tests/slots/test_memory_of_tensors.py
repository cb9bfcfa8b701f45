"""What is handed on holds its own memory alone: states, extracted members and exports of views and padded rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from artifacts import member, seeded
from safetensors.torch import load_file
from torch import nn

import surgery
from surgery.artifact.export import export
from surgery.artifact.folder import load, save
from surgery.storage.keys import PlainKey
from surgery.storage.states import state_of
from surgery.storage.stored import store


class Odd(nn.Module):
    """A batch norm of 96 values, whose groups are padded to 128, and a buffer that is a view of a larger tensor."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 96, 1)
        self.norm = nn.BatchNorm2d(96)
        self.second = nn.Conv2d(96, 24, 1)
        self.third = nn.Conv2d(24, 24, 1)
        self.last = nn.Conv2d(24, 4, 1)
        self.register_buffer("scale", torch.ones(8, 24)[3])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.norm(self.first(x)))
        hidden = torch.relu(self.second(hidden)) * self.scale[:, None, None]
        return self.last(torch.relu(self.third(hidden)))


def odd() -> Odd:
    module = seeded(Odd)
    with torch.no_grad():
        module.norm.running_mean.copy_(torch.linspace(-0.2, 0.2, 96))
        module.norm.running_var.copy_(torch.linspace(0.5, 2, 96))
    return module


@pytest.fixture
def joint() -> surgery.JointModel:
    joint = surgery.join([member(odd(), "odd", torch.ones(2, 3, 5, 5))], block=(8, 8))
    surgery.fit(joint, max_error=0.05)
    # Padded whatever the search chose: encoded as it could have been.
    for key in ("running_mean", "running_var"):
        from surgery.storage.codecs import decode, encode, grouped

        stored = encode(getattr(joint["odd"].norm, key), grouped(12, 64))
        joint.encoded[PlainKey("odd", f"norm.{key}")] = stored
        joint["odd"].norm._buffers[key] = decode(stored)
    return joint


def own(state: dict[str, torch.Tensor]) -> list[str]:
    return [name for name, t in state.items() if t.untyped_storage().nbytes() != t.nbytes]


def test_states_own_their_memory(joint: surgery.JointModel):
    assert own(joint.collapse("odd")) == []
    assert own(state_of(store(joint), "odd")) == []
    assert own(dict(joint.extract("odd").named_parameters())) == []


def test_a_padded_batch_norm_is_exported_plain(joint: surgery.JointModel, tmp_path: Path):
    expected = joint.collapse("odd")
    for source, name in ((joint, "live"), (save(joint, tmp_path / "joint"), "read")):
        found = load_file(export(source, "odd", tmp_path / name) / "model.safetensors")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert own(load(tmp_path / "joint", modules={"odd": odd()}).collapse("odd")) == []


def test_weights_of_templates_own_their_memory():
    net = seeded(
        lambda: nn.Sequential(nn.Linear(8, 24), *(nn.Linear(24, 24) for _ in range(4)), nn.Linear(24, 2))
    )
    mine = member(net, "net", torch.ones(2, 8))
    joint = surgery.join([mine], surgery.plan_templates([surgery.discover(mine)]))
    before = {key: tensor.clone() for key, tensor in joint.collapse("net").items()}
    assert own(before | joint.collapse("net")) == []
    surgery.fit(joint, templates=2)
    assert own(joint.collapse("net")) == [] and own(state_of(store(joint), "net")) == []
