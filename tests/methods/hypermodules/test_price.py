"""Price: what an alternative saves is what the size of the bank changes by, and evolution at a price keeps fewer."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import training_nets
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.methods.hypermodules.moves import HypermoduleMoves
from surgery.methods.hypermodules.price import blocks_taken, saved_blocks
from surgery.settings.training import Training
from surgery.training.train import train


def taken_by_all(psi, hypermodules, context):
    return sum(min(int((psi == k).sum()), context) for k in range(hypermodules))


@given(st.integers(0, 999), st.integers(1, 4), st.integers(2, 6))
@settings(max_examples=40, deadline=None)
def test_what_is_saved_is_what_the_bank_takes_less(seed, context, hypermodules):
    generator = torch.Generator().manual_seed(seed)
    psi = torch.randint(hypermodules, (12,), generator=generator)
    chosen = torch.tensor([0, 3, 7])
    rivals = torch.randint(hypermodules, (3, 2), generator=generator)
    candidates = torch.cat([psi[chosen].unsqueeze(1), rivals], 1)
    saved = saved_blocks(psi, hypermodules, context, chosen, candidates)
    before = taken_by_all(psi, hypermodules, context)
    for row, location in enumerate(chosen):
        for column, candidate in enumerate(candidates[row]):
            changed = psi.clone()
            changed[location] = candidate
            assert float(saved[row, column]) == before - taken_by_all(changed, hypermodules, context)


@given(st.integers(0, 999), st.integers(1, 4), st.integers(2, 6))
@settings(max_examples=40, deadline=None)
def test_locations_divide_what_their_hypermodules_take(seed, context, hypermodules):
    psi = torch.randint(hypermodules, (12,), generator=torch.Generator().manual_seed(seed))
    found = blocks_taken(psi, hypermodules, context)
    assert float(found.sum()) == pytest.approx(taken_by_all(psi, hypermodules, context))
    for k in psi.unique():
        assert len(found[psi == k].unique()) == 1


def test_members_pay_for_what_the_dictionary_takes():
    joint = training_nets.build(dropout=0.0, block=(4, 4), context=1)
    config = {
        "steps": 5, "generations": 6, "final": 1, "optimizer": {"lr": 0.01, "soft_lr": 0.3},
        "evolution": {"price": 100.0, "fraction": 0.5, "alpha": 0.5, "epsilon": 0.0}, "stopping": {"keep": "last"},
    }  # fmt: skip
    report = train(joint, training_nets.tasks(), config, cpu=True)
    moves = SimpleNamespace(
        config=Training.model_validate(config),
        joint=joint,
        banks={k: joint.dictionary[k] for k in joint.dictionary},
    )
    costs = [HypermoduleMoves.cost_of(cast(Any, moves), name) for name in joint.names]
    assert all(cost > 0 for cost in costs)
    banks = list(moves.banks.values())
    taken = sum(b.width * taken_by_all(b.psi, b.hypermodules, b.context) for b in banks)
    assert sum(costs) / 100.0 == pytest.approx(taken / sum(b.width * b.locations for b in banks))
    assert sum(costs) / 100.0 < report.numbers[0] / report.numbers[1]  # which count coefficients, too


def test_at_a_high_price_fewer_parameters_are_kept():
    kept = []
    for price in (0.0, 100.0):
        joint = training_nets.build(dropout=0.0, block=(4, 4), context=1)
        config = {
            "steps": 5, "generations": 6, "final": 1, "optimizer": {"lr": 0.01, "soft_lr": 0.3},
            "evolution": {"price": price, "fraction": 0.5, "alpha": 0.5, "epsilon": 0.0},
        }  # fmt: skip
        report = train(joint, training_nets.tasks(), config, cpu=True)
        assert report.best == 6 or not price  # states before the last phase are larger
        kept.append(report.numbers[0] / report.numbers[1])
    assert kept[1] < 0.8 * kept[0]
