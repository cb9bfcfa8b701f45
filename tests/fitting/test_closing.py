"""What a search aims at next, from what was measured."""

import math

import pytest
import torch

from surgery.fitting.closing import Bracket
from surgery.fitting.units import ROUGH, measure
from surgery.storage.codecs import grouped


@pytest.mark.parametrize("factor", [0.2, 1.0, 4.0])
@pytest.mark.parametrize("power", [0.7, 1.0, 1.6])
def test_a_smooth_error_is_found_in_few_attempts(factor: float, power: float) -> None:
    bound, aim, bracket = 0.1, 0.0094, Bracket()
    for _ in range(6):
        error = factor * aim ** (power / 2)
        if 0.97 * bound <= error <= bound:
            return
        bracket = bracket.after(aim, error, bound)
        aim = bracket.next(bound)
    pytest.fail("not within six attempts")


def test_the_next_aim_lies_between_what_held_and_what_failed() -> None:
    bracket = Bracket().after(0.01, 0.02, bound=0.1)
    assert bracket.next(0.1) > 0.01  # it held
    for error in (0.5, math.inf, 0.100001):
        both = bracket.after(0.04, error, bound=0.1)
        assert 0.01 < both.next(0.1) < 0.04
    assert bracket.after(0.04, 0.05, bound=0.1).failed is None
    assert 0 < Bracket().after(0.04, math.inf, bound=0.1).next(0.1) < 0.04
    assert Bracket().after(0.04, 0.0, bound=0.1).next(0.1) > 0.04


def test_few_values_tell_nearly_what_all_of_them_tell() -> None:
    tensor = torch.randn(256, 128, generator=torch.Generator().manual_seed(0))
    whole = measure({"t": tensor}, {"m": 1.0})
    few = measure({"t": tensor}, {"m": 1.0}, sample=ROUGH)
    assert whole.options == few.options and whole.nbytes == few.nbytes
    for exact, rough in zip(whole.errors, few.errors, strict=True):
        assert rough == pytest.approx(exact, rel=0.15)
    grid = (3 * tensor).round().clamp(-8, 7)  # where 8 bits may lose nothing and 7 do
    few = measure({"t": grid}, {"m": 1.0}, sample=ROUGH)
    assert all(error > 0 for error in few.errors[few.options.index(grouped(7, 64)) :])
