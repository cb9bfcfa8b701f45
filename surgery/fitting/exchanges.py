"""Exchanges of single options, which bring a choice within a limit or use up what is left of it.

Multipliers reach the convex hull of all choices alone; what is between two of its points is reached by exchanging one
option after another, each time the one of greatest gain. What an exchange changes is kept for every option of every
unit, and after each exchange only that of units which it concerned is computed anew.
"""

from __future__ import annotations

import numpy as np

from surgery.fitting.tabulated import Choice, Table

FAILED = 64  # options that turned out not to fit, after which all are looked at
TINY = 1e-30
PIECE = 1 << 22  # numbers that are computed at a time


class Exchanges:
    """A choice whose options are exchanged one by one, and what each exchange would change.

    Attributes:
        error: `[M]` predicted relative squared output error.
        nbytes: of all taken units.
        dearer: `[U, P]` bytes that every option takes more than the present one; inf where there is none.
        worse: `[U, P]` squared error that it has more.
        able: `[U, P]` options of units that are taken.
    """

    def __init__(self, table: Table, choice: Choice):
        self.table, self.taken = table, choice.taken
        self.option, self.nbytes, self.error = choice.option.copy(), choice.nbytes, choice.error
        now = np.arange(len(self.option)), self.option
        self.dearer = table.size - table.size[now][:, None]
        self.worse = table.error - table.error[now][:, None]
        self.able = np.isfinite(table.size) & choice.taken[table.arrangement][:, None]

    def take(self, unit: int, option: int) -> None:
        """Exchange the option of one unit."""
        table, old = self.table, self.option[unit]
        self.nbytes += float(table.size[unit, option] - table.size[unit, old])
        self.error = self.error + table.weight[unit] * (table.error[unit, option] - table.error[unit, old])
        self.option[unit] = option
        self.dearer[unit] = table.size[unit] - table.size[unit, option]
        self.worse[unit] = table.error[unit] - table.error[unit, option]

    def choice(self) -> Choice:
        """What it is now."""
        return Choice(self.option, self.taken, self.nbytes, self.error)


def use_up_error(table: Table, choice: Choice, bound: np.ndarray) -> Choice:
    """Give what is left of the bound to whatever then saves most bytes.

    Args:
        table: that it was chosen from.
        choice: within the bound.
        bound: `[M]` of every member's error.
    """
    now = Exchanges(table, choice)
    saving = np.where(now.able & (now.dearer < 0), -now.dearer, -1.0)
    failed = FAILED  # so that all are looked at first
    while True:
        left = np.maximum(bound - now.error, 0.0)
        if failed >= FAILED:
            units, options = np.nonzero(saving > 0)
            saving[units, options] = np.where(_fit(now, units, options, left), saving[units, options], -1.0)
            failed = 0
        unit, option = _greatest(saving)
        if not saving[unit, option] > 0:
            return now.choice()
        worse = now.worse[unit, option]
        if not (table.weight[unit] * worse <= left).all():
            saving[unit, option], failed = -1.0, failed + 1  # and will not fit while less and less is left
            continue
        now.take(unit, option)
        if worse < 0:  # more is left now
            saving, failed = np.where(now.able & (now.dearer < 0), -now.dearer, -1.0), FAILED
        saving[unit] = np.where(now.able[unit] & (now.dearer[unit] < 0), -now.dearer[unit], -1.0)


def use_up_bytes(table: Table, choice: Choice, budget: float) -> Choice:
    """Give what is left of the budget to whatever then lowers the predicted error most.

    Args:
        table: that it was chosen from.
        choice: within the budget.
        budget: in bytes.
    """
    now, weight = Exchanges(table, choice), table.weight.sum(1)
    lower = np.where(now.able, weight[:, None] * -now.worse, -1.0)
    while True:
        gain = np.where((now.dearer <= budget - now.nbytes) & (lower > 0), lower, -1.0)
        unit, option = _greatest(gain)
        if not gain[unit, option] > 0:
            return now.choice()
        now.take(unit, option)
        lower[unit] = np.where(now.able[unit], weight[unit] * -now.worse[unit], -1.0)


def mend_error(table: Table, choice: Choice, bound: np.ndarray) -> Choice | None:
    """Bring a choice within the bound by the exchanges that lower the excess most for their bytes.

    Args:
        table: that it was chosen from.
        choice: any.
        bound: `[M]` of every member's error.

    Returns:
        the choice; None where no exchange helps any more.
    """
    now = Exchanges(table, choice)
    gain, every = np.zeros_like(table.error), np.arange(len(table.size))
    concerned, excess = every, np.maximum(now.error - bound, 0.0)
    while excess.any():
        over = np.nonzero(excess)[0]
        step = max(1, PIECE // max(1, len(over) * table.error.shape[1]))
        for start in range(0, len(concerned), step):
            rows = concerned[start : start + step]
            lower = table.weight[np.ix_(rows, over)][:, :, None] * -now.worse[rows][:, None, :]
            part = np.minimum(lower, excess[over][None, :, None]).sum(1)
            wanted = (now.worse[rows] < 0) & now.able[rows]
            gain[rows] = np.where(wanted, part / np.maximum(now.dearer[rows], 1e-9), -1.0)
        unit, option = _greatest(gain)
        if not gain[unit, option] > 0:
            return None
        now.take(unit, option)
        before, excess = excess, np.maximum(now.error - bound, 0.0)
        changed = np.nonzero(before != excess)[0]
        concerned = np.union1d(np.nonzero((table.weight[:, changed] > 0).any(1))[0], [unit])
    return now.choice()


def mend_bytes(table: Table, choice: Choice, budget: float) -> Choice | None:
    """Bring a choice within the budget by the exchanges that raise the error least for their bytes.

    Args:
        table: that it was chosen from.
        choice: any.
        budget: in bytes.

    Returns:
        the choice; None where no exchange helps any more.
    """
    now, weight = Exchanges(table, choice), table.weight.sum(1)
    worse = np.maximum(weight[:, None] * now.worse, TINY)
    while now.nbytes > budget:
        saving = np.where(now.able, np.minimum(-now.dearer, now.nbytes - budget), -1.0)
        gain = np.where(saving > 0, saving / worse, -1.0)
        unit, option = _greatest(gain)
        if not gain[unit, option] > 0:
            return None
        now.take(unit, option)
        worse[unit] = np.maximum(weight[unit] * now.worse[unit], TINY)
    return now.choice()


def _fit(now: Exchanges, units: np.ndarray, options: np.ndarray, left: np.ndarray) -> np.ndarray:
    """Which of some options `[K]` leave every member's error within its bound."""
    fits = np.ones(len(units), bool)
    for start in range(0, len(units), step := max(1, PIECE // max(1, len(left)))):
        some = slice(start, start + step)
        more = now.table.weight[units[some]] * now.worse[units[some], options[some]][:, None]
        fits[some] = (more <= left).all(1)
    return fits


def _greatest(gain: np.ndarray) -> tuple[int, int]:
    """The unit and the option of greatest gain."""
    unit, option = np.unravel_index(gain.argmax(), gain.shape)
    return int(unit), int(option)
