"""Members whose inputs are given or made up: rounding makes up for its errors where these say how."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

import surgery
from surgery.fitting.scene import Scene
from surgery.members.member import Inputs
from surgery.storage.stored import store

BUDGET = 0.14
WIDTH = 128


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, 256), nn.GELU())


def inputs(seed: int) -> torch.Tensor:
    """Points near a plane of 16 dimensions."""
    generator = torch.Generator().manual_seed(seed)
    plane = torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(7))
    return (
        torch.randn(256, 16, generator=generator) @ plane / 4
        + torch.randn(256, WIDTH, generator=generator) / 20
    )


def fitted(probes: torch.Tensor | None):
    module = net().eval()
    member = surgery.load_member(module, name="one", inputs=Inputs((inputs(1),)))
    given = {"one": [Inputs((probes,))]} if probes is not None else None
    return surgery.fit(surgery.join([member]), budget=BUDGET, probes=given, seed=0, device="cpu")


def error(joint) -> float:
    """On inputs that no fit has seen."""
    fresh, original = inputs(9), net().eval()
    with torch.no_grad():
        return float((joint["one"](fresh) - original(fresh)).norm() / original(fresh).norm())


def without_statistics(monkeypatch):
    monkeypatch.setattr(Scene, "inputs_of", lambda self, key: None)


def test_inputs_make_a_single_model_more_exact_in_the_same_bytes(monkeypatch):
    found = fitted(inputs(2))
    with monkeypatch.context() as patch:
        without_statistics(patch)
        plain = fitted(inputs(2))
    sizes = [sum(each.nbytes for each in store(joint).tensors.values()) for joint in (found, plain)]
    assert sizes[0] <= sizes[1] * 1.01
    assert error(found) < 0.6 * error(plain)


def test_made_up_inputs_of_a_large_member_change_nothing(monkeypatch):
    monkeypatch.setattr("surgery.fitting.learning.LARGEST", 0)
    found = store(fitted(None)).tensors
    without_statistics(monkeypatch)
    same = store(fitted(None)).tensors
    assert {key: each.precision for key, each in found.items()} == {k: e.precision for k, e in same.items()}
    for key, each in found.items():
        assert all(torch.equal(part, same[key].parts[name]) for name, part in each.parts.items())


def patches() -> nn.Module:
    torch.manual_seed(2)
    conv = nn.Conv2d(1, 64, 4, stride=4)
    return nn.Sequential(conv, nn.GELU(), nn.Flatten(2), nn.Linear(16, 32), nn.GELU(), nn.Flatten(1))


def photographs(seed: int) -> torch.Tensor:
    """Bright discs on a slope, as no fit has seen: `[32, 1, 16, 16]`."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.linspace(0, 1, 16)[:, None], torch.linspace(0, 1, 16)
    place, radius, slope = (torch.rand(size, 1, 1, generator=generator) for size in (64, 32, 32))
    discs = (x - place[:32]) ** 2 + (y - place[32:]) ** 2 < (0.1 + radius / 3) ** 2
    return (discs + slope * x)[:, None].float()


def made_up(monkeypatch, fed: bool) -> tuple[float, float]:
    """Errors on what a fit measures on, and on photographs, of a net that it was given no data of."""
    with monkeypatch.context() as patch:
        if not fed:
            patch.setattr("surgery.fitting.learning.LARGEST", 0)
        member = surgery.load_member(patches().eval(), name="one", inputs=photographs(1))
        joint = surgery.fit(surgery.join([member]), budget=0.16, seed=0, device="cpu")
    fresh, original = photographs(9), patches().eval()
    with torch.no_grad():
        error = (joint["one"](fresh) - original(fresh)).norm() / original(fresh).norm()
    return joint.report.errors["one"], float(error)


def test_made_up_pictures_make_a_model_more_exact_on_others_and_errors_are_not_measured_on_them(monkeypatch):
    printed, real = made_up(monkeypatch, fed=True)
    _, plain = made_up(monkeypatch, fed=False)
    assert real < 0.9 * plain
    assert real < 1.2 * printed


def deep() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(WIDTH, 256), nn.GELU(), nn.Linear(256, 6))


def test_rows_make_up_for_one_another_where_few_outputs_tell_what_they_do(monkeypatch):
    """Six outputs see 256 rows: most errors of these can cancel."""
    known, seen, original, fresh = Scene.inputs_of, [], deep().eval(), inputs(9)

    def without_outputs(self, key):
        found = known(self, key)
        seen.append(found is not None and found.outputs is not None)
        return found and replace(found, outputs=None)

    def moved() -> tuple[float, int]:
        member = surgery.load_member(deep().eval(), name="one", inputs=Inputs((inputs(1),)))
        probes = {"one": [Inputs((inputs(2),))]}
        joint = surgery.fit(surgery.join([member]), budget=BUDGET, probes=probes, seed=0, device="cpu")
        with torch.no_grad():
            error = (joint["one"](fresh) - original(fresh)).norm() / original(fresh).norm()
        return float(error), sum(each.nbytes for each in store(joint).tensors.values())

    both, size = moved()
    monkeypatch.setattr(Scene, "inputs_of", without_outputs)
    columns, former = moved()
    assert any(seen)
    assert size <= former * 1.01
    assert both < 0.7 * columns
