"""Related sites stored together: predicted errors are corrected by measured ones, and each apart is measured too."""

from __future__ import annotations

from copy import deepcopy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from artifacts import member
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import surgery
from surgery.fitting import scene, structure
from surgery.fitting.allocation import revalued, within_bytes
from surgery.fitting.search import Search
from surgery.fitting.structure import Structure
from surgery.fitting.tabulated import Table

NAMES = ("one", "two", "three")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(16, 48), nn.Linear(48, 4)
        self.middle = nn.ModuleList(nn.Linear(48, 48) for _ in range(2))

    def forward(self, x):
        x = self.first(x)
        for layer in self.middle:
            x = x + torch.relu(layer(x))
        return self.last(x)


def family(size, rank=48):
    """Members of one base; differences of full rank are what a family has least in common."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base, nets = Net().eval(), {}
        for name in NAMES:
            nets[name] = net = Net().eval()
            net.load_state_dict(base.state_dict())
            with torch.no_grad():
                for layer in net.middle:
                    layer.weight += size * torch.randn(48, rank) @ torch.randn(rank, 48) / (7 * rank**0.5)
    return nets


def fitted(nets, given, **target):
    inputs = torch.randn(16, 16, generator=torch.Generator().manual_seed(1))
    joint = surgery.join([member(deepcopy(net), name, inputs[:8]) for name, net in nets.items()])
    probes = {name: [surgery.Inputs((inputs,))] for name in nets} if given else None
    return surgery.fit(joint, probes=probes, **target).report


def apart(monkeypatch):
    """Nothing is found to be related."""
    monkeypatch.setattr(scene, "related_sites", lambda *arguments: [])


def of_the_mean(nets):
    """The output error of the members' mean, which is all that is left where differences are left out."""
    x, mean = torch.randn(64, 16, generator=torch.Generator().manual_seed(2)), Net().eval()
    states = [net.state_dict() for net in nets.values()]
    mean.load_state_dict({key: torch.stack([each[key] for each in states]).mean(0) for key in states[0]})
    with torch.no_grad():
        return np.mean([float((mean(x) - net(x)).norm() / net(x).norm()) for net in nets.values()])


@pytest.mark.parametrize(("given", "size"), [(False, 0.5), (True, 0.5), (False, 0.1)])
def test_a_family_is_never_worse_than_its_members_apart(monkeypatch, given, size):
    nets = family(size)
    found = fitted(nets, given, budget=0.1)
    assert np.mean([*found.errors.values()]) < 0.75 * of_the_mean(nets)
    apart(monkeypatch)
    alone = fitted(nets, given, budget=0.1)
    assert np.mean([*found.errors.values()]) <= np.mean([*alone.errors.values()])


@pytest.mark.parametrize(("size", "target"), [(0.03, {"budget": 0.08}), (0.01, {"max_error": 0.02})], ids=str)
def test_what_is_not_encoded_would_not_have_been_taken(monkeypatch, size, target):
    nets, said, is_far = family(size, rank=1), [], Search.is_far
    monkeypatch.setattr(Search, "is_far", lambda *given: said.append(is_far(*given)) or said[-1])
    found = fitted(nets, False, **target)
    assert any(said)
    monkeypatch.setattr(Search, "is_far", lambda *given: False)
    always = fitted(nets, False, **target)
    assert (found.stored_bytes, found.errors) == (always.stored_bytes, always.errors)


def test_errors_as_large_as_the_outputs_are_never_taken_for_far():
    """Predictions go on rising where outputs cannot move further."""
    found = SimpleNamespace(counted=0.0, errors=np.array([0.4, 0.4]))
    search = SimpleNamespace(headers=10.0)
    size, error = np.array([[1.0]]), np.array([[100.0]])
    one = np.zeros(1, int)
    table = Table(size, error, np.ones((1, 2)), one, one, np.zeros(1))
    assert not Search.is_far(search, table, found)
    assert Search.is_far(search, table, SimpleNamespace(counted=0.0, errors=np.array([0.3, 0.3])))


@pytest.mark.parametrize("target", [{"budget": 0.1}, {"max_error": 0.2}], ids=str)
def test_apart_is_measured_where_predictions_are_wrong(monkeypatch, target):
    """What sharing leaves out is taken for free, and measuring it changes nothing."""
    nets = family(1.0)
    monkeypatch.setattr(structure, "LEFT_OUT", 1e-6)
    monkeypatch.setattr(Structure, "learned", lambda self, *measured: self)
    found = fitted(nets, False, **target)
    apart(monkeypatch)
    alone = fitted(nets, False, **target)
    assert np.mean([*found.errors.values()]) <= np.mean([*alone.errors.values()]) or "max_error" in target
    assert found.stored_bytes <= alone.stored_bytes * 1.01 and found.met


@given(st.integers(0, 999), st.floats(0.1, 30), st.floats(0.1, 30))
@settings(max_examples=50, deadline=None)
def test_factors_are_learned_from_two_attempts(seed, left, rounded):
    """Errors that are some factors times what is predicted of each kind give back these factors."""
    g = np.random.default_rng(seed)
    units, options, members = 12, 4, 2
    size = np.sort(g.random((units, options)), 1)[:, ::-1] * 100
    error = np.sort(g.random((units, options)), 1)
    error[:, 0] = 0.0
    table = Table(
        size, error, g.random((units, members)) + 0.1, np.repeat([0, 1], 6), np.array([0, 1]), np.zeros(2)
    )
    own = np.repeat([True, False], 6)
    out = np.zeros((units, options), bool)
    out[:6, -1] = True
    out[0, 1:] = True  # whatever is chosen
    kinds = Structure(np.array([True, False]), out, own[:, None] & ~out, (1.0, 1.0))
    choice = within_bytes(table, float(size.sum() / options))
    actual = Structure(kinds.together, kinds.left_out, kinds.rounded, (left, rounded)).apply(table)

    def measured(chosen):
        return chosen, np.sqrt(revalued(actual, chosen).error)

    found = kinds.learned(table, measured(choice), measured(kinds.unrounded(table, choice)))
    now = choice.option[:6]
    if out[np.arange(6), now].any():
        assert found.factors[0] == pytest.approx(left, rel=1e-4)
    if (~out[np.arange(6), now] & (error[np.arange(6), now] > 0)).any():
        assert found.factors[1] == pytest.approx(rounded, rel=1e-4)
