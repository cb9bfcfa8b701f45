"""The cheapest way of storing everything: Lagrangian choice among each unit's options.

Each unit u has options p with bytes b[u, p] and squared error e[u, p]; an error costs member i w[u, i] * e[u, p] of
relative squared output error. For multipliers mu[i] the choice minimises b + sum_i mu[i] * w[u, i] * e unit by unit;
a group offers several arrangements of units (each tensor alone, or shared rows) and takes the cheapest. Raising mu[i]
never raises the predicted error of member i, so bounds and budgets are met by bisection.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

CEILING = 90.0  # of |log2(mu)|, mu in bytes per unit of relative squared error
STEPS = 40


@dataclass(frozen=True)
class Table:
    """All units of all arrangements, as arrays.

    Attributes:
        size: `[U, P]` bytes; inf where a unit has fewer options.
        error: `[U, P]` squared error.
        weight: `[U, M]` relative squared output error per squared error, by member.
        arrangement: `[U]` number of the arrangement that a unit belongs to.
        group: `[A]` number of the group that an arrangement belongs to.
        fixed: `[A]` bytes of an arrangement besides its units.
    """

    size: np.ndarray
    error: np.ndarray
    weight: np.ndarray
    arrangement: np.ndarray
    group: np.ndarray
    fixed: np.ndarray


@dataclass(frozen=True)
class Choice:
    """An allocation: the option of every unit, which arrangements are taken, and what is predicted.

    Attributes:
        option: `[U]`.
        taken: `[A]` bool, one arrangement in each group.
        nbytes: of all taken units.
        error: `[M]` predicted relative squared output error.
    """

    option: np.ndarray
    taken: np.ndarray
    nbytes: float
    error: np.ndarray


def choose(table: Table, mu: np.ndarray) -> Choice:
    """The best choice for multipliers `mu [M]`."""
    cost = table.size + (table.weight @ mu)[:, None] * table.error
    option = cost.argmin(1)
    units = np.arange(len(option))
    total = table.fixed + np.bincount(table.arrangement, cost[units, option], len(table.fixed))
    taken = np.zeros(len(total), bool)
    order = np.lexsort((total, table.group))
    taken[order[np.r_[True, table.group[order][1:] != table.group[order][:-1]]]] = True
    active = taken[table.arrangement]
    nbytes = table.size[units, option][active].sum() + table.fixed[taken].sum()
    error = (table.weight * table.error[units, option][:, None])[active].sum(0)
    return Choice(option, taken, float(nbytes), error)


def within_errors(table: Table, bound: Sequence[float]) -> Choice:
    """The smallest choice whose predicted relative squared error stays within `bound [M]` for every member."""
    members = table.weight.shape[1]
    level = np.full(members, -CEILING)
    # Members are coupled only through shared rows; a second and third sweep settle those.
    coupled = members > 1 and bool(((table.weight > 0).sum(1) > 1).any())
    for _ in range(3 if coupled else 1):
        for i in range(members):
            level[i] = _lowest(lambda x, i=i: choose(table, np.exp2(_put(level, i, x))).error[i] <= bound[i])
    limit = np.asarray(bound, float)
    # Multipliers reach only the convex hull. From the hull's point on either side of the bound, exchange single
    # options: what is within the bound saves bytes until it is used up, what is beyond it is mended first.
    within = _use_up_error(table, choose(table, np.exp2(level)), limit)
    beyond = _mend_error(table, choose(table, np.exp2(level - 1e-6)), limit)
    if beyond is None:
        return within
    return min(within, _use_up_error(table, beyond, limit), key=lambda choice: choice.nbytes)


def within_bytes(table: Table, budget: float) -> Choice:
    """The choice of least total predicted error that takes at most `budget` bytes, or the smallest one there is."""
    members = table.weight.shape[1]
    level = _lowest(lambda x: choose(table, np.exp2(np.full(members, -x))).nbytes <= budget)
    within = _use_up_bytes(table, choose(table, np.exp2(np.full(members, -level))), budget)
    beyond = _mend_bytes(table, choose(table, np.exp2(np.full(members, 1e-6 - level))), budget)
    if beyond is None:
        return within
    return min(within, _use_up_bytes(table, beyond, budget), key=lambda choice: choice.error.sum())


def _use_up_error(table: Table, choice: Choice, bound: np.ndarray) -> Choice:
    """Give what is left of the bound to whatever then saves most bytes."""
    while True:
        now = np.arange(len(choice.option)), choice.option
        saving = table.size[now][:, None] - table.size
        more = table.error - table.error[now][:, None]
        fits = np.isfinite(table.size) & (saving > 0) & choice.taken[table.arrangement][:, None]
        for i in range(table.weight.shape[1]):
            fits &= table.weight[:, i, None] * more <= max(bound[i] - choice.error[i], 0.0)
        if not fits.any():
            return choice
        choice = _exchange(table, choice, np.where(fits, saving, -1.0))


def _use_up_bytes(table: Table, choice: Choice, budget: float) -> Choice:
    """Give what is left of the budget to whatever then lowers the predicted error most."""
    while True:
        now = np.arange(len(choice.option)), choice.option
        lower = table.weight.sum(1)[:, None] * (table.error[now][:, None] - table.error)
        fits = (table.size - table.size[now][:, None] <= budget - choice.nbytes) & (lower > 0)
        fits &= choice.taken[table.arrangement][:, None]
        if not fits.any():
            return choice
        choice = _exchange(table, choice, np.where(fits, lower, -1.0))


def _mend_error(table: Table, choice: Choice, bound: np.ndarray) -> Choice | None:
    """Bring a choice within the bound by the exchanges that lower the excess most for their bytes."""
    while (excess := np.maximum(choice.error - bound, 0.0)).any():
        now = np.arange(len(choice.option)), choice.option
        lower = table.error[now][:, None] - table.error
        gain = sum(np.minimum(table.weight[:, i, None] * lower, excess[i]) for i in np.nonzero(excess)[0])
        dearer = np.maximum(table.size - table.size[now][:, None], 1e-9)
        gain = np.where((lower > 0) & choice.taken[table.arrangement][:, None], gain / dearer, -1.0)
        if not gain.max() > 0:
            return None
        choice = _exchange(table, choice, gain)
    return choice


def _mend_bytes(table: Table, choice: Choice, budget: float) -> Choice | None:
    """Bring a choice within the budget by the exchanges that raise the predicted error least for their bytes."""
    while choice.nbytes > budget:
        now = np.arange(len(choice.option)), choice.option
        saving = np.minimum(table.size[now][:, None] - table.size, choice.nbytes - budget)
        worse = np.maximum(table.weight.sum(1)[:, None] * (table.error - table.error[now][:, None]), 1e-30)
        gain = np.where((saving > 0) & choice.taken[table.arrangement][:, None], saving / worse, -1.0)
        if not gain.max() > 0:
            return None
        choice = _exchange(table, choice, gain)
    return choice


def _exchange(table: Table, choice: Choice, gain: np.ndarray) -> Choice:
    """Take the one option of greatest gain."""
    unit, option = np.unravel_index(gain.argmax(), gain.shape)
    old, changed = choice.option[unit], choice.option.copy()
    changed[unit] = option
    nbytes = choice.nbytes + table.size[unit, option] - table.size[unit, old]
    error = choice.error + table.weight[unit] * (table.error[unit, option] - table.error[unit, old])
    return Choice(changed, choice.taken, float(nbytes), error)


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


def _put(level: np.ndarray, index: int, value: float) -> np.ndarray:
    changed = level.copy()
    changed[index] = value
    return changed
