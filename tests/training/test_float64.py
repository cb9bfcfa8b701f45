"""Losses are added up in float32 at least, and in float64 where members are in it."""

import pytest
import torch
from torch import nn

from surgery.training.tasks.losses import LOSSES, distillation, loss_of
from surgery.training.tasks.tasks import Batch

KINDS = ["bfloat16", "float16", "float32", "float64"]
TARGETS = {
    "cross_entropy": torch.tensor([0, 2, 1, 2]),
    "language_modelling": torch.tensor([[0, 2, 1], [1, 1, 0], [2, 0, 0], [0, 1, 2]]),
    "mse": torch.linspace(0, 1, 12).view(4, 3),
    "binary_cross_entropy": torch.tensor([[0, 1, 1]] * 4),
    "statistics": None,
}


def output_of(name, dtype):
    shape = (4, 3, 3) if name == "language_modelling" else (4, 3)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_as_precise_as_outputs_and_float32_at_least(name, dtype):
    output = output_of(name, getattr(torch, dtype))
    found = LOSSES[name](output, Batch(target=TARGETS[name]))
    assert found.dtype == (torch.float64 if dtype == "float64" else torch.float32)
    exact = LOSSES[name](output.double(), Batch(target=TARGETS[name]))
    torch.testing.assert_close(found.double(), exact, rtol=1e-14 if dtype == "float64" else 1e-6, atol=0)


def test_gradients_of_a_float64_member_are_not_rounded_to_float32():
    output = output_of("cross_entropy", torch.float64).requires_grad_()
    loss_of("cross_entropy", nn.Identity)(output, Batch(target=TARGETS["cross_entropy"])).backward()
    chance = output.detach().softmax(1)
    chance[range(4), TARGETS["cross_entropy"]] -= 1
    torch.testing.assert_close(output.grad, chance / 4, rtol=1e-13, atol=1e-15)


def test_what_is_distilled_is_compared_in_float64():
    original = nn.Linear(3, 2).double()
    inputs = torch.randn(5, 3, dtype=torch.float64)
    found = distillation(original)(original(inputs) * (1 + 1e-10), Batch((inputs,)))
    torch.testing.assert_close(found, torch.tensor(1e-20, dtype=torch.float64), rtol=1e-4, atol=0)
