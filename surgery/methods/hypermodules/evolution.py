"""One generation's changes to a bank: alternatives are drawn, one is chosen, what nobody uses is removed.

A bank changes size as its alignment evolves. Each function here changes the bank in place and says where every
row of its parameters came from, so that the optimizer's state can follow (`training.loop.optimizers.carry`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from surgery.methods.hypermodules.alignment import draw_by_usage, draw_locations, draw_new, draw_uniformly
from surgery.methods.hypermodules.bank import HypermoduleBank
from surgery.methods.hypermodules.contest import Contest
from surgery.methods.hypermodules.explanation import (
    Total,
    draw_by_explanation,
    explained_pairs,
    fit_contexts,
    scale_contexts,
)
from surgery.methods.hypermodules.merging import Mergers, draw_mergers
from surgery.methods.hypermodules.settings import Evolution
from surgery.training.loop.optimizers import Resized


def contend(
    bank: HypermoduleBank,
    settings: Evolution,
    alpha: float,
    capacity: int,
    generator: torch.Generator,
    siblings: Tensor | None = None,
    moments: Tensor | None = None,
) -> list[Resized]:
    """Open a contest: draw locations and their challengers. # Alg. 2, lines 7 to 13

    No contest is opened where challengers must explain more of the blocks than any of them does.

    Args:
        bank: with hypermodules only.
        settings: of the evolution; half of the locations are sampled where they do not say how many.
        alpha: probability of not choosing the incumbent.
        capacity: how many hypermodules there may be, K at the start of training.
        generator: on the CPU; all processes draw the same.
        siblings: `[L, F]` locations that are tried first, -1 for none.
        moments: `[K*c, d]`, second moments of the rows' gradients, in whose metric merging moves are chosen.

    Returns:
        The rows, where new hypermodules were drawn.
    """
    fraction = 0.5 if settings.fraction is None else settings.fraction  # the paper's
    mergers = _mergers(bank, settings.merging, fraction, generator, moments)
    chosen = _draw_others(bank, fraction, generator, mergers)
    if not len(chosen) and mergers is None:  # all locations stay as they are
        return []
    drawn = _draw(bank, settings, chosen, generator, siblings)
    if settings.least > 0:
        chosen, drawn = _able(bank, chosen, drawn, settings.least)
        if not len(chosen) and mergers is None:
            return []
    drawn, new = draw_new(drawn, settings.epsilon, capacity - bank.hypermodules, bank.hypermodules, generator)
    resized = [_grow(bank, new, generator)] if new else []
    coefficients = _coefficients(bank, settings, chosen, drawn, own=mergers is not None)
    if mergers is None:
        bank.contest = open_contest(bank, chosen, drawn, alpha, coefficients)
    else:
        assert coefficients is not None
        bank.contest = _with_mergers(bank, mergers, chosen, drawn, alpha, coefficients)
    return resized


def open_contest(
    bank: HypermoduleBank,
    chosen: Tensor,
    drawn: Tensor,
    alpha: float,
    coefficients: Tensor | None = None,
    group: Tensor | None = None,
) -> Contest:
    """A contest of challengers `drawn [N, lambda]` for the locations `chosen [N]` of a bank.

    Args:
        bank: with hypermodules only, those drawn among them.
        chosen: ascending.
        drawn: hypermodules.
        alpha: probability of not choosing the incumbent.
        coefficients: `[N, lambda, c]` of challengers that do not use their location's own contexts.
        group: `[N]` locations that are decided together, -1 for one that is alone.
    """
    factors = bank.factors_of(chosen, torch.cat([bank.psi[chosen].unsqueeze(1), drawn.to(bank.psi)], 1))
    if coefficients is not None and factors is not None:
        coefficients = coefficients / factors[:, 1:].unsqueeze(2)
    return Contest(
        bank.psi,
        bank.hypermodules,
        chosen,
        drawn,
        bank.context,
        alpha,
        coefficients,
        factors,
        group,
        bank.rows.dtype,
    )


def conclude(bank: HypermoduleBank) -> tuple[list[Resized], int]:
    """Close the contest: each location takes its best alternative, unused hypermodules are removed.

    Returns:
        The rows, where hypermodules were removed, and how many locations changed their hypermodule.
        # Alg. 2, lines 18 to 23
    """
    contest = bank.contest
    if contest is None:
        return [], 0
    bank.contest = None
    psi, contexts = contest.decide(bank.psi, bank.contexts.detach())
    moved = int((psi != bank.psi).sum())
    bank.psi = psi
    with torch.no_grad():
        bank.contexts.copy_(contexts)
    return prune(bank), moved


def redraw(bank: HypermoduleBank, fraction: float, generator: torch.Generator) -> int:
    """Give a fraction of the locations a hypermodule drawn at random, whatever it is worth; returns how many changed
    theirs.

    Nothing is removed: a hypermodule that nobody uses now may be drawn again.
    """
    free = bank.free
    if not len(free):
        return 0
    chosen = free[draw_locations(len(free), fraction, generator).to(free.device)]
    every = torch.arange(bank.hypermodules, device=bank.psi.device)
    psi = bank.psi.clone()
    psi[chosen] = draw_uniformly(every, len(chosen), 1, generator).squeeze(1)
    moved = int((psi != bank.psi).sum())
    bank.psi = psi
    return moved


def prune(bank: HypermoduleBank) -> list[Resized]:
    """Remove the hypermodules that no location uses."""
    used, compact = torch.unique(bank.psi, return_inverse=True)
    if len(used) == bank.hypermodules:
        return []
    bank.psi = compact
    return [_take_rows(bank, used)]


@torch.no_grad()
def inherit(optimizer: torch.optim.Optimizer, bank: HypermoduleBank) -> None:
    """Let the optimizer's rows of contexts that challengers brought follow these into the bank, before a contest is
    concluded.

    Adam's moments are of the steps that were taken, fewer than the bank's, so their corrections for that are exchanged.
    """
    contest = bank.contest
    source = None if contest is None or contest.contexts is None else optimizer.state.get(contest.contexts)
    target = optimizer.state.get(bank.contexts)
    if contest is None or not source or not target:
        return
    places, columns = contest.winners()
    rivals = torch.searchsorted(contest.chosen, places)
    betas = next((g["betas"] for g in optimizer.param_groups if "betas" in g), (0.0, 0.0))
    for key, beta in (("exp_avg", betas[0]), ("exp_avg_sq", betas[1]), ("momentum_buffer", 0.0)):
        if isinstance(source.get(key), Tensor) and isinstance(target.get(key), Tensor):
            factor = 1.0
            if beta:
                factor = (1 - beta ** float(target["step"])) / (1 - beta ** float(source["step"]))
            target[key][places] = source[key][rivals, columns] * factor


@torch.no_grad()
def _able(bank: HypermoduleBank, chosen: Tensor, drawn: Tensor, least: float) -> tuple[Tensor, Tensor]:
    """The locations for which a challenger explains enough, and their challengers `[N', lambda]`; those that explain
    too little make room for the best."""
    blocks, rows = bank.blocks()[chosen], _hypermodules(bank)
    shares = [explained_pairs(blocks, rows[column], _total(bank)) for column in drawn.unbind(1)]
    share = torch.stack(shares, 1)
    best = drawn.gather(1, share.argmax(1, keepdim=True))
    able = torch.where(share >= least, drawn, best)
    kept = share.amax(1) >= least
    return chosen[kept], able[kept]


def _mergers(
    bank: HypermoduleBank, share: float, fraction: float, generator: torch.Generator, moments: Tensor | None
) -> Mergers | None:
    """Merging moves of a share of the locations that are sampled."""
    if not share:
        return None
    most = round(share * fraction * len(bank.free))
    return draw_mergers(bank, most, generator, moments, _total(bank))


def _draw_others(
    bank: HypermoduleBank, fraction: float, generator: torch.Generator, mergers: Mergers | None
) -> Tensor:
    """The sampled locations that no merging move has taken: `[N]`, ascending; with these, `p*L`."""
    free = bank.free
    if not len(free):
        return free
    if mergers is None:
        return free[draw_locations(len(free), fraction, generator).to(free.device)]
    rest = free[~torch.isin(free, mergers.locations)]
    count = fraction * len(free) - len(mergers.locations)
    if count < 0.5 or not len(rest):
        return rest[:0]
    return rest[draw_locations(len(rest), min(count / len(rest), 1.0), generator).to(rest.device)]


@torch.no_grad()
def _coefficients(
    bank: HypermoduleBank, settings: Evolution, chosen: Tensor, drawn: Tensor, own: bool
) -> Tensor | None:
    """Coefficients of challengers `[N, lambda, c]`; where they use their location's context, only if `own` asks."""
    if settings.contexts == "own":
        if not own:
            return None
        factors = bank.factors_of(chosen, drawn.to(bank.psi))
        coefficients = bank.contexts.detach()[chosen].unsqueeze(1).expand(-1, drawn.shape[1], -1)
        return coefficients if factors is None else coefficients * factors.unsqueeze(2)
    blocks = bank.blocks()[chosen]
    contexts = fit_contexts(blocks, _hypermodules(bank), drawn, total=_total(bank))
    if settings.contexts == "scaled":
        contexts = scale_contexts(contexts, blocks, _hypermodules(bank), drawn, _total(bank))
    return contexts


def _with_mergers(
    bank: HypermoduleBank,
    mergers: Mergers,
    chosen: Tensor,
    drawn: Tensor,
    alpha: float,
    coefficients: Tensor,
) -> Contest:
    """A contest of single locations and of merging moves, whose locations have one challenger each, lambda times."""
    challengers = drawn.shape[1]
    locations = torch.cat([chosen, mergers.locations])
    order = locations.argsort()
    targets = mergers.targets.unsqueeze(1).expand(-1, challengers)
    brought = mergers.coefficients.unsqueeze(1).expand(-1, challengers, -1)
    group = torch.cat([torch.full_like(chosen, -1), mergers.group])
    return open_contest(
        bank,
        locations[order],
        torch.cat([drawn, targets])[order],
        alpha,
        torch.cat([coefficients, brought.to(coefficients)])[order],
        group[order],
    )


def _hypermodules(bank: HypermoduleBank) -> Tensor:
    return bank.rows.detach().view(bank.hypermodules, bank.context, -1)


def _total(bank: HypermoduleBank) -> Total | None:
    return bank.columns.total if bank.columns.partial else None


def _draw(
    bank: HypermoduleBank,
    settings: Evolution,
    chosen: Tensor,
    generator: torch.Generator,
    siblings: Tensor | None,
) -> Tensor:
    """Challengers `[N, lambda]` among the hypermodules that are in use."""
    count, challengers = len(chosen), settings.challengers
    if not count:
        return bank.psi.new_empty(0, challengers)
    if settings.draw == "usage":
        return draw_by_usage(bank.psi, count, challengers, generator)
    if settings.draw == "uniform":
        every = torch.arange(bank.hypermodules, device=bank.psi.device)
        return draw_uniformly(every, count, challengers, generator)
    first = None
    if siblings is not None and settings.siblings:
        places = siblings.to(chosen.device)[chosen]
        first = torch.where(places >= 0, bank.psi[places.clamp_min(0)], -1)
    with torch.no_grad():
        blocks = bank.blocks()[chosen]
        return draw_by_explanation(
            blocks,
            _hypermodules(bank),
            bank.psi,
            challengers,
            generator,
            first,
            power=settings.power,
            own=chosen,
            least=settings.least,
            total=_total(bank),
        )


def _grow(bank: HypermoduleBank, new: int, generator: torch.Generator) -> Resized:
    """Append new hypermodules, noise of the deviation that the rows of all have."""
    old, c = bank.rows, bank.context
    noise = torch.randn(new * c, bank.width, generator=generator, dtype=old.dtype)
    noise, size = bank.columns.cut(noise), bank.columns.mean(old.detach().square()).sqrt()
    rows = torch.cat([old.detach(), noise.to(old.device) * size])
    source = torch.cat([torch.arange(len(old)), torch.full((new * c,), -1)]).to(old.device)
    return replace_rows(bank, rows, source, bank.hypermodules + new)


def _take_rows(bank: HypermoduleBank, hypermodules: Tensor) -> Resized:
    c = bank.context
    source = (hypermodules.unsqueeze(1) * c + torch.arange(c, device=hypermodules.device)).reshape(-1)
    return replace_rows(bank, bank.rows.detach()[source], source, len(hypermodules))


def replace_rows(bank: HypermoduleBank, rows: Tensor, source: Tensor, hypermodules: int) -> Resized:
    """Give a bank other rows, of which row r was row `source[r]`, -1 where it is new; their sizes follow."""
    old = bank.rows
    bank.rows = nn.Parameter(rows, requires_grad=old.requires_grad)
    bank.hypermodules = hypermodules
    if bank.size is not None:
        module = source[:: bank.context] // bank.context
        typical = bank.size.square().mean().sqrt()  # of new ones
        bank.size = torch.where(module >= 0, bank.size[module.clamp_min(0)], typical)
    return Resized(old, bank.rows, source)


# Starts ---------------------------------------------------------------------------------------------------


def regroup(bank: HypermoduleBank, group: Tensor, same: bool = False) -> None:
    """Give all locations with one group number one hypermodule: that of the first of them.

    Args:
        bank: with hypermodules only, not yet being optimised.
        group: `[L]`, any numbers.
        same: whether every group has one hypermodule already, so that blocks stay what they are.
    """
    numbers = torch.unique(group.to(bank.psi.device), return_inverse=True)[1]
    count = int(numbers.max()) + 1
    first = torch.full((count,), bank.locations, device=bank.psi.device)
    first.scatter_reduce_(0, numbers, torch.arange(bank.locations, device=bank.psi.device), "amin")
    _take_rows(bank, bank.psi[first])
    bank.psi, bank.origin = numbers, bank.origin if same else None
