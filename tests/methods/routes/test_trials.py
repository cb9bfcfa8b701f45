"""Trials of close choices: what decides which layer is left out, and leaves nothing else behind."""

import random
import statistics
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from routed import IDS, bert, joined, run, train

import surgery
from surgery.methods.routes import measuring
from surgery.methods.routes.groups import routes_in
from surgery.training.loop.trainer import Trainer
from surgery.training.tasks.streams import Batches

CONFIG = {"steps": 3, "burn_in": 1, "generations": 1, "final": 1,
          "optimizer": {"lr": 0.003, "schedule": "linear", "warmup": 5},
          "evolution": {"change": "none", "codes": "ones", "start": "given"}}  # fmt: skip


class Wavering:
    """A mean square that draws from all global generators, and counts steps."""

    def __init__(self):
        self.calls = torch.zeros(1)

    def __call__(self, output, batch):
        self.calls += torch.is_grad_enabled()
        drawn = torch.rand(()) + random.random() + np.random.rand()
        return (output.last_hidden_state - batch.target).square().mean() * (1 + drawn)

    def state_dict(self):
        return {"calls": self.calls}

    def load_state_dict(self, state):
        self.calls = state["calls"].clone()


def one_run(trials):
    """Which layers stay, what a loss counts, and all weights; another member's route samples meanwhile."""
    own = [
        surgery.load_member(bert(dropout=0.3), name="text", inputs=IDS),
        surgery.load_member(bert(2), name="other", inputs=IDS),
    ]
    joint = surgery.join(own, surgery.plan_modules(own, "routes", {"layers": 3, "trials": trials}))
    with torch.no_grad():
        target = bert(1)(IDS).last_hidden_state
    loss = Wavering()
    tasks = [
        surgery.Task("text", "text", Batches(IDS, target, 3), loss),
        surgery.Task("other", "other", Batches(IDS, IDS, 3), {"distillation": 1.0}),
    ]
    report = surgery.train(joint, tasks, CONFIG, cpu=True)
    weights = {f"{name}.{key}": x for name in joint.names for key, x in joint[name].state_dict().items()}
    return report.methods["routes"]["chosen"], loss.calls, weights


@pytest.mark.slow
def test_trials_that_confirm_the_choice_leave_the_run_as_it_is_bit_for_bit(monkeypatch):
    monkeypatch.setattr(measuring, "_SURE", float("inf"))
    trained, compute, tried, rates = measuring._trained, Trainer.compute, [], {True: [], False: []}
    inside = [False]

    def confirming(*args):
        inside[0] = True
        trained(*args)
        inside[0] = False
        tried.append(args)
        return float(len(tried))  # the first, which the untrained losses choose, stays best

    def watched(trainer, batches):
        rates[inside[0]].append({group["lr"] for group in trainer.optimizer.param_groups})
        return compute(trainer, batches)

    chosen, calls, weights = one_run(0)
    monkeypatch.setattr(measuring, "_trained", confirming)
    monkeypatch.setattr(Trainer, "compute", watched)
    again, counted, found = one_run(2)
    assert tried and again == chosen and torch.equal(counted, calls)
    assert rates[True] == rates[False][3:5] * len(tried) and rates[False][3] != rates[False][4]
    assert set(found) == set(weights)
    assert not [key for key, x in weights.items() if not torch.equal(found[key], x)]


def test_a_race_finds_the_choice_of_the_lowest_mean_that_the_first_batches_do_not_tell(monkeypatch):
    """Losses scatter by ten times the difference of two choices, alike in both, and eight batches prefer the worse."""
    drawn = torch.Generator().manual_seed(5)
    noise = torch.randn(64, generator=drawn)
    own = 0.02 * torch.randn(2, 64, generator=drawn)
    own[0, :8] -= 0.01
    own[0, 8:] += 0.02
    losses = [1 + 0.1 * noise + own[0], 1 + 0.1 * noise + own[1], torch.full((64,), 3.0)]
    asked, taken = [], []

    class Read:
        def of(self, tasks, begin, end):
            asked.append(end)
            return {"": range(begin, end)}

    @contextmanager
    def taking(gates, row, on):
        taken.append(on[0])
        yield

    monkeypatch.setattr(measuring, "_taking", taking)
    monkeypatch.setattr(measuring, "_loss", lambda *args: float(losses[taken[-1]][args[2][""].start]))
    gates = [SimpleNamespace(settings=SimpleNamespace(measure=2))]
    race: Any = measuring._race
    close, means, looks = race(None, gates, 0, [[0], [1], [2]], [None], Read())
    assert losses[0][:8].mean() < losses[1][:8].mean()
    assert close == [1] and means[1] < means[0] < means[2]
    assert max(asked) == 32 and looks == 3 * 2 + 2 * 30


@given(st.integers(0, 10**6), st.integers(2, 6), st.sampled_from([2, 8, 32]))
def test_what_is_close_is_told_by_paired_differences(seed, choices, count):
    losses = (
        torch.rand(choices, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.5
    )
    found = measuring.still_close(losses)
    means = [sum(row) / count for row in losses.tolist()]
    best = min(range(choices), key=means.__getitem__)
    slow = []
    for place in sorted(range(choices), key=means.__getitem__):
        more = [a - b for a, b in zip(losses[place].tolist(), losses[best].tolist(), strict=True)]
        scatter = statistics.stdev(more) / count**0.5
        lost = count >= 8 and statistics.mean(more) > 2 * scatter
        if means[place] <= 1.25 * means[best] and not lost:
            slow.append(place)
    assert found == slow and found[0] == best


def test_choices_whose_losses_are_not_finite_lose():
    bad = torch.full((1, 8), torch.inf)
    assert measuring.still_close(torch.cat([bad, torch.ones(1, 8), bad])) == [1]
    assert measuring.still_close(bad.repeat(3, 1)) == [0]


@pytest.mark.slow
def test_trials_decide_between_close_choices_and_leave_nothing_behind(monkeypatch):
    monkeypatch.setattr(
        measuring, "_SURE", float("inf")
    )  # the batches are equal, so that they tell choices apart

    def one(**settings):
        joint = joined({"layers": 3, **settings})
        before = {
            key: value.clone() for key, value in joint["text"].state_dict().items() if "gates" not in key
        }
        task = surgery.Task(
            "text", "text", Batches(IDS, run(bert(1)), 3), "mse"
        )  # none of the layers is missed
        report = train(joint, task, burn_in=0, steps=1, generations=1, final=0, optimizer={"lr": 1e-12})
        after = joint["text"].state_dict()
        assert all(torch.allclose(after[key], value, atol=1e-6) for key, value in before.items())
        (depths,) = routes_in(joint["text"]).values()
        return report.methods["routes"]["measured"]["text:encoder.layer.*"][""], [g.table() for g in depths]

    plain, _ = one()
    found, p = one(trials=2)
    assert found["passes"] > plain["passes"]
    assert found["losses"] == pytest.approx(plain["losses"], rel=1e-3)  # at such a rate a trial moves nothing
    assert [float(each) < 0.5 for each in p] == [depth in found["left"] for depth in range(4)]
