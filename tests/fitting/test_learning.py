"""What a fit learns from: few inputs that are given make nothing worse, and are warned of."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import surgery
from surgery.errors import SurgeryWarning
from surgery.fitting.learning import ENOUGH, FILLED, examples_of, inputs_to_learn_from
from surgery.members.member import Inputs

WIDTH = 64


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(WIDTH, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
        ).eval()


def rows(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


def one():
    return surgery.load_member(network(), name="one", inputs=rows(4))


def batches(count: int) -> list[Inputs]:
    return [Inputs((each,)) for each in rows(count, 1).split(8)] if count else []


def fitted(count: int) -> tuple[float, float, list[str]]:
    """The error that is reported with so many given inputs, that on others, and warnings."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        joint = surgery.fit(surgery.join([one()]), budget=0.12, probes={"one": batches(count)}, device="cpu")
    fresh, original = rows(512, 2), network()
    with torch.no_grad():
        error = float((joint["one"](fresh) - original(fresh)).norm() / original(fresh).norm())
    words = [str(each.message) for each in found if issubclass(each.category, SurgeryWarning)]
    return joint.report.errors["one"], error, words


def test_few_given_inputs_are_no_worse_than_none_and_are_warned_of():
    _, without, words = fitted(0)
    assert not words
    for count in (1, 3, 8):
        printed, error, words = fitted(count)
        assert error < 1.15 * without and error < 2.5 * printed
        assert len(words) == 1 and f"one ({count})" in words[0] and f"Give {ENOUGH} or more" in words[0]
    printed, error, words = fitted(ENOUGH)
    assert error < 1.15 * without and error < 1.5 * printed and not words


@pytest.mark.parametrize(("count", "made_up"), [(0, 16), (1, 8), (FILLED - 1, 1), (FILLED, 0), (ENOUGH, 0)])
def test_made_up_inputs_make_up_the_number(count, made_up):
    member, given = one(), batches(count)
    found = inputs_to_learn_from(member, member.module.state_dict(), 0, given)
    assert len(found) == (made_up + len(given) if made_up else 0)
    assert all(a is b for a, b in zip(given, found, strict=False))
    if made_up and count:
        assert FILLED <= examples_of(found) < FILLED + 4


def test_a_large_member_learns_from_what_is_given(monkeypatch):
    monkeypatch.setattr("surgery.fitting.learning.LARGEST", 10)
    member = one()
    assert not inputs_to_learn_from(member, member.module.state_dict(), 0)
    assert not inputs_to_learn_from(member, member.module.state_dict(), 0, batches(3))


class First(nn.Linear):
    """Takes texts that begin with a certain token alone."""

    def forward(self, x):
        if int(x[0, 0]) != 1:
            raise ValueError("must start with 1")
        return super().forward(x.float())


def test_a_model_that_does_not_take_made_up_inputs_is_refused_with_what_to_give():
    member = surgery.load_member(First(4, 2).eval(), name="one", inputs=torch.tensor([[1, 0, 9, 7]]))
    with pytest.raises(surgery.PlanError, match="were made up, so pass real ones with `calibrate`"):
        surgery.fit(surgery.join([member]), max_error=0.05, seed=1, device="cpu")


class Root(nn.Linear):
    def forward(self, x):
        return super().forward(x).sqrt()


def test_numbers_that_are_none_are_found_in_the_batch_that_gives_them():
    body = Root(4, 1).eval()
    with torch.no_grad():
        body.weight.fill_(1.0)
        body.bias.zero_()
    member = surgery.load_member(body, name="one", inputs=torch.ones(2, 4))
    given = {"one": [Inputs((torch.ones(2, 4),)), Inputs((-torch.ones(2, 4),))]}
    with pytest.raises(surgery.PlanError, match="batch 2 of 2 of the inputs given; leave these out"):
        surgery.fit(surgery.join([member]), budget=0.3, probes=given, device="cpu")
