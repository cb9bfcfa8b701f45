"""Splits: no block changes, optimizer rows follow, and an interrupted run ends where an unbroken one does."""

import doctest

import torch
import training_nets
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.methods.hypermodules import splitting
from surgery.methods.hypermodules.bank import HypermoduleBank
from surgery.methods.hypermodules.splitting import split
from surgery.training.loop.optimizers import carry
from surgery.training.train import train

KEY = "4x4-float32"


@given(st.integers(0, 999), st.booleans(), st.booleans())
@settings(max_examples=15, deadline=None)
def test_a_split_is_exact_and_the_optimizer_follows(seed, factors, kept):
    g = torch.Generator().manual_seed(seed)
    psi = torch.cat([torch.arange(5), torch.randint(5, (15,), generator=g)])
    bank = HypermoduleBank((1, 6), torch.randn(10, 6, generator=g), psi, torch.randn(20, 2, generator=g), 5)
    if factors:
        bank.set_factors(torch.rand(20, generator=g) + 0.5, torch.rand(5, generator=g) + 0.5)
    if kept:
        bank.kept = torch.arange(20) < 1
    optimizer = torch.optim.Adam([bank.rows, bank.contexts])
    wanted = torch.randn(20, 6, generator=g)
    bank.pull = torch.zeros(20, 6)
    blocks = bank.blocks()
    (blocks - wanted).square().sum().backward()
    torch.testing.assert_close(bank.pull, 2 * (blocks.detach() - wanted))  # the gradients of all blocks
    optimizer.step()
    before, moments = bank.blocks().detach(), optimizer.state[bank.rows]["exp_avg"].clone()
    resized = split(bank, 0.0)
    for each in resized:
        carry(optimizer, each)
    assert torch.equal(bank.blocks().detach(), before)
    assert bool(resized) == (bank.hypermodules > 5)
    source = resized[0].source if resized else torch.arange(10)
    assert torch.equal(optimizer.state[bank.rows]["exp_avg"], moments[source])
    assert len(set(bank.psi.tolist())) == bank.hypermodules  # both halves have users
    assert torch.equal(source[::2][bank.psi] // 2, psi)
    assert not kept or torch.equal(bank.psi == 0, psi == 0)  # what must not change is not split


def test_examples_in_docstrings_hold():
    assert doctest.testmod(splitting).failed == 0


CONFIG = {
    "steps": 3, "generations": 3, "final": 1, "stopping": {"keep": "last"},
    "evolution": {"start": "order", "change": "none", "splits": 0.0},
}  # fmt: skip


def run(config=CONFIG, **options):
    joint = training_nets.build(dropout=0.0, block=(4, 4), context=2)
    train(joint, training_nets.tasks(), config, cpu=True, **options)
    return joint.dictionary[KEY]


def test_users_that_pull_apart_get_hypermodules_of_their_own_and_runs_resume(tmp_path):
    whole = run()
    shared = run({**CONFIG, "evolution": {"start": "order", "change": "none"}})
    assert shared.hypermodules < whole.hypermodules <= whole.locations
    never = run({**CONFIG, "evolution": {"start": "order", "change": "none", "splits": 0.999999}})
    assert never.hypermodules < whole.hypermodules
    with training_nets.interrupted_after(5):
        run(folder=tmp_path / "run")
    again = run(folder=tmp_path / "run", resume=True)
    for name, tensor in whole.state().items():
        assert torch.equal(tensor, again.state()[name])
