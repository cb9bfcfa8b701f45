"""Which state is kept: each member's own best, the one of least regret, or the best on average."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import training_nets
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.settings.training import Evolution, Stopping, Training
from surgery.storage.keys import StateKey
from surgery.training.loop.keeping import Keeper, separable
from surgery.training.loop.processes import Processes
from surgery.training.loop.starting import start
from surgery.training.loop.state import restore, snapshot
from surgery.training.train import train

TASKS = {"classes": "a", "product": "b"}


def keeper(way: Any, codes: Any = "contexts", costs: Any = None):
    joint = training_nets.build(dropout=0.0)
    start(joint, Training(evolution=Evolution(codes=codes)), 0)
    tasks = [SimpleNamespace(name=name, member=member) for name, member in TASKS.items()]
    trainer = SimpleNamespace(
        joint=joint,
        tasks=tasks,
        weights={"classes": 1 / 3, "product": 2 / 3},
        processes=Processes(None),
        moves=[] if costs is None else [SimpleNamespace(cost_of=costs)],
    )
    return Keeper(cast(Any, trainer), Training(stopping=Stopping(best=way))), joint


def move(joint, generator):
    """Something as a generation does: other rows, another alignment, fewer hypermodules, other private tensors."""
    with torch.no_grad():
        for bank in (joint.dictionary[key] for key in joint.dictionary):
            bank.rows.add_(torch.randn(bank.rows.shape, generator=generator) * 0.1)
            bank.contexts.add_(torch.randn(bank.contexts.shape, generator=generator) * 0.1)
            state = {name: tensor.clone() for name, tensor in bank.state().items()}
            keep = max(1, bank.hypermodules - 3)
            state["psi"] = torch.randint(keep, (bank.locations,), generator=generator)
            state["rows"] = state["rows"][: keep * bank.context]
            state |= {"size": state["size"][:keep]} if "size" in state else {}
            bank.restore(state)
        for name in joint.names:
            for p in joint.private(name).values():
                p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    joint.refresh()


def collapsed(joint):
    return {name: {key: t.clone() for key, t in state.items()} for name, state in joint.collapse().items()}


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=6), st.booleans())
@settings(max_examples=15, deadline=None)
def test_each_member_is_kept_as_it_was_when_it_was_best(losses, fixed):
    kept, joint = keeper("member", "ones" if fixed else "contexts")
    generator, seen = torch.Generator().manual_seed(0), []
    for number, (one, other) in enumerate(losses):
        move(joint, generator)
        seen.append((collapsed(joint), snapshot(joint)))
        kept.judge(number, {"classes": float(one), "product": float(other)})
    best = [[each[side] for each in losses].index(min(each[side] for each in losses)) for side in (0, 1)]
    assert kept.tensors is not None
    restore(joint, kept.tensors)
    now = collapsed(joint)
    for name, number in zip("ab", best, strict=True):
        for key, tensor in seen[number][0][name].items():
            assert torch.equal(now[name][key], tensor), (name, key)
    assert kept.best == max(best)
    assert kept.kept_at(len(losses) - 1) == ({} if best[0] == best[1] else dict(zip("ab", best, strict=True)))
    if best[0] == best[1]:  # what they share stays shared
        for key in joint.dictionary:
            psi, then = joint.dictionary[key].psi, seen[best[0]][1][StateKey("bank", key, "psi")]
            assert torch.equal(psi[:, None] == psi, then[:, None] == then)


LOSSES = [(9.0, 9.0), (1.0, 8.0), (4.0, 2.0), (3.0, 3.0), (8.0, 1.9)]


@pytest.mark.parametrize(("way", "best"), [("all", 4), ("regret", 3)])
def test_one_state_for_all(way, best):
    # Relative to the first ones and weighted, the last has the least mean; the fourth is nowhere three times too large.
    kept, joint = keeper(way)
    wanted = {}
    losses = LOSSES if way == "regret" else [*LOSSES[:-1], (3.0, 1.9)]
    for number, (one, other) in enumerate(losses):
        move(joint, torch.Generator().manual_seed(number))
        state = snapshot(joint)
        kept.judge(number, {"classes": one, "product": other})
        if number == best:
            wanted = state
    assert kept.best == best and kept.kept_at(len(losses) - 1) == {}
    assert kept.tensors is not None and wanted
    assert all(torch.equal(kept.tensors[key], tensor) for key, tensor in wanted.items())
    assert kept.stale == len(losses) - 1 - best


@pytest.mark.parametrize(("cost", "best"), [(0.05, 1), (0.2, 3)])
def test_a_state_that_takes_more_must_be_better_by_its_price(cost, best):
    taken = iter([1.0, 0.0, 1.0, 0.0, 0.5, 0.0, 0.5, 0.0])  # of a, then of b, which shares nothing that costs
    kept, joint = keeper("member", costs=lambda name: cost * next(taken))
    for number, loss in enumerate([1.0, 0.7, 0.8, 0.7 + 0.25 * 1 / 3]):
        move(joint, torch.Generator().manual_seed(number))
        kept.judge(number, {"classes": loss, "product": 2.0 - number})
    assert kept.members["a"][0] == best and kept.members["b"][0] == 3


def test_members_with_one_private_tensor_are_kept_together():
    joint = keeper("member")[1]
    assert separable(joint)
    joint["b"][0].bias = joint["a"][0].bias
    assert not separable(joint)


def test_a_run_says_when_each_member_was_best():
    joint = training_nets.build()
    report = train(joint, training_nets.tasks(), training_nets.CONFIG, cpu=True)
    for member, generation in report.kept.items():
        assert f"{generation + 1} of {member}" in report.kept_words
    joint = training_nets.build()
    config = {**training_nets.CONFIG, "stopping": {"best": "all"}}
    together = train(joint, training_nets.tasks(), config, cpu=True)
    assert together.kept == {} and together.kept_words == str(together.best + 1)
    for name, score in report.scores.items():
        other = together.scores[name].loss
        assert score.loss is not None and other is not None and score.loss <= other + 1e-6


def test_members_keep_their_own_best_unless_they_share_from_the_start():
    assert Training(evolution={"price": 0.3}).keeps == Training().keeps == "member"
    assert Training(evolution={"start": "order"}).keeps == "regret"
    assert Training(evolution={"price": 0.3}, stopping={"best": "regret"}).keeps == "regret"
