"""Search: the choice of precisions and shared rows that meets an error bound or a budget, as measured.

Allocations rest on predicted errors. For a bound they are corrected by what members show when they run,
member by member; a budget needs no correction, as bytes are known.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from surgery import progress
from surgery.errors import PlanError
from surgery.fitting.allocation import Choice, Table, finest, within_bytes, within_errors
from surgery.fitting.assembly import Assembler, weights_of
from surgery.fitting.groups import make_groups, make_scene
from surgery.fitting.template_groups import TemplateOptions
from surgery.fitting.trial import Trial
from surgery.fitting.units import PART_BYTES, barred, tabulate
from surgery.plan import Plan
from surgery.storage import Stored

ROUNDS = 8  # corrections of the predicted errors by the measured ones
MORE_ROUNDS = 12  # if none of them met the bound
SLACK = 0.97  # an error this close below its bound is close enough
GROWTH = 1.6  # of the squared errors aimed at, until the largest that holds is bracketed
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


@dataclass(frozen=True)
class Scales:
    """Scales of the squared errors aimed at, by member: now, the largest that held, the smallest that failed."""

    now: np.ndarray
    held: np.ndarray
    failed: np.ndarray

    @classmethod
    def start(cls, members: int) -> Scales:
        """Just below the bound."""
        return cls(np.full(members, SLACK**2), np.zeros(members), np.full(members, np.inf))

    def after(self, held: np.ndarray) -> Scales:
        """The next ones to try: between what held and what failed, or beyond it until there is something between."""
        low = np.where(held, np.maximum(self.held, self.now), self.held)
        high = np.where(held, self.failed, np.minimum(self.failed, self.now))
        up, down = self.now * GROWTH, self.now / GROWTH
        between = np.sqrt(np.where(low > 0, low, 1.0) * np.where(np.isfinite(high), high, 1.0))
        now = np.where(np.isfinite(high), np.where(low > 0, between, down), up)
        return Scales(now, low, high)


class Search:
    """Choices for some members, tried by running them."""

    def __init__(self, plan: Plan, ties: Mapping, trials: Mapping[str, Trial], request: Request):
        groups = make_groups(make_scene(trials, plan, request.block, request.seed), request.templates)
        table, units, arrangements = tabulate(groups, list(trials))
        self.apart = _apart(table)
        self.table = replace(table, fixed=np.where(barred(groups), np.inf, table.fixed))
        self.fewer = any(group.shared for group in groups)  # templates than layers, whatever it costs
        self.templates = request.templates.count
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
        target += f" with {self.templates} templates" if self.templates else ""
        met = request.budget is not None or bool((found.errors <= request.max_error).all())
        return Outcome(target, found.stored, found.errors, met, self.saved_by_sharing(found))

    def attempt(self, choice: Choice) -> Attempt:
        """Assemble a choice and measure it."""
        stored = self.assembler.assemble(choice)
        return Attempt(choice, stored, measure_errors(stored, self.trials))

    def within_error(self, bound: float) -> Attempt:
        """The smallest attempt whose measured errors stay within `bound`.

        What is measured scatters about what is predicted. So each member's prediction is corrected by the mean of
        all its measurements so far, and a scale is closed in on the largest that holds: one for each member, or
        one for all where they share rows and pull one another to and fro.
        """
        members = self.table.weight.shape[1]
        coupled = bool(((self.table.weight > 0).sum(1) > 1).any())
        best: Attempt | None = None
        spare = self.most_exact(bound) if self.fewer else None
        seen: list[np.ndarray] = []  # log of predicted over measured squared error, by round
        scales, goal = Scales.start(members), np.full(members, bound**2)
        with progress.task("Fitting to the error bound", ROUNDS) as task:
            for number in range(ROUNDS + MORE_ROUNDS):
                found = self.attempt(within_errors(self.table, goal.tolist()))
                task.advance()
                held = found.errors <= bound
                met = bool(held.all())
                if met and (best is None or found.stored.nbytes < best.stored.nbytes):
                    best = found
                if best is not None and (number >= ROUNDS - 1 or (met and _near(found.errors, bound, goal))):
                    break
                seen.append(_log_ratio(found.choice.error, found.errors**2))
                if number:
                    scales = scales.after(np.full(members, met) if coupled else held)
                goal = scales.now * bound**2 * np.exp(np.mean(seen, 0))
        # Predictions led nowhere: every tensor as it is.
        return best or spare or self.attempt(finest(self.apart))

    def most_exact(self, bound: float) -> Attempt:
        """The given number of templates at the members' precision.

        Raises:
            PlanError: where even that moves outputs by more than `bound`.
        """
        found = self.attempt(finest(self.table))
        over = {name: e for name, e in zip(self.trials, found.errors, strict=True) if not e <= bound}
        if over:
            raise PlanError(
                f"An error of {bound:g} cannot be met with {self.templates} templates for each stack: with all their "
                f"bits they move the output of {', '.join(f'{name} by {e:.3g}' for name, e in over.items())}. Use "
                "more --templates, a larger --max-error, or leave out --templates, so that the error decides how many."
            )
        return found

    def within_budget(self, budget: float) -> Attempt:
        """The attempt of least predicted error within a fraction of the members' bytes."""
        limit = budget * self.whole + self.headers
        choice = within_bytes(self.table, limit)
        stored = self.assembler.assemble(choice)
        for _ in range(ROUNDS):  # shared rows may have fewer headers than the tensors that they stand for
            if stored.nbytes <= budget * self.whole:
                break
            limit -= stored.nbytes - budget * self.whole
            choice = within_bytes(self.table, limit)
            stored = self.assembler.assemble(choice)
        if choice.nbytes > limit or stored.nbytes > budget * self.whole:
            least = max(stored.nbytes, choice.nbytes - self.headers) / self.whole
            given = f" with {self.templates} templates for each stack" if self.templates else ""
            fewer = ", or fewer --templates" if self.templates and self.templates > 1 else ""
            raise PlanError(
                f"A budget of {budget:g} cannot be met{given}: the smallest artifact of these members takes "
                f"{least:.3f} of their bytes; use --budget {np.ceil(least * 100 + 0.1) / 100:.2f} or more{fewer}."
            )
        return self.attempt(choice)

    def saved_by_sharing(self, found: Attempt) -> int:
        """What the same predicted errors would cost more without shared rows, and copies left out."""
        apart = within_errors(self.apart, (found.choice.error * (1 + 1e-9)).tolist())
        copies = sum(found.stored.tensors[first].nbytes for first in found.stored.aliases.values())
        return max(0, round(apart.nbytes - found.choice.nbytes)) + copies


def measure_errors(stored: Stored, trials: Mapping[str, Trial]) -> np.ndarray:
    """Measured output error of every member with the weights of a stored form."""
    errors = []
    for name, trial in trials.items():
        trial.wear(weights_of(stored, name))
        errors.append(trial.error())
    return np.array(errors)


def _log_ratio(predicted: np.ndarray, measured: np.ndarray) -> np.ndarray:
    """`log(predicted / measured)`, 0 where either tells nothing, never more than a factor of 256."""
    tells = (predicted > 0) & (measured > 0) & np.isfinite(measured)
    ratio = np.divide(predicted, measured, out=np.ones_like(predicted), where=tells)
    return np.log(np.clip(ratio, 1 / 256, 256))


def _near(errors: np.ndarray, bound: float, goal: np.ndarray) -> bool:
    return bool((errors[goal > 0] >= SLACK * bound).all())


def _apart(table: Table) -> Table:
    """The table with the first arrangement of each group alone, which shares no rows."""
    first = np.r_[True, table.group[1:] != table.group[:-1]]
    return replace(table, fixed=np.where(first, table.fixed, np.inf))
