"""Batches in pieces: moments of derivatives are those of all examples, and nothing is divided that belongs together."""

import pytest
import torch
from torch import nn

import surgery
from surgery.fitting import pieces, sensitivity
from surgery.fitting.trial import Trial
from surgery.geometry.views import CanonicalView
from surgery.members.member import Inputs


class Centred(nn.Linear):
    """Outputs of an example depend on all others."""

    def forward(self, x):
        found = super().forward(x)
        return found - found.mean(0)


class Unbatched(nn.Linear):
    def forward(self, x):
        return super().forward(x).sum(0)


def trial(module, *batches):
    member = surgery.load_member(module, name="net", inputs=batches[0])
    state = member.module.state_dict()
    given = [each if isinstance(each, Inputs) else Inputs((each,)) for each in batches]
    return Trial(member, state, {name: (name,) for name in state}, given, torch.device("cpu"))


def rows(count, seed=0):
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))


def test_pieces_are_the_examples_in_their_order():
    x = rows(21)
    found = pieces.in_pieces(net := trial(nn.Linear(6, 5), x), net.probes)
    assert [len(each.args[0]) for each in found] == [7, 7, 7]
    assert torch.cat([each.args[0] for each in found]).equal(x)


def test_small_batches_stay_as_they_are():
    net = trial(nn.Linear(6, 5), rows(8), rows(3))
    assert all(a is b for a, b in zip(pieces.in_pieces(net, net.probes), net.probes, strict=True))


@pytest.mark.parametrize("kind", [Centred, Unbatched])
def test_what_belongs_together_is_not_divided(kind):
    net = trial(kind(6, 5), rows(16))
    assert pieces.in_pieces(net, net.probes) is net.probes


def test_tensors_of_other_first_axes_are_not_divided():
    assert pieces.batch_of(Inputs((rows(16), torch.ones(1)))) is None
    assert pieces.batch_of(Inputs((rows(16), torch.tensor(2.0)))) is None
    assert pieces.batch_of(Inputs((rows(16),), {"mask": torch.ones(16, 2), "deep": True})) == 16


def test_one_draw_in_pieces_is_nearer_to_the_true_metric(monkeypatch):
    x = rows(256)
    net, views = trial(nn.Linear(6, 5, bias=False), x), {"weight": CanonicalView.of("o i -> 1 o i", (5, 6))}
    with torch.no_grad():
        power = net.module(x).square().sum()
    true = 5 * x.T @ x / power  # H of a linear map whose outputs all count the same

    def far():
        metrics = [sensitivity.metrics(net, seed, views, samples=1)[1]["weight"] for seed in range(8)]
        return sum(float((each.into - true).norm() / true.norm()) for each in metrics) / len(metrics)

    divided = far()
    monkeypatch.setattr(pieces, "EXAMPLES", 256)
    assert divided < 0.5 * far()
    assert divided < 0.2
