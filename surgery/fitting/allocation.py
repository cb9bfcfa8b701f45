"""The cheapest way of storing everything: Lagrangian choice among each unit's options.

Each unit u has options p with bytes b[u, p] and squared error e[u, p]; an error costs member i w[u, i] * e[u,
p] of relative squared output error. For multipliers mu[i] the choice minimises b + sum_i mu[i] * w[u, i] * e
unit by unit; a group offers several arrangements of units (each tensor alone, or shared rows) and takes the
cheapest. Raising mu[i] never raises the predicted error of member i, so bounds and budgets are met by
bisection.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from surgery.fitting.exchanges import mend_bytes, mend_error, use_up_bytes, use_up_error
from surgery.fitting.tabulated import Choice, Table

CEILING = 90.0  # of |log2(mu)|, mu in bytes per unit of relative squared error
STEPS = 40


def choose(table: Table, mu: np.ndarray) -> Choice:
    """The best choice for multipliers `mu [M]`."""
    cost = table.size + (table.weight @ mu)[:, None] * table.error
    option = cost.argmin(1)
    total = table.fixed + np.bincount(
        table.arrangement, cost[np.arange(len(option)), option], len(table.fixed)
    )
    return revalued(table, Choice(option, _first_of_each(table.group, total), 0.0, np.zeros(0)))


def within_errors(table: Table, bound: Sequence[float]) -> Choice:
    """The smallest choice found whose predicted relative squared error stays within `bound [M]` for every member.

    Where no choice is within, the one of least error.
    """
    limit, members = np.asarray(bound, float), table.weight.shape[1]
    scaled, unit = _scaled(table)
    level = np.full(members, -CEILING)
    # Members are coupled only through shared rows; a second and third sweep settle those.
    coupled = members > 1 and bool(((table.weight > 0).sum(1) > 1).any())
    for _ in range(3 if coupled else 1):
        for i in range(members):
            level[i] = _lowest(_meeting(scaled, level, i, limit[i] / unit[i]))
    # Multipliers reach only the convex hull. From the hull's points on either side of the bound, exchange single
    # options: what is beyond it is mended first, and what is then left of it saves bytes until it is used up.
    starts = [np.exp2(level), np.exp2(level - 1e-6)]
    mended = [mend_error(table, revalued(table, choose(scaled, mu)), limit) for mu in starts]
    within = [use_up_error(table, choice, limit) for choice in (*mended, finest(table)) if choice is not None]
    kept = [choice for choice in within if (choice.error <= limit).all()]
    return min(kept, key=lambda choice: choice.nbytes, default=finest(table))


def within_bytes(table: Table, budget: float, common: bool = False) -> Choice:
    """The choice found of least total predicted error within `budget` bytes, or the smallest one there is.

    Args:
        table: to choose from.
        budget: in bytes.
        common: whether an error counts the same in every member, and not in units of each member's largest.
    """
    scaled, unit = _scaled(table)
    if common:
        scaled = replace(table, weight=table.weight / unit.max())

    def at(level: float) -> Choice:
        return revalued(table, choose(scaled, np.exp2(np.full(table.weight.shape[1], -level))))

    level = _lowest(lambda x: at(x).nbytes <= budget)
    smallest = choose(table, np.zeros(table.weight.shape[1]))
    mended = [mend_bytes(table, choice, budget) for choice in (at(level), at(level - 1e-6), smallest)]
    within = [use_up_bytes(table, choice, budget) for choice in mended if choice is not None]
    return min(within, key=lambda choice: choice.error.sum(), default=smallest)


def finest(table: Table) -> Choice:
    """The choice of least error: the best option of every unit, and the arrangements that these make best."""
    error = np.where(np.isfinite(table.size), table.error * table.weight.sum(1)[:, None], np.inf)
    option = np.lexsort((table.size, error), axis=1)[:, 0]
    units = np.arange(len(option))
    total = np.bincount(table.arrangement, error[units, option], len(table.fixed))
    total = np.where(np.isfinite(table.fixed), total, np.inf)  # what cannot be taken
    nbytes = table.fixed + np.bincount(table.arrangement, table.size[units, option], len(table.fixed))
    return revalued(table, Choice(option, _first_of_each(table.group, total, nbytes), 0.0, np.zeros(0)))


def _meeting(table: Table, level: np.ndarray, member: int, limit: float) -> Callable[[float], bool]:
    """Whether the choice for a member's multiplier keeps its error within a limit, those of others as they are.

    Looks at groups alone that this member has a part in.

    Args:
        table: to choose from.
        level: `[M]` log2 of the multipliers.
        member: whose.
        limit: of its error.
    """
    part = np.unique(table.group[table.arrangement[table.weight[:, member] > 0]])
    rows = np.nonzero(np.isin(table.group[table.arrangement], part))[0]
    if not len(rows):  # nothing moves its outputs
        return lambda x: limit >= 0
    held, at = np.unique(table.arrangement[rows], return_inverse=True)
    size, error, own = table.size[rows], table.error[rows], table.weight[rows, member]
    mu = np.exp2(level)
    mu[member] = 0.0
    others, group, fixed = table.weight[rows] @ mu, table.group[held], table.fixed[held]
    units = np.arange(len(rows))

    def met(x: float) -> bool:
        cost = size + (others + own * np.exp2(x))[:, None] * error
        option = cost.argmin(1)
        taken = _first_of_each(group, fixed + np.bincount(at, cost[units, option], len(held)))
        return bool((own * error[units, option])[taken[at]].sum() <= limit)

    return met


def _scaled(table: Table) -> tuple[Table, np.ndarray]:
    """The table in units of each member's largest error: what multipliers then need is below the ceiling."""
    able = np.isfinite(table.fixed)[table.arrangement]  # what cannot be taken changes nothing
    unit = (table.weight * table.error.max(1, keepdims=True))[able].max(0, initial=0.0)
    unit = np.where((unit > 0) & np.isfinite(unit), unit, 1.0)
    return replace(table, weight=table.weight / unit), unit


def revalued(table: Table, choice: Choice) -> Choice:
    """The same options with the bytes and errors that they have in `table`."""
    units, active = np.arange(len(choice.option)), choice.taken[table.arrangement]
    nbytes = table.size[units, choice.option][active].sum() + table.fixed[choice.taken].sum()
    error = (table.weight * table.error[units, choice.option][:, None])[active].sum(0)
    return Choice(choice.option, choice.taken, float(nbytes), error)


def of_each(table: Table, choices: Sequence[Choice]) -> Choice | None:
    """One choice put together of each member's own, for members that share nothing.

    Args:
        table: that all were chosen from.
        choices: `[M]`, one of each member's.

    Returns:
        the choice; None where members share what their choices treat differently.
    """
    units = np.arange(len(table.size))
    owner = table.weight.argmax(1)
    option = np.stack([choice.option for choice in choices])[owner, units]
    votes = np.stack([choice.taken for choice in choices])[owner, table.arrangement]
    taken = np.bincount(table.arrangement, votes, len(table.fixed)) > 0
    if (np.bincount(table.group, taken) != 1).any():
        return None
    found = revalued(table, Choice(option, taken, 0.0, np.zeros(0)))
    own = np.array([choice.error[member] for member, choice in enumerate(choices)])
    return found if np.allclose(found.error, own, rtol=1e-9, atol=0) else None


def _first_of_each(group: np.ndarray, *keys: np.ndarray) -> np.ndarray:
    """Mark the least of each group by the first key, then the next."""
    order = np.lexsort((*reversed(keys), group))
    marked = np.zeros(len(group), bool)
    marked[order[np.r_[True, group[order][1:] != group[order][:-1]]]] = True
    return marked


def _lowest(holds: Callable[[float], bool]) -> float:
    """The lowest level at which a condition holds that is false below and true above some level."""
    low, high = -CEILING, CEILING
    for _ in range(STEPS):
        middle = (low + high) / 2
        if holds(middle):
            high = middle
        else:
            low = middle
    return high
