"""Packed members inside of others, and what a load and its like are asked for: casts, devices, architectures."""

from __future__ import annotations

import pytest
import torch
from artifacts import fitted, member, modules, pair
from resident_bodies import draw
from torch import nn

import surgery
from surgery.errors import PlanError, TrainingError

WAYS = ["packed", "shared"]


@pytest.mark.parametrize("way", WAYS)
def test_a_packed_part_of_what_trains_stays_as_it_is(way, tmp_path, monkeypatch):
    """Heads train on what a packed body computes, whose own dropout and running statistics stay as in evaluation."""
    monkeypatch.setattr("surgery.storage.held.SMALL", 0)
    joint = surgery.load(surgery.save(fitted(), tmp_path / "joint"), modules=modules(), resident=way)

    class Headed(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head, self.drop = joint["one"], nn.LazyLinear(1), nn.Dropout()

        def train(self, mode=True):
            return super().train(mode)

        def forward(self, x):
            return self.head(self.drop(self.body(x)))

    whole, x = Headed(), draw(2, 8)
    wanted = joint["one"](x)
    assert whole.train() is whole and whole.training and whole.drop.training and whole.head.training
    assert not any(part.training for part in joint["one"].modules())
    assert torch.equal(whole.body(x), wanted)
    with pytest.raises(TrainingError, match=r"\[p for p in model.parameters\(\) if p.requires_grad\]"):
        torch.optim.AdamW(whole.parameters())
    optimizer = torch.optim.SGD([p for p in whole.parameters() if p.requires_grad], lr=0.1)
    whole(x).sum().backward()
    before = whole.head.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(before, whole.head.weight) and torch.equal(whole.body(x), wanted)
    assert not any(part.training for part in whole.eval().modules())
    with pytest.raises(TrainingError, match=r"extract\(NAME\)"):
        whole.requires_grad_(True)
    plain = joint.extract("one")
    assert plain.train().training and all(part.training for part in plain.modules())


def test_a_resident_model_is_cast_and_moved_as_a_module_is(tmp_path, monkeypatch):
    monkeypatch.setattr("surgery.storage.held.SMALL", 0)
    joint = surgery.load(surgery.save(fitted(), tmp_path / "joint"), modules=modules(), resident="shared")
    assert joint.eval() is joint and joint.cpu() is joint
    for cast, dtype in (
        (joint.half, torch.float16),
        (joint.bfloat16, torch.bfloat16),
        (lambda: joint.to(torch.float16), torch.float16),
        (joint.float, torch.float32),
    ):
        active = joint.activate("one")
        assert cast() is joint
        assert all(p.dtype == dtype for name in joint for p in joint[name].parameters())
        assert joint.activate("one") is not active
        assert all(p.dtype == dtype for p in joint.activate("two").parameters())
    for name in ("named_parameters", "requires_grad_", "double", "plan"):
        with pytest.raises(AttributeError, match=rf"has no `{name}`; a member.*extract"):
            getattr(joint, name)
    with pytest.raises(AttributeError, match="object has no attribute 'other'"):
        joint.other  # noqa: B018
    plain = surgery.load(tmp_path / "joint", modules=modules())
    with pytest.raises(AttributeError, match="all of its members are ready"):
        plain.activate("one")
    with pytest.raises(AttributeError, match="has no attribute 'other'"):
        plain.other  # noqa: B018


def test_devices_that_there_are_not(tmp_path):
    folder = surgery.save(pair(), tmp_path / "joint")
    for device in ("nonsense", "cuda:99", "", []):
        with pytest.raises(PlanError, match=r"is not available here .*use `device=cpu`"):
            surgery.load(folder, modules=modules(), device=device)
        with pytest.raises(PlanError, match="is not available here"):
            surgery.load(folder, modules=modules(), resident="packed", device=device)
        with pytest.raises(PlanError, match="is not available here"):
            surgery.load(folder, modules=modules(), resident="packed").to(device)
        with pytest.raises(PlanError, match="is not available here"):
            surgery.add(folder, {"new": member(nn.Linear(8, 8), "new", draw(2, 8))}, device=device)
    with pytest.raises(PlanError, match="found nwe; these are added: new"):
        surgery.add(folder, {"new": member(nn.Linear(8, 8), "new", draw(2, 8))}, probes={"nwe": []})


@pytest.mark.parametrize("ask", [surgery.load, surgery.verify, surgery.refit])
def test_modules_are_given_for_members(ask, tmp_path):
    folder = surgery.save(pair(), tmp_path / "joint")
    for architectures, said in (
        ({"one": modules()["one"], "tow": modules()["two"]}, "found tow; the members are one, two"),
        ({"one": 5}, "found int for one"),
        ([modules()["one"]], "be a mapping .* found list; the members are one, two"),
    ):
        with pytest.raises(PlanError, match=f"`modules` must .*{said}"):
            ask(folder, modules=architectures)
