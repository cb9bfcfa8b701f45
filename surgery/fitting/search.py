"""Search: the choice of precisions and shared rows that meets an error bound or a budget, as measured.

Allocations rest on predicted errors. For a bound they are corrected by what members show when they run,
member by member; a budget needs no correction, as bytes are known.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from surgery.anatomy.plan import Plan
from surgery.errors import PlanError
from surgery.fitting.allocation import Choice, Table, finest, within_bytes, within_errors
from surgery.fitting.assembly import Assembler, weights_of
from surgery.fitting.closing import Scales, log_ratio, near
from surgery.fitting.groups import make_groups, make_scene
from surgery.fitting.trial import Trial
from surgery.fitting.units import PART_BYTES, barred, tabulate
from surgery.methods.templates.arrangements import TemplateOptions
from surgery.storage.stored import Stored
from surgery.util import progress

ROUNDS = 8  # corrections of the predicted errors by the measured ones
MORE_ROUNDS = 12  # if none of them met the bound
DOUBT = 0.1  # of an artifact's bytes: a saving predicted of templates that measuring may well turn round
HEADERS = 48 * 2**10  # bytes of names and headers that a budget does not count


@dataclass(frozen=True)
class Request:
    """What a lossy fit was asked for."""

    max_error: float
    budget: float | None
    block: tuple[int, int] | None
    seed: int
    templates: TemplateOptions


@dataclass(frozen=True)
class Outcome:
    """What a search found; `sharing` is the number of bytes that sharing saved."""

    target: str
    stored: Stored
    errors: np.ndarray
    met: bool
    sharing: int


@dataclass(frozen=True)
class Attempt:
    """A choice put together and tried."""

    choice: Choice
    stored: Stored
    errors: np.ndarray


class Search:
    """Choices for some members, tried by running them."""

    def __init__(self, plan: Plan, ties: Mapping, trials: Mapping[str, Trial], request: Request):
        groups = make_groups(make_scene(trials, plan, request.block, request.seed), request.templates)
        table, units, arrangements = tabulate(groups, list(trials))
        self.apart = _apart(table)
        self.table = replace(table, fixed=np.where(barred(groups), np.inf, table.fixed))
        mixed = np.array([any(bank.stack for bank in a.banks) for a in arrangements], bool)
        self.mixed = mixed
        self.copies = np.array([max(0, len(unit.tensors) - 1) for unit in units])  # left out of each unit
        self.unmixed = replace(self.table, fixed=np.where(mixed, np.inf, self.table.fixed))
        self.fewer = any(group.shared for group in groups)  # templates than layers, whatever it costs
        self.templates = request.templates.count
        self.given = f"{self.templates} template{'s' if self.templates != 1 else ''}"
        self.assembler, self.trials = Assembler(plan, ties, units, arrangements), trials
        originals = [tensor for trial in trials.values() for tensor in trial.originals.values()]
        self.whole = sum(tensor.numel() * tensor.element_size() for tensor in originals)
        self.headers = min(PART_BYTES * len(originals), HEADERS)

    def run(self, request: Request) -> Outcome:
        """Meet what was asked for.

        Raises:
            PlanError: where a budget cannot be met.
        """
        if request.budget is not None:
            found, target = self.within_budget(request.budget), f"budget {request.budget:g}"
        else:
            found, target = self.within_error(request.max_error), f"max-error {request.max_error:g}"
        target += f" with {self.given}" if self.templates else ""
        met = request.budget is not None or bool((found.errors <= request.max_error).all())
        return Outcome(target, found.stored, found.errors, met, self.saved_by_sharing(found))

    def attempt(self, choice: Choice) -> Attempt:
        """Assemble a choice and measure it."""
        stored = self.assembler.assemble(choice)
        return Attempt(choice, stored, measure_errors(stored, self.trials))

    def within_error(self, bound: float) -> Attempt:
        """The smallest attempt whose measured errors stay within `bound`.

        Where templates are predicted to save little, layers apart are tried too, and what then is smaller counts.
        """
        spare = self.most_exact(bound) if self.fewer else None
        best = self.close_in(self.table, bound)
        if self.in_doubt(best):
            other = self.close_in(self.unmixed, bound)
            best = min(
                (each for each in (best, other) if each), key=lambda each: each.stored.nbytes, default=None
            )
        # Where predictions led nowhere, every tensor as it is.
        return best or spare or self.attempt(finest(self.apart))

    def in_doubt(self, found: Attempt | None) -> bool:
        """Whether layers apart, tried by themselves, might be better than what was found.

        Several members are then corrected one by one, as none of them draws on another's rows.
        """
        if self.fewer or not self.mixed.any():
            return False
        if found is None:
            return True
        taken = bool((found.choice.taken & self.mixed).any())
        return (taken or len(self.trials) > 1) and self.saved_by_sharing(found) < DOUBT * found.stored.nbytes

    def close_in(self, table: Table, bound: float) -> Attempt | None:
        """The smallest attempt within `bound` that a table offers, or None where none was found.

        What is measured scatters about what is predicted. So each member's prediction is corrected by the mean of
        all its measurements so far, and a scale is closed in on the largest that holds: one for each member, or
        one for all where they share rows and pull one another to and fro.
        """
        members = table.weight.shape[1]
        able = np.isfinite(table.fixed)[table.arrangement]
        coupled = bool(((table.weight[able] > 0).sum(1) > 1).any())
        best: Attempt | None = None
        seen: list[np.ndarray] = []  # log of predicted over measured squared error, by round
        scales, goal = Scales.start(members), np.full(members, bound**2)
        with progress.task("Fitting to the error bound", ROUNDS) as task:
            for number in range(ROUNDS + MORE_ROUNDS):
                found = self.attempt(within_errors(table, goal.tolist()))
                task.advance()
                held = found.errors <= bound
                met = bool(held.all())
                if met and (best is None or found.stored.nbytes < best.stored.nbytes):
                    best = found
                if best is not None and (number >= ROUNDS - 1 or (met and near(found.errors, bound, goal))):
                    break
                seen.append(log_ratio(found.choice.error, found.errors**2))
                if number:
                    scales = scales.after(np.full(members, met) if coupled else held)
                goal = scales.now * bound**2 * np.exp(np.mean(seen, 0))
        return best

    def most_exact(self, bound: float) -> Attempt:
        """The given number of templates at the members' precision.

        Raises:
            PlanError: where even that moves outputs by more than `bound`.
        """
        found = self.attempt(finest(self.table))
        over = {name: e for name, e in zip(self.trials, found.errors, strict=True) if not e <= bound}
        if over:
            raise PlanError(
                f"An error of {bound:g} cannot be met with {self.given} for each stack: in the members' precision the "
                f"output of {', '.join(f'{name} moves by {e:.3g}' for name, e in over.items())}. Use more `templates`, "
                "a larger `max_error`, or leave out `templates`, so that the error decides how many."
            )
        return found

    def within_budget(self, budget: float) -> Attempt:
        """The attempt of least predicted error within a fraction of the members' bytes.

        Where templates are predicted to save little, layers apart are tried too, and what is then more exact counts.

        Raises:
            PlanError: where nothing is so small.
        """
        choice, limit = self.of_bytes(self.table, budget)
        found = self.attempt(choice)
        if choice.nbytes > limit or found.stored.nbytes > budget * self.whole:
            least = max(found.stored.nbytes, choice.nbytes - self.headers) / self.whole
            given = f" with {self.given} for each stack" if self.templates else ""
            fewer = ", or fewer `templates`" if self.templates and self.templates > 1 else ""
            raise PlanError(
                f"A budget of {budget:g} cannot be met{given}: the smallest artifact of these members takes "
                f"{least:.3f} of their bytes; use `budget={np.ceil(least * 100 + 0.1) / 100:.2f}` or more{fewer}."
            )
        if self.in_doubt(found):
            other = self.attempt(self.of_bytes(self.unmixed, budget)[0])
            if other.stored.nbytes <= budget * self.whole:
                found = min(found, other, key=lambda each: float((each.errors**2).sum()))
        return found

    def of_bytes(self, table: Table, budget: float) -> tuple[Choice, float]:
        """The choice of least predicted error for a fraction of the members' bytes, and the bytes it was given."""
        limit = budget * self.whole + self.headers
        choice = within_bytes(table, limit)
        for _ in range(ROUNDS):  # shared rows may have fewer headers than the tensors that they stand for
            stored = self.assembler.assemble(choice)
            if stored.nbytes <= budget * self.whole:
                break
            limit -= stored.nbytes - budget * self.whole
            choice = within_bytes(table, limit)
        return choice, limit

    def saved_by_sharing(self, found: Attempt) -> int:
        """What the same predicted errors would cost more without shared rows, and copies left out."""
        apart, table = within_errors(self.apart, (found.choice.error * (1 + 1e-9)).tolist()), self.table
        copies = sum(found.stored.tensors[first].nbytes for first in found.stored.aliases.values())
        # Equal tensors of layers that come from templates are no copies any more, but apart they would be.
        mixed = np.isin(table.group[table.arrangement], table.group[found.choice.taken & self.mixed])
        size = table.size[np.arange(len(table.size)), apart.option]
        copies += round(float((size * self.copies)[mixed & apart.taken[table.arrangement]].sum()))
        saved = max(0, round(apart.nbytes - found.choice.nbytes)) + copies
        return max(
            0, min(saved, self.whole - found.stored.nbytes)
        )  # names and headers are no bytes of tensors


def measure_errors(stored: Stored, trials: Mapping[str, Trial]) -> np.ndarray:
    """Measured output error of every member with the weights of a stored form."""
    errors = []
    for name, trial in trials.items():
        trial.set_weights(weights_of(stored, name))
        errors.append(trial.error())
    return np.array(errors)


def _apart(table: Table) -> Table:
    """The table with the first arrangement of each group alone, which shares no rows."""
    first = np.r_[True, table.group[1:] != table.group[:-1]]
    return replace(table, fixed=np.where(first, table.fixed, np.inf))
