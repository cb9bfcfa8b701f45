"""Structure: errors of related sites that are stored together, and what measuring says of them.

What related sites leave out lies along few directions and adds up over layers; what rounding does to a matrix that
they share is partly made up for by private rows. Either is predicted up to a factor, which two measured attempts give:
one with all of a choice, and one that leaves out the same and rounds nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from surgery.fitting.allocation import revalued
from surgery.fitting.closing import log_ratio
from surgery.fitting.tabulated import Choice, Table
from surgery.fitting.units import Group

LEFT_OUT = 4.0  # the factor of what is left out before anything was measured: typical of transformers


@dataclass(frozen=True)
class Structure:
    """Errors of related sites, by their kind.

    Attributes:
        together: `[A]` bool, arrangements that store related sites together.
        left_out: `[U, P]` bool, options of these that leave a tensor out, and what no option can mend.
        rounded: `[U, P]` bool, all their other options.
        factors: of what is left out, and of what is rounded: measured over predicted squared error.
    """

    together: np.ndarray
    left_out: np.ndarray
    rounded: np.ndarray
    factors: tuple[float, float]

    def apply(self, table: Table) -> Table:
        """A table as it was predicted with errors as they are measured."""
        left, rounded = self.factors
        error = np.where(self.left_out, left, np.where(self.rounded, rounded, 1.0)) * table.error
        return replace(table, error=error)

    def apart(self, table: Table) -> Table:
        """A table in which related sites are not stored together."""
        return replace(table, fixed=np.where(self.together, np.inf, table.fixed))

    def unrounded(self, table: Table, choice: Choice) -> Choice:
        """A choice that leaves out what another one does and rounds nothing of related sites."""
        able = np.isfinite(table.size) & ~self.left_out
        finest = np.where(able, table.error, np.inf).argmin(1)
        units = np.arange(len(choice.option))
        free = self.rounded[units, choice.option]
        option = np.where(free, finest, choice.option)
        return revalued(table, replace(choice, option=option))

    def learned(
        self, table: Table, whole: tuple[Choice, np.ndarray], left: tuple[Choice, np.ndarray]
    ) -> Structure:
        """The same with factors from two attempts.

        Args:
            table: as it was predicted.
            whole: a choice and the relative output error that each member then has.
            left: what `unrounded` makes of it, likewise.
        """
        parts = [self._errors(table, whole[0], mask) for mask in (self.left_out, self.rounded)]
        kept = revalued(table, whole[0]).error - sum(parts)  # of what is no relative
        before = revalued(table, left[0]).error - self._errors(table, left[0], self.left_out)
        found = np.maximum(left[1] ** 2 - before, 0.0)
        rest = np.maximum(whole[1] ** 2 - found - kept, 0.0)
        logs = [-log_ratio(p, m) for p, m in zip(parts, (found, rest), strict=True)]
        factors = [
            float(np.exp(log[p > 0].mean())) if (p > 0).any() else now
            for log, p, now in zip(logs, parts, self.factors, strict=True)
        ]
        return replace(self, factors=(factors[0], factors[1]))

    def _errors(self, table: Table, choice: Choice, mask: np.ndarray) -> np.ndarray:
        """The predicted squared error of each member that options of one kind make."""
        units = np.arange(len(choice.option))
        active = choice.taken[table.arrangement] & mask[units, choice.option]
        return (table.weight * table.error[units, choice.option][:, None])[active].sum(0)


def structure_of(groups: Sequence[Group], width: int) -> Structure:
    """The kinds of all options, before anything was measured.

    Args:
        groups: as they were tabulated.
        width: P, of the table.
    """
    together, rows = [], []
    for group in groups:
        for arrangement in group.arrangements:
            related = bool(arrangement.banks) and not group.claimed
            together.append(related)
            for unit in arrangement.units:
                out = [related and (option is None or not unit.tensors) for option in unit.options]
                rows.append(([*out, *[False] * (width - len(out))], related))
    left = np.array([row for row, _ in rows], bool).reshape(-1, width)
    own = np.array([related for _, related in rows], bool)
    return Structure(np.array(together, bool), left, own[:, None] & ~left, (LEFT_OUT, 1.0))
