"""Sensitivity: contests of small tasks are decided as fast as large ones, and a resumed run is an unbroken one."""

import pytest
import torch
import training_nets
from hypothesis import given, settings
from hypothesis import strategies as st

import surgery
from surgery.errors import SurgeryError
from surgery.methods.hypermodules.bank import HypermoduleBank
from surgery.methods.hypermodules.evolution import open_contest
from surgery.methods.hypermodules.sensitivity import LEAST, normalise, relative_sensitivity
from surgery.settings.training import Training
from surgery.training.train import train


def after_steps(factor, count=3):
    """A bank of two equal locations in a contest, the loss of the second multiplied by a factor, and its optimizer."""
    g = torch.Generator().manual_seed(0)
    own, rival, wanted = torch.randn(3, 6, generator=g).unbind()
    bank = HypermoduleBank(
        (1, 6), torch.stack([own, own, rival]), torch.tensor([0, 1]), torch.full((2, 1), 0.7), 3
    )
    bank.contest = open_contest(bank, torch.tensor([0, 1]), torch.tensor([[2], [2]]), 0.5)
    optimizer = torch.optim.Adam([bank.contexts], lr=1e-4, eps=1e-12)
    for _ in range(count):
        bank.zero_grad()
        errors = (bank.blocks() - wanted).square().sum(1)
        (errors[0] + factor * errors[1]).backward()
        optimizer.step()
    return bank, optimizer


@given(st.floats(-2, 2).map(lambda power: 10.0**power))
@settings(max_examples=12, deadline=None)
def test_the_size_of_a_task_does_not_change_its_contest(factor):
    bank, optimizer = after_steps(factor)
    before = bank.contest.soft.grad.clone()
    assert before[1, 1] == pytest.approx(factor * float(before[0, 1]), rel=1e-3)
    normalise(optimizer, bank)
    torch.testing.assert_close(bank.contest.soft.grad[1], bank.contest.soft.grad[0], rtol=1e-3, atol=0)
    sensitivity = relative_sensitivity(optimizer, bank)
    assert float(sensitivity.mean()) == pytest.approx(1, rel=1e-5)  # the bank's mean stays as fast as it was


def test_what_has_no_gradient_is_left_alone():
    bank, optimizer = after_steps(0.0)
    assert float(relative_sensitivity(optimizer, bank)[1]) == pytest.approx(LEAST)
    bank, optimizer = after_steps(1.0)
    before = bank.contest.soft.grad.clone()
    normalise(torch.optim.Adam([bank.contexts]), bank)  # no step was taken
    assert torch.equal(bank.contest.soft.grad, before)
    bank.contest = None
    normalise(optimizer, bank)


CONFIG = {
    "steps": 4, "generations": 3, "final": 1, "optimizer": {"soft_eps": 1e-3},
    "evolution": {"fraction": 0.5, "alpha": 0.5, "normalise": True},
}  # fmt: skip


def test_a_run_that_was_interrupted_ends_where_an_unbroken_one_does(tmp_path):
    whole = training_nets.build(dropout=0.0, block=(4, 4), context=1)
    train(whole, training_nets.tasks(), CONFIG, cpu=True)
    plain = training_nets.build(dropout=0.0, block=(4, 4), context=1)
    other = {**CONFIG, "evolution": {**CONFIG["evolution"], "normalise": False}}
    train(plain, training_nets.tasks(), other, cpu=True)
    broken = training_nets.build(dropout=0.0, block=(4, 4), context=1)
    with training_nets.interrupted_after(6):
        train(broken, training_nets.tasks(), CONFIG, folder=tmp_path / "run", cpu=True)
    again = training_nets.build(dropout=0.0, block=(4, 4), context=1)
    train(again, training_nets.tasks(), CONFIG, folder=tmp_path / "run", resume=True, cpu=True)
    key = "4x4-float32"
    for name, tensor in whole.dictionary[key].state().items():
        assert torch.equal(tensor, again.dictionary[key].state()[name])
    assert not torch.equal(whole.dictionary[key].contexts, plain.dictionary[key].contexts)


@pytest.mark.parametrize(
    ("train_settings", "words"),
    [
        ({"evolution": {"normalise": True, "codes": "ones"}}, "needs codes contexts, found ones"),
        ({"evolution": {"normalise": True}, "optimizer": {"name": "sgd"}}, "adam or adamw, found sgd"),
    ],
)
def test_settings_that_cannot_be_followed_are_refused(train_settings, words):
    with pytest.raises((SurgeryError, ValueError), match=words):
        Training(**train_settings)
    with pytest.raises(surgery.PlanError, match=words):
        train(training_nets.build(), training_nets.tasks(), train_settings, cpu=True)
