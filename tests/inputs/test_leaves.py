"""Dead leaves: pictures that are random, repeatable and, as photographs, mostly flat with a few strong edges."""

import pytest
import torch

from surgery.inputs.leaves import SIDE, dead_leaves


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return dead_leaves(shape, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 1, 8, 8), (2, 3, 32, 20), (1, 4, SIDE + 40, SIDE)])
def test_values_are_those_of_pictures(shape):
    pictures = drawn(*shape)
    assert pictures.shape == shape and pictures.dtype == torch.float32
    assert bool((pictures >= 0).all()) and bool((pictures <= 1).all())


def test_a_seed_gives_the_same_pictures_again_and_another_one_others():
    assert drawn(2, 3, 16, 16).equal(drawn(2, 3, 16, 16))
    assert not drawn(2, 3, 16, 16).equal(drawn(2, 3, 16, 16, seed=1))
    assert not drawn(2, 3, 16, 16)[0].equal(drawn(2, 3, 16, 16)[1])


def test_differences_of_neighbours_have_heavy_tails():
    """Of normal noise their kurtosis is 3; photographs have 10 to 30 (Huang and Mumford 1999)."""
    pictures = drawn(16, 1, 96, 96)
    steps = (pictures[..., 1:] - pictures[..., :-1]).flatten()
    kurtosis = float(((steps - steps.mean()) ** 4).mean() / steps.var() ** 2)
    assert kurtosis > 8


def test_power_falls_with_about_the_square_of_frequency():
    """As of photographs, on which exponents of 1.6 to 2.6 were measured (Torralba and Oliva 2003)."""
    pictures = drawn(32, 1, 96, 96)
    power = torch.fft.rfft(pictures - pictures.mean((2, 3), keepdim=True)).abs().square().mean((0, 1, 2))
    frequency = torch.arange(2, 24)
    x, y = frequency.float().log(), power[2:24].log()
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())
    assert -2.8 < slope < -1.4
