"""Contests: blocks and gradients against a loop written from MUiR Eq. 8, and what must not change meanwhile."""

from __future__ import annotations

import doctest

import pytest
import torch
from torch import Tensor

from surgery.core.kernel import DENSE_CODE
from surgery.methods.hypermodules import contest as module
from surgery.methods.hypermodules.bank import HypermoduleBank
from surgery.methods.hypermodules.contest import Contest

SMALL, LARGE = (7, 4), (90, 60)  # locations and hypermodules: a code held dense, and one that is not


def make_bank(
    locations: int, hypermodules: int, context: int = 2, width: int = 6, dtype: torch.dtype = torch.float64
) -> HypermoduleBank:
    g = torch.Generator().manual_seed(locations)
    psi = torch.cat(
        [torch.arange(hypermodules), torch.randint(hypermodules, (locations - hypermodules,), generator=g)]
    )
    rows = torch.randn(hypermodules * context, width, generator=g, dtype=dtype)
    contexts = torch.randn(locations, context, generator=g, dtype=dtype)
    return HypermoduleBank(
        (1, width), rows, psi[torch.randperm(locations, generator=g)], contexts, hypermodules
    )


def open_contest(bank: HypermoduleBank, challengers: int = 3, fitted: bool = False, seed: int = 0) -> Contest:
    """A contest of every second location, its soft weights somewhere on their way."""
    g = torch.Generator().manual_seed(seed)
    chosen = torch.arange(0, bank.locations, 2)
    rivals = torch.randint(bank.hypermodules, (len(chosen), challengers), generator=g)
    shape = (len(chosen), challengers, bank.context)
    contexts = torch.randn(shape, generator=g, dtype=bank.rows.dtype) if fitted else None
    bank.contest = Contest(bank.psi, bank.hypermodules, chosen, rivals, bank.context, 0.6, contexts)
    with torch.no_grad():
        bank.contest.soft.add_(torch.randn(bank.contest.soft.shape, generator=g))
    bank.contest.soft.data = bank.contest.soft.data.to(bank.rows.dtype)
    return bank.contest


def slow_blocks(bank: HypermoduleBank) -> Tensor:
    """Eq. (8), one location, alternative and basis block at a time."""
    contest, c, blocks = bank.contest, bank.context, []
    assert contest is not None
    row_of = {int(location): n for n, location in enumerate(contest.chosen)}
    for location in range(bank.locations):
        z, block = bank.contexts[location], torch.zeros(bank.rows.shape[1], dtype=bank.rows.dtype)
        if location not in row_of:
            for j in range(c):
                block = block + z[j] * bank.rows[int(bank.psi[location]) * c + j]  # Eq. (5)
            blocks.append(block)
            continue
        n = row_of[location]
        total = sum(weight.exp() for weight in contest.soft[n])
        for i, hypermodule in enumerate(contest.candidates[n].tolist()):
            own = z if contest.contexts is None or i == 0 else contest.contexts[n, i - 1]
            for j in range(c):
                block = block + contest.soft[n, i].exp() / total * own[j] * bank.rows[hypermodule * c + j]
        blocks.append(block)
    return torch.stack(blocks)


def parameters(bank: HypermoduleBank) -> list[Tensor]:
    contest = bank.contest
    assert contest is not None
    fitted = [] if contest.contexts is None else [contest.contexts]
    return [bank.rows, bank.contexts, contest.soft, *fitted]


def test_the_two_sizes_take_the_two_ways() -> None:
    (small, few), (large, many) = SMALL, LARGE
    assert small * few * 2 <= DENSE_CODE < large * many * 2


@pytest.mark.parametrize("fitted", [False, True])
@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_blocks_and_gradients_equal_the_loop(size: tuple[int, int], fitted: bool) -> None:
    bank = make_bank(*size)
    open_contest(bank, fitted=fitted)
    fast, slow = bank.blocks(), slow_blocks(bank)
    assert torch.allclose(fast, slow, atol=1e-12)
    grad = torch.randn(fast.shape, generator=torch.Generator().manual_seed(1), dtype=fast.dtype)
    found = torch.autograd.grad(fast, parameters(bank), grad)
    wanted = torch.autograd.grad(slow, parameters(bank), grad)
    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(one, other, atol=1e-11)
        assert other.abs().max() > 0


@pytest.mark.parametrize("size", [SMALL, LARGE])
@pytest.mark.parametrize("ends", [(0, 3), (1, 5), (4, None), (3, 3)])
def test_a_range_of_locations_is_that_range_of_the_whole(
    size: tuple[int, int], ends: tuple[int, int | None]
) -> None:
    bank = make_bank(*size)
    open_contest(bank)
    start, stop = ends
    part = bank.blocks(start, stop)
    assert torch.allclose(part, slow_blocks(bank)[start:stop], atol=1e-12)
    if len(part):
        found = torch.autograd.grad(part.square().sum(), parameters(bank))
        wanted = torch.autograd.grad(slow_blocks(bank)[start:stop].square().sum(), parameters(bank))
        assert all(torch.allclose(a, b, atol=1e-11) for a, b in zip(found, wanted, strict=True))


def test_locations_that_were_not_sampled_generate_the_same_bits() -> None:
    bank = make_bank(*LARGE, dtype=torch.float32)
    before = bank.blocks().detach()
    chosen = open_contest(bank).chosen
    during = bank.blocks().detach()
    rest = torch.ones(bank.locations, dtype=torch.bool)
    rest[chosen] = False
    assert torch.equal(during[rest], before[rest])
    assert not torch.equal(during[chosen], before[chosen])


def test_a_challenger_equal_to_the_incumbent_changes_no_block() -> None:
    bank = make_bank(*SMALL)
    before, chosen = bank.blocks().detach(), torch.tensor([1, 4])
    bank.contest = Contest(
        bank.psi, bank.hypermodules, chosen, bank.psi[chosen].unsqueeze(1), bank.context, 0.7
    )
    assert torch.allclose(bank.blocks(), before, atol=1e-7)  # soft weights are float32


def test_the_incumbent_starts_with_one_minus_alpha() -> None:
    bank = make_bank(*SMALL)
    opened = Contest(bank.psi, 4, torch.tensor([0, 2]), torch.tensor([[1, 2, 3]] * 2), 2, alpha=0.6)
    assert torch.allclose(opened.soft.softmax(1)[:, 0], torch.tensor(0.4))
    assert torch.equal(opened.candidates[:, 0], bank.psi[[0, 2]])


def test_a_decision_moves_sampled_locations_alone() -> None:
    bank = make_bank(*LARGE)
    opened = open_contest(bank)
    psi, contexts = opened.decide(bank.psi, bank.contexts)
    rest = torch.ones(bank.locations, dtype=torch.bool)
    rest[opened.chosen] = False
    assert torch.equal(psi[rest], bank.psi[rest])
    assert torch.equal(contexts, bank.contexts)
    assert (psi[opened.chosen].unsqueeze(1) == opened.candidates).any(1).all()


def test_a_winner_brings_its_fitted_context() -> None:
    bank = make_bank(*LARGE)
    opened = open_contest(bank, fitted=True)
    winner = module.decide(opened.candidates, opened.soft)
    _, contexts = opened.decide(bank.psi, bank.contexts)
    assert 0 < (winner > 0).sum() < len(winner), "the draw should have both kinds"
    assert opened.contexts is not None
    for n, (location, column) in enumerate(zip(opened.chosen.tolist(), winner.tolist(), strict=True)):
        wanted = bank.contexts[location] if column == 0 else opened.contexts[n, column - 1]
        assert torch.equal(contexts[location], wanted)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_cuda_equals_the_loop(size: tuple[int, int]) -> None:
    bank = make_bank(*size, dtype=torch.float32)
    open_contest(bank)
    wanted = slow_blocks(bank)
    gradients = torch.autograd.grad(wanted.square().sum(), parameters(bank))
    bank.cuda()
    found = bank.blocks()
    assert torch.allclose(found.cpu(), wanted, atol=1e-5)
    for one, other in zip(
        torch.autograd.grad(found.square().sum(), parameters(bank)), gradients, strict=True
    ):
        assert torch.allclose(one.cpu(), other, atol=1e-3)


def test_examples_in_the_docstrings() -> None:
    assert doctest.testmod(module).failed == 0
