"""What leaves weights where they are copies none: those that are mapped from files stay mapped."""

from __future__ import annotations

import sys

import pytest
import torch
from safetensors import safe_open
from torch import nn

import surgery
from surgery.core import generation
from surgery.errors import PlanError
from surgery.safetensors.writing import write_aligned

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="mappings are read from /proc")


class Copied(Exception):
    """A mapped weight was copied."""


def net():
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 32))


@pytest.fixture
def joint(tmp_path, monkeypatch):
    """A model whose weights lie in a file, of which no copy is made."""
    torch.manual_seed(0)
    write_aligned(tmp_path / "w.safetensors", net().state_dict())
    module = net()
    with safe_open(str(tmp_path / "w.safetensors"), framework="pt") as file:
        module.load_state_dict({name: file.get_tensor(name) for name in module.state_dict()}, assign=True)
    joint = surgery.join([surgery.load_member(module, name="a", inputs=torch.randn(2, 64))])
    assert any(list(joint.dictionary.lent(key)) for key in joint.dictionary)

    def copied(weight):
        raise Copied

    monkeypatch.setattr(generation, "_copy", copied)
    return joint


def test_moving_to_where_a_model_is_copies_nothing(joint):
    joint.to("cpu")
    joint.cpu().float()
    with pytest.raises(Copied):  # rows are where they were, too
        joint.refresh()


def test_a_fit_that_fails_copies_nothing(joint):
    x = torch.randn(3, 64)
    before = joint["a"](x)
    with pytest.raises(PlanError):
        surgery.fit(joint, budget=1e-6)
    assert torch.equal(joint["a"](x), before)
