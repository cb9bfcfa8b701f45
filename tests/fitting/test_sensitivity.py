"""Derivatives behind a fit: a model that has none is measured, and a fault in what is made of them is a fault."""

import pytest
import torch
from torch import nn

import surgery
from surgery.fitting import metric, sensitivity
from surgery.fitting.trial import Trial
from surgery.geometry.views import CanonicalView
from surgery.members.member import Inputs


def trial(module):
    member = surgery.load_member(module, name="net", inputs=torch.randn(3, 4))
    state = member.module.state_dict()
    owners = {name: (name,) for name in state}
    return Trial(member, state, owners, [member.inputs], torch.device("cpu"))


@pytest.mark.parametrize(("width", "passes"), [(64, 8), (400, 4), (1024, 2)])
def test_large_weights_are_drawn_once_a_batch_and_multiplied_as_often(monkeypatch, width, passes):
    drawn, multiplied = [], []
    sample, second_moment = sensitivity._one_sample, metric._second_moment
    monkeypatch.setattr(sensitivity, "_one_sample", lambda *a: drawn.append(0) or sample(*a))
    monkeypatch.setattr(metric, "_second_moment", lambda x: multiplied.append(0) or second_moment(x))
    member = surgery.load_member(
        nn.Linear(width, width, bias=False), name="net", inputs=torch.randn(3, width)
    )
    state = member.module.state_dict()
    batches = [Inputs((torch.randn(3, width),), {}) for _ in range(2)]
    net = Trial(member, state, {name: (name,) for name in state}, batches, torch.device("cpu"))
    views = {"weight": CanonicalView.of("o i -> 1 o i", (width, width))}
    _, found = sensitivity.metrics(net, 0, views)
    assert len(drawn) == passes
    once = len(multiplied)
    sensitivity.metrics(net, 0, views, samples=max(passes // 2, 2))
    assert len(multiplied) - once == once
    rounding = 0.01 * torch.randn(width, width)
    with net.running_with({"weight": state["weight"] + rounding}):
        moved = net.error() ** 2
    assert found["weight"].price(rounding) == pytest.approx(moved, rel=0.5)  # of two to eight draws


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


class Noisy(nn.Linear):
    def forward(self, x):
        return super().forward(x * (1 + torch.randn_like(x)))


def test_a_model_that_draws_random_numbers_has_the_same_sensitivities_each_time():
    torch.manual_seed(3)
    net = trial(Noisy(4, 4))
    first = sensitivity.sensitivities(net, 0)
    state = torch.get_rng_state()
    torch.manual_seed(4)
    assert sensitivity.sensitivities(net, 0) == first
    torch.set_rng_state(state)


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
