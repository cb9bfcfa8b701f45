"""Derivatives behind a fit: a model that has none is measured, and a fault in what is made of them is a fault."""

import pytest
import torch
from torch import nn

import surgery
from surgery.fitting import sensitivity
from surgery.fitting.trial import Trial
from surgery.geometry.views import CanonicalView


def trial(module):
    member = surgery.load_member(module, name="net", inputs=torch.randn(3, 4))
    state = member.module.state_dict()
    owners = {name: (name,) for name in state}
    return Trial(member, state, owners, [member.inputs], torch.device("cpu"))


class Backwards(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, *gradients):
        raise RuntimeError("derivative is not implemented")


class OneWay(nn.Linear):
    def forward(self, x):
        return Backwards.apply(super().forward(x))


def test_a_model_without_derivatives_has_no_sensitivities():
    assert sensitivity.sensitivities(trial(OneWay(4, 2)), 0) == {}
    assert set(sensitivity.sensitivities(trial(nn.Linear(4, 2)), 0)) == {"weight", "bias"}


def test_a_fault_in_the_reduction_of_a_gradient_is_raised(monkeypatch):
    def broken(self, gradient):
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(sensitivity.Draws, "add", broken)
    net = trial(nn.Linear(4, 2))
    views = {"weight": CanonicalView.of("o i -> 1 o i", (2, 4))}
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        sensitivity.metrics(net, 0, views)
    assert all(p.grad is None for p in net.module.parameters())
