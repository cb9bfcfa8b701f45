"""What evolution is compared with: contests judged by rewards, and matrix atoms that all locations mix."""

import doctest

import pytest
import torch
import training_nets
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.errors import PlanError
from surgery.methods.hypermodules import atoms, rewards
from surgery.methods.hypermodules.atoms import principal_atoms
from surgery.methods.hypermodules.contest_state import wrong_contest
from surgery.methods.hypermodules.rewards import LEAST, POPULATION, natural_step
from surgery.settings.training import Training
from surgery.training.loop.starting import start
from surgery.training.loop.trainer import Trainer
from surgery.training.train import train


def test_examples_in_docstrings_hold():
    assert doctest.testmod(rewards).failed == doctest.testmod(atoms).failed == 0


@given(st.integers(0, 999))
@settings(max_examples=15, deadline=None)
def test_a_population_moves_probabilities_to_what_cost_least(seed):
    g = torch.Generator().manual_seed(seed)
    soft = torch.randn(5, 3, generator=g)
    tried = torch.randint(3, (POPULATION, 5), generator=g)
    costs = torch.rand(POPULATION, 5, generator=g)
    after = natural_step(soft, tried, costs, 0.1).exp()
    probability = soft.softmax(1)
    wanted = probability.clone()  # from the paper's text, a location and a draw at a time
    for n in range(5):
        order = costs[:, n].argsort().tolist()
        for p in range(POPULATION):
            utility = 1 - 2 * order.index(p) / (POPULATION - 1)
            for a in range(3):
                wanted[n, a] += 0.1 * utility * ((tried[p, n] == a).float() - probability[n, a]) / POPULATION
    wanted = wanted.clamp_min(LEAST)
    torch.testing.assert_close(after, wanted / wanted.sum(1, keepdim=True))


JUDGED = {
    "steps": 20, "generations": 2, "final": 1, "stopping": {"keep": "last"},
    "evolution": {"judge": "rewards", "reward_rate": 0.5, "fraction": 1.0, "price": 0.3, "alpha": 0.5},
}  # fmt: skip


def run(folder=None, config=JUDGED, resume=False):
    joint = training_nets.build(dropout=0.0)
    train(joint, training_nets.tasks(), config, folder=folder, resume=resume, cpu=True, seed=3)
    return joint.dictionary["8x8-float32"]


def test_one_alternative_is_generated_in_a_step_and_a_population_decides():
    joint, config = training_nets.build(dropout=0.0), Training.model_validate(JUDGED)
    start(joint, config, 3)
    trainer = Trainer(joint, training_nets.tasks(), config, 3, Accelerator(cpu=True))
    trainer.moves[0].before_generation()
    bank = joint.dictionary["8x8-float32"]
    contest, tried, moved = bank.contest, [], []
    for _ in range(POPULATION + 1):
        before = contest.soft.detach().clone()
        trainer.train_step()
        psi = bank.psi.clone()
        psi[contest.chosen] = contest.candidates.gather(1, contest.drawn.unsqueeze(1)).squeeze(1)
        factors = bank.factors_of(torch.arange(bank.locations), psi.unsqueeze(1))
        hard = torch.einsum("lc,lcd->ld", bank.contexts.detach() * factors, bank.basis[psi])
        torch.testing.assert_close(bank.blocks().detach(), hard)
        tried.append(len(contest.tried))
        moved.append(not torch.equal(before, contest.soft.detach()))
    assert tried == [*range(POPULATION), 0]
    assert moved == [False] * POPULATION + [True]


def test_a_run_that_was_interrupted_within_a_population_ends_where_an_unbroken_one_does(
    tmp_path,
):
    whole = run()
    with training_nets.interrupted_after(13):
        run(folder=tmp_path / "run")
    again = run(folder=tmp_path / "run", resume=True)
    for name, tensor in whole.state().items():
        assert torch.equal(tensor, again.state()[name])


def test_atoms_are_mixed_by_every_location_and_learn():
    blocks = torch.randn(30, 12) * torch.rand(30, 1)
    found, mixtures = principal_atoms(blocks, 12)
    torch.testing.assert_close(mixtures @ found, blocks)  # a whole basis
    found, mixtures = principal_atoms(blocks, 5)
    torch.testing.assert_close((mixtures @ found).norm(dim=1), blocks.norm(dim=1))
    joint = training_nets.build(dropout=0.0, context=3)
    config = Training.model_validate({"evolution": {"start": "atoms", "change": "none"}})
    start(joint, config, 3)
    bank = joint.dictionary["8x8-float32"]
    assert (bank.hypermodules, bank.context, len(bank.rows)) == (1, 3, 3)
    before = bank.blocks().detach()
    trainer = Trainer(joint, training_nets.tasks(), config, 3, Accelerator(cpu=True))
    for _ in range(3):
        trainer.train_step()
    moved = (bank.blocks().detach() - before).abs().mean() / 3
    assert (
        config.optimizer.lr * 0.2 < moved < config.optimizer.lr * 1.2
    )  # as far as plain training moves weights


@pytest.mark.parametrize(
    ("evolution", "said"),
    [
        ({"start": "atoms"}, "set change none and codes contexts, found evolve"),
        ({"start": "atoms", "change": "none", "codes": "ones"}, "found none and ones"),
        ({"judge": "rewards", "merges": 0.5}, "'merges' needs soft weights that are trained"),
        ({"judge": "rewards", "normalise": True}, "'normalise' needs soft weights that are trained"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(evolution, said):
    with pytest.raises(ValueError, match=said):
        Training.model_validate({"evolution": evolution})


def test_more_atoms_than_a_block_has_elements_are_refused():
    joint = training_nets.build(dropout=0.0, block=(1, 2), context=3)
    config = Training.model_validate({"evolution": {"start": "atoms", "change": "none"}})
    with pytest.raises(PlanError, match="asks for 3 of 1x2"):
        start(joint, config, 3)


@pytest.mark.parametrize(
    ("tried", "costs", "said"),
    [
        (torch.zeros(2, 2, dtype=torch.long), None, "what was tried at what costs"),
        (torch.zeros(2, 2, dtype=torch.long), torch.zeros(2, 3), "less than 8 draws of its 2 locations"),
        (torch.zeros(8, 2, dtype=torch.long), torch.zeros(8, 2), "less than 8 draws"),
        (torch.zeros(2, 2), torch.zeros(2, 2), "less than 8 draws"),
        (torch.full((2, 2), 2), torch.zeros(2, 2), "among its 2 alternatives, found up to 2"),
    ],
)
def test_draws_that_cannot_be_are_found(tried, costs, said):
    psi = torch.tensor([0, 1, 2])
    parts = {"chosen": torch.tensor([0, 2]), "candidates": torch.tensor([[0, 1], [2, 1]])}
    parts |= {"soft": torch.zeros(2, 2), "tried": tried}
    if costs is not None:
        parts["costs"] = costs
    assert any(said in wrong for wrong in wrong_contest(parts, psi, 3, 1))
    parts["tried"], parts["costs"] = torch.zeros(2, 2, dtype=torch.long), torch.zeros(2, 2)
    assert not list(wrong_contest(parts, psi, 3, 1))
