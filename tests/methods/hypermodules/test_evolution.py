"""Evolution of a bank: it grows, is decided, shrinks, and the optimizer's rows follow."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from surgery.methods.hypermodules.bank import HypermoduleBank
from surgery.methods.hypermodules.evolution import conclude, contend, inherit, prune, redraw, regroup
from surgery.settings.training import Evolution
from surgery.training.loop.optimizers import carry

LOCATIONS, CONTEXT, WIDTH = 24, 2, 5


def make_bank(locations: int = LOCATIONS, seed: int = 0) -> HypermoduleBank:
    """One hypermodule for each location, the pessimistic start."""
    g = torch.Generator().manual_seed(seed)
    rows = torch.randn(locations * CONTEXT, WIDTH, generator=g)
    contexts = torch.randn(locations, CONTEXT, generator=g)
    return HypermoduleBank((1, WIDTH), rows, torch.arange(locations), contexts, locations)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def stepped(bank: HypermoduleBank) -> torch.optim.Adam:
    """An optimizer with a history of its own for every row."""
    optimizer = torch.optim.Adam([bank.rows, bank.contexts], lr=0.01)
    (bank.blocks() * torch.arange(1.0, bank.locations + 1).unsqueeze(1)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def set_winner(bank: HypermoduleBank, column: int) -> None:
    """Let the alternative in this column win everywhere."""
    assert bank.contest is not None
    with torch.no_grad():
        bank.contest.soft.fill_(-20)
        bank.contest.soft[:, column] = 20


EVERY = [
    Evolution(challengers=3, epsilon=0.3),
    Evolution(challengers=3, draw="uniform", fraction=1.0),
    Evolution(challengers=3, draw="explain", contexts="fitted"),
]


@pytest.mark.parametrize("evolution", EVERY)
@pytest.mark.parametrize("seed", range(3))
def test_after_a_decision_every_hypermodule_is_used_and_every_location_has_one(
    evolution: Evolution, seed: int
) -> None:
    bank, generator = make_bank(), seeded(seed)
    for generation in range(8):
        contend(bank, evolution, 0.7, LOCATIONS, generator)
        assert bank.contest is not None
        with torch.no_grad():
            bank.contest.soft.add_(torch.randn(bank.contest.soft.shape, generator=generator))
        conclude(bank)
        assert bank.contest is None
        assert torch.equal(torch.unique(bank.psi), torch.arange(bank.hypermodules))
        assert bank.rows.shape == (bank.hypermodules * CONTEXT, WIDTH)
        assert bank.hypermodules <= LOCATIONS, generation
        assert bank.blocks().isfinite().all()


def test_the_bank_shrinks_where_challengers_win() -> None:
    bank, generator, sizes = make_bank(), seeded(0), [LOCATIONS]
    for _ in range(12):
        contend(bank, Evolution(challengers=1, epsilon=0.0), 0.5, LOCATIONS, generator)
        set_winner(bank, 1)
        conclude(bank)
        sizes.append(bank.hypermodules)
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < LOCATIONS / 3


def test_the_bank_stays_where_incumbents_win() -> None:
    bank = make_bank()
    rows, blocks = bank.rows, bank.blocks().detach()
    contend(bank, Evolution(challengers=2, epsilon=0.5), 0.5, 10 * LOCATIONS, seeded(0))
    assert bank.hypermodules > LOCATIONS
    set_winner(bank, 0)
    _, moved = conclude(bank)
    assert moved == 0
    assert torch.equal(bank.rows, rows)
    assert torch.equal(bank.blocks(), blocks)


def test_moves_are_counted() -> None:
    bank = make_bank()
    before = bank.psi.clone()
    contend(bank, Evolution(challengers=1, epsilon=0.0), 0.5, LOCATIONS, seeded(0))
    assert bank.contest is not None
    wanted = before.clone()
    wanted[bank.contest.chosen] = bank.contest.candidates[:, 1]
    set_winner(bank, 1)
    assert conclude(bank)[1] == int((wanted != before).sum()) > 0


def test_what_a_location_generates_is_what_its_winner_generates() -> None:
    """Removing hypermodules renumbers the others and changes no block."""
    bank = make_bank()
    contend(bank, Evolution(challengers=1, epsilon=0.2), 0.5, 2 * LOCATIONS, seeded(1))
    assert bank.contest is not None
    psi, _ = bank.psi.clone(), set_winner(bank, 1)
    psi[bank.contest.chosen] = bank.contest.candidates[:, 1]
    basis = bank.rows.detach().view(-1, CONTEXT, WIDTH)[psi]
    wanted = torch.einsum("lc,lcd->ld", bank.contexts.detach(), basis)
    conclude(bank)
    assert torch.allclose(bank.blocks(), wanted, atol=1e-6)


def test_new_hypermodules_never_exceed_the_capacity() -> None:
    bank = make_bank()
    contend(bank, Evolution(challengers=4, epsilon=1.0, fraction=1.0), 0.5, LOCATIONS + 3, seeded(0))
    assert bank.hypermodules == LOCATIONS + 3
    bank = make_bank()
    assert contend(bank, Evolution(challengers=4, epsilon=1.0), 0.5, LOCATIONS, seeded(0)) == []


def test_a_fitted_winner_leaves_its_context_to_the_location() -> None:
    bank = make_bank()
    before = bank.contexts.detach().clone()
    contend(bank, Evolution(challengers=1, epsilon=0.0, contexts="fitted"), 0.5, LOCATIONS, seeded(0))
    assert bank.contest is not None and bank.contest.contexts is not None
    chosen, fitted = bank.contest.chosen, bank.contest.contexts.detach()[:, 0].clone()
    set_winner(bank, 1)
    conclude(bank)
    wanted = before.clone()
    wanted[chosen] = fitted
    assert torch.equal(bank.contexts, wanted)


@pytest.mark.parametrize("challengers", [1, 3])
def test_only_challengers_that_explain_enough_compete(challengers: int) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.eye(4).repeat(2, 1)  # hypermodules 0 and 4, 1 and 5, ... generate the same blocks
    contexts = torch.ones(8, 1)
    bank = HypermoduleBank((2, 2), rows, torch.arange(8), contexts, 8)
    settings = Evolution(fraction=1.0, challengers=challengers, draw="uniform", least=0.5, epsilon=0.0)
    seen = 0
    for _ in range(20):
        contend(bank, settings, 0.5, 8, generator)
        if bank.contest is None:
            continue
        candidates = bank.contest.candidates
        assert bool((candidates % 4 == candidates[:, :1] % 4).all())
        seen += len(candidates)
        bank.contest = None
    assert 20 < seen < 160
    with_noise = HypermoduleBank((2, 2), torch.eye(4), torch.arange(4), torch.ones(4, 1), 4)
    contend(with_noise, settings.model_copy(update={"draw": "explain"}), 0.5, 4, generator)
    assert with_noise.contest is None and conclude(with_noise) == ([], 0)


def test_decisions_come_from_the_seed_alone() -> None:
    def evolve() -> tuple[Tensor, Tensor]:
        bank, generator = make_bank(), seeded(7)
        for _ in range(3):
            torch.rand(1)  # whatever else draws
            contend(bank, Evolution(challengers=2, draw="explain", epsilon=0.1), 0.6, LOCATIONS, generator)
            conclude(bank)
        return bank.psi, bank.rows

    assert all(torch.equal(a, b) for a, b in zip(evolve(), evolve(), strict=True))


# -- optimizer ----------------------------------------------------------------------------------------------


def test_adam_s_rows_follow_their_hypermodules() -> None:
    bank = make_bank()
    optimizer = stepped(bank)
    history = {
        key: optimizer.state[bank.rows][key].clone().view(LOCATIONS, CONTEXT, WIDTH)
        for key in ("exp_avg", "exp_avg_sq")
    }
    step = optimizer.state[bank.rows]["step"].clone()
    contend(bank, Evolution(challengers=1, epsilon=0.0), 0.5, LOCATIONS, seeded(0))
    set_winner(bank, 1)
    assert bank.contest is not None
    psi = bank.psi.clone()
    psi[bank.contest.chosen] = bank.contest.candidates[:, 1]
    old = bank.rows
    resized, _ = conclude(bank)
    for each in resized:
        carry(optimizer, each)
    assert old not in optimizer.state
    assert optimizer.param_groups[0]["params"] == [bank.rows, bank.contexts]
    kept = torch.unique(psi)
    assert len(kept) < LOCATIONS
    for key, value in history.items():
        assert torch.equal(optimizer.state[bank.rows][key].view(-1, CONTEXT, WIDTH), value[kept])
    assert optimizer.state[bank.rows]["step"] == step


def contested() -> tuple[HypermoduleBank, torch.optim.Optimizer, nn.Parameter]:
    """A bank with a history, an open contest everywhere, and the contexts that challengers bring."""
    bank = make_bank()
    optimizer = stepped(bank)
    contend(bank, Evolution(fraction=1.0, contexts="fitted", draw="uniform"), 0.5, LOCATIONS, seeded(0))
    assert bank.contest is not None and bank.contest.contexts is not None
    optimizer.add_param_group({"params": [bank.contest.contexts]})
    return bank, optimizer, bank.contest.contexts


def test_a_context_that_a_challenger_brought_brings_its_history() -> None:
    bank, optimizer, rivals = contested()
    for step in range(3):
        rivals.grad = torch.randn(rivals.shape, generator=seeded(step))
        bank.contexts.grad = torch.randn(bank.contexts.shape, generator=seeded(9))
        optimizer.step()

    def moments(parameter: torch.Tensor) -> Tensor:
        state = optimizer.state[parameter]
        return torch.stack([
            state[name] / (1 - beta ** state["step"]) for name, beta in (("exp_avg", 0.9), ("exp_avg_sq", 0.999))
        ])  # fmt: skip

    expected = moments(rivals)[:, :, 0]
    set_winner(bank, 1)
    assert bank.contest is not None
    won = bank.contest.winners()[0]  # all but those whose challenger is the incumbent
    assert len(won) > LOCATIONS // 2
    inherit(optimizer, bank)
    torch.testing.assert_close(moments(bank.contexts)[:, won], expected[:, won], rtol=1e-4, atol=1e-4)


def test_incumbents_keep_their_history_where_challengers_lose() -> None:
    bank, optimizer, rivals = contested()
    rivals.grad = torch.ones_like(rivals)
    optimizer.step()
    before = optimizer.state[bank.contexts]["exp_avg"].clone()
    set_winner(bank, 0)
    inherit(optimizer, bank)
    assert torch.equal(optimizer.state[bank.contexts]["exp_avg"], before)


def test_an_alignment_by_chance_changes_in_every_generation_and_keeps_its_hypermodules() -> None:
    bank = make_bank()
    moved = [redraw(bank, 0.5, seeded(seed)) for seed in range(3)]
    assert all(LOCATIONS // 4 < count <= LOCATIONS // 2 for count in moved)
    assert bank.hypermodules == LOCATIONS and bank.psi.max() < LOCATIONS


def test_new_rows_start_without_history() -> None:
    bank = make_bank()
    optimizer = stepped(bank)
    before = optimizer.state[bank.rows]["exp_avg"].clone()
    (resized,) = contend(
        bank, Evolution(challengers=2, epsilon=1.0, fraction=1.0), 0.5, LOCATIONS + 4, seeded(0)
    )
    carry(optimizer, resized)
    state = optimizer.state[bank.rows]
    assert torch.equal(state["exp_avg"][: len(before)], before)
    assert not state["exp_avg"][len(before) :].any()
    assert not state["exp_avg_sq"][len(before) :].any()
    assert len(state["exp_avg"]) == len(bank.rows) == len(before) + 4 * CONTEXT


def test_new_hypermodules_are_as_large_as_the_others() -> None:
    bank = make_bank(400)
    with torch.no_grad():
        bank.rows.mul_(5)
    contend(bank, Evolution(challengers=4, epsilon=1.0, fraction=1.0), 0.5, 800, seeded(0))
    old, new = bank.rows[: 400 * CONTEXT], bank.rows[400 * CONTEXT :]
    assert 0.9 < float(new.detach().std() / old.detach().std()) < 1.1


def test_an_optimizer_without_state_takes_the_new_parameter() -> None:
    bank = make_bank()
    optimizer = torch.optim.SGD([bank.rows], lr=0.1)
    bank.psi = torch.zeros_like(bank.psi)
    (resized,) = prune(bank)
    carry(optimizer, resized)
    assert optimizer.param_groups[0]["params"] == [bank.rows]
    assert len(bank.rows) == CONTEXT


@given(st.lists(st.integers(0, 5), min_size=LOCATIONS, max_size=LOCATIONS))
@settings(deadline=None, max_examples=30)
def test_a_group_takes_the_hypermodule_of_its_first_location(numbers: list[int]) -> None:
    bank, group = make_bank(), torch.tensor(numbers)
    rows = bank.rows.detach().view(LOCATIONS, CONTEXT, WIDTH)
    regroup(bank, group)
    after = bank.rows.detach().view(-1, CONTEXT, WIDTH)
    for location, number in enumerate(numbers):
        assert torch.equal(after[bank.psi[location]], rows[numbers.index(number)])
    assert bank.hypermodules == len(set(numbers))
