"""Search: the choice of precisions and shared rows that meets an error bound or a budget, as measured.

Allocations rest on predicted errors. For a bound they are corrected by what members show when they run,
member by member; a budget needs no correction, as bytes are known.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from surgery.core.registry import methods_of
from surgery.errors import PlanError
from surgery.fitting.allocation import finest, of_each, within_bytes, within_errors
from surgery.fitting.assembly import Assembler
from surgery.fitting.attempts import Attempt, Attempts, better
from surgery.fitting.closing import SLACK, Bracket, Scales, log_ratio, near
from surgery.fitting.groups import make_groups
from surgery.fitting.scene import Scene
from surgery.fitting.structure import structure_of
from surgery.fitting.tabulated import Choice, Table
from surgery.fitting.units import (
    Group,
    Unit,
    barred,
    doubtful,
    tabulate,
)
from surgery.settings.target import MAX_ERROR
from surgery.storage.codecs import Encoded
from surgery.storage.stored import Stored
from surgery.util import progress
from surgery.util.wording import more_than, rounded_up

ROUNDS = 8  # corrections of what is predicted by what is measured
MORE_ROUNDS = 12  # if none of them met the bound
CORRECTIONS = 2  # of what is predicted of related sites within a budget
DOUBT = (
    0.1  # of an artifact's bytes: a saving predicted of what methods share that measuring may well turn round
)
FAR = 3.0  # times the measured errors: what rounding apart is predicted to cost where measuring it is a waste of time
FULL, FILLED = 0.99, 2  # share of a budget that is enough, and how often more of it is tried
NARROW = 0.05  # of the bytes of one more member, or of its bound: nearer is not worth an attempt
FAIR = 0.75  # of a bound: an error below it and just above fewer bytes that failed may be the odd one


@dataclass(frozen=True)
class Outcome:
    """What a search found; `sharing` is the number of bytes that sharing saved."""

    target: str
    stored: Stored
    errors: np.ndarray
    met: bool
    sharing: int


def search(
    scene: Scene,
    ties: Mapping,
    groups: Sequence[Group] | None = None,
    present: Sequence[tuple[Unit, Encoded]] = (),
) -> Outcome:
    """Meet an error bound or a budget.

    Args:
        scene: what is being fitted.
        ties: as `surgery.storage.stored.ties` returns them.
        groups: what to choose from; by default everything that members have, alone and together.
        present: units of these that are stored already, as they are: they cost nothing.

    Raises:
        PlanError: where a budget or an error cannot be met.
    """
    return Search(scene, ties, groups, present).run()


class Search:
    """Choices for some members, tried by running them."""

    def __init__(
        self,
        scene: Scene,
        ties: Mapping,
        groups: Sequence[Group] | None = None,
        present: Sequence[tuple[Unit, Encoded]] = (),
    ):
        groups = make_groups(scene) if groups is None else groups
        table, units, arrangements = tabulate(groups, list(scene.trials))
        self.scene, self.trials = scene, scene.trials
        self.apart = _apart(table)
        self.predicted = replace(table, fixed=np.where(barred(groups), np.inf, table.fixed))
        self.structure = structure_of(groups, table.size.shape[1])
        self.doubtful = doubtful(groups)
        self.copies = np.array([max(0, len(unit.tensors) - 1) for unit in units])  # left out of each unit
        self.fixed = any(group.shared for group in groups)  # whatever it costs
        self.given = scene.given
        assembler = Assembler(scene.plan, ties, units, arrangements)
        for unit, encoded in present:
            assembler.give(unit, encoded)
        self.attempts = Attempts(scene, assembler, table.arrangement, [encoded for _, encoded in present])
        self.whole, self.headers = self.attempts.whole, self.attempts.headers

    def run(self) -> Outcome:
        """Meet what was asked for.

        Raises:
            PlanError: where a budget or an error cannot be met.
        """
        budget = self.scene.target.budget
        bound = MAX_ERROR if self.scene.target.max_error is None else self.scene.target.max_error
        if budget is not None:
            found, target = self.within_budget(budget), f"budget {budget:g}"
        else:
            found, target = self.within_error(bound), f"max-error {bound:g}"
        target += f" with {self.given}" if self.given else ""
        return Outcome(target, found.stored, found.errors, True, self.saved_by_sharing(found))

    @property
    def table(self) -> Table:
        """What there is to choose from, with errors as far as they were measured."""
        return self.structure.apply(self.predicted)

    @property
    def unshared(self) -> Table:
        """The same without what methods share."""
        return replace(self.table, fixed=np.where(self.doubtful, np.inf, self.table.fixed))

    def within_error(self, bound: float) -> Attempt:
        """The smallest attempt whose measured errors stay within `bound`.

        Where what methods share is predicted to save little, all of it apart is tried too, and what then is smaller
        counts.

        Raises:
            PlanError: where outputs move by more, whatever the precision.
        """
        if self.scene.replaced:
            errors = {name: trial.error() for name, trial in self.trials.items()}
            check_bound(errors, bound, self.given, self.advice())
        spare = self.most_exact(bound) if self.fixed else None
        if self.structure.together.any() and not self.scene.beside:
            self.learn(
                self.attempts.make(within_errors(self.table, [SLACK**2 * bound**2] * len(self.trials)))
            )
        best = self.close_in(self.table, bound)
        if self.in_doubt(best):
            other = self.close_in(self.unshared, bound)
            best = min((each for each in (best, other) if each), key=lambda each: each.nbytes, default=None)
        if self.structure.together.any():
            best = self.smallest_of_related(best, bound)
        if best := best or spare:
            return best
        best = self.attempts.make(finest(self.apart))  # predictions led nowhere: every tensor as it is
        check_bound(dict(zip(self.trials, best.errors, strict=True)), bound, self.given, self.advice())
        return best

    def smallest_of_related(self, found: Attempt | None, bound: float) -> Attempt | None:
        """The smaller one of an attempt within a bound and of related sites each apart."""
        apart = self.structure.apart(self.table)
        if found is not None and self.is_far(apart, found):
            return found
        if found is not None:
            other = self.attempts.make(self.of_bytes(apart, found.counted / self.whole))
            if other.nbytes > found.nbytes or not (other.errors <= bound).all():
                return found
        other = self.close_in(apart, bound)
        return min((each for each in (found, other) if each), key=lambda each: each.nbytes, default=None)

    def is_far(self, table: Table, found: Attempt) -> bool:
        """Whether every member is predicted to move much more by a table's best choice of as many bytes.

        What rounding alone costs is predicted well up to errors as large as the outputs themselves, beyond which it
        says no more than that; to encode all of it again takes as long as everything else.
        """
        predicted = np.minimum(within_bytes(table, found.counted + self.headers).error, 1.0)
        return bool((predicted > (FAR * found.errors) ** 2).all())

    def is_together(self, found: Attempt) -> bool:
        """Whether related sites are stored together in what was found."""
        return bool((found.choice.taken & self.structure.together).any())

    def learn(self, found: Attempt) -> None:
        """Correct what is predicted of related sites by what an attempt shows."""
        if self.is_together(found):
            left = self.attempts.make(self.structure.unrounded(self.predicted, found.choice))
            pairs = [(each.choice, each.errors) for each in (found, left)]
            self.structure = self.structure.learned(self.predicted, *pairs)

    def in_doubt(self, found: Attempt | None) -> bool:
        """Whether what methods share, each tensor apart, might be better than what was found.

        Several members are then corrected one by one, as none of them draws on another's rows.
        """
        if self.fixed or not self.doubtful.any():
            return False
        if found is None:
            return True
        taken = bool((found.choice.taken & self.doubtful).any())
        return (taken or len(self.trials) > 1) and self.saved_by_sharing(found) < DOUBT * found.nbytes

    def close_in(self, table: Table, bound: float) -> Attempt | None:
        """The smallest attempt within `bound` that a table offers, or None where none was found.

        What is measured scatters about what is predicted. So each member's prediction is corrected by the mean of
        all its measurements so far, and a scale is closed in on the largest that holds: one for each member, or
        one for all where they share rows and pull one another to and fro. Of several members that share nothing
        hardly ever all hold in one round: each then takes what it had where it held.
        """
        if self.scene.beside and len(self.trials) == 1:
            return self.close_in_on_one(table, bound)
        members = table.weight.shape[1]
        able = np.isfinite(table.fixed)[table.arrangement]
        coupled = bool(((table.weight[able] > 0).sum(1) > 1).any())
        best: Attempt | None = None
        own: dict[int, tuple[float, Choice]] = {}  # of each member its largest error that held
        seen: list[np.ndarray] = []  # log of predicted over measured squared error, by round
        scales, goal = Scales.start(members), np.full(members, bound**2)
        with progress.task("Fitting to the error bound", ROUNDS) as task:
            for number in range(ROUNDS + MORE_ROUNDS):
                found = self.attempts.make(within_errors(table, goal.tolist()))
                task.advance()
                held = found.errors <= bound
                met = bool(held.all())
                if met and (best is None or found.nbytes < best.nbytes):
                    best = found
                for each in np.nonzero(held)[0].tolist():
                    if each not in own or found.errors[each] > own[each][0]:
                        own[each] = float(found.errors[each]), found.choice
                if best is None and number >= ROUNDS - 1 and len(own) == members > 1:
                    each_own = of_each(table, [own[each][1] for each in range(members)])
                    if (
                        each_own
                        and (joined := self.attempts.make(each_own))
                        and (joined.errors <= bound).all()
                    ):
                        best = joined
                if best is not None and (number >= ROUNDS - 1 or (met and near(found.errors, bound, goal))):
                    break
                seen.append(log_ratio(found.choice.error, found.errors**2))
                if number:
                    scales = scales.after(np.full(members, met) if coupled else held)
                goal = scales.now * bound**2 * np.exp(np.mean(seen, 0))
        return best

    def close_in_on_one(self, table: Table, bound: float) -> Attempt | None:
        """As `close_in`, of one member beside others, which takes few bytes: a few percent of these end the search.

        What two attempts show tells where to go on: how errors scatter is not worth more attempts.
        """
        best, over = None, -math.inf  # bytes of the largest attempt beyond the bound
        bracket, goal = Bracket(), SLACK**2 * bound**2
        with progress.task("Fitting to the error bound", ROUNDS) as task:
            for number in range(ROUNDS + MORE_ROUNDS):
                found = self.attempts.make(within_errors(table, [goal]))
                task.advance()
                error = float(found.errors[0])
                bracket = bracket.after(goal, error, bound)
                if error > bound:
                    over = max(over, found.nbytes)
                elif best is None or found.nbytes < best.nbytes:
                    best = found
                if best is not None and (number >= ROUNDS - 1 or self.is_close(best, over, bound, number)):
                    break
                goal = bracket.next(bound)
        return best

    @staticmethod
    def is_close(found: Attempt, over: float, bound: float, number: int) -> bool:
        """Whether a member within `bound` could hardly be smaller, where all of `over` bytes at most were beyond it."""
        error = float(found.errors[0])
        narrow = found.nbytes - over <= NARROW * found.nbytes
        fair = error >= FAIR * bound or number >= ROUNDS // 2
        return (narrow and fair) or error >= (1 - NARROW) * bound

    def most_exact(self, bound: float) -> Attempt:
        """What settings fix, in the members' precision.

        Raises:
            PlanError: where even that moves outputs by more than `bound`.
        """
        found = self.attempts.make(finest(self.table))
        check_bound(dict(zip(self.trials, found.errors, strict=True)), bound, self.given, self.advice())
        return found

    def advice(self) -> str:
        """How an error that cannot be met could be."""
        if not (levers := self.levers()):
            return advice_on_bound(self.given)
        return (
            f"Use more {' or '.join(levers)}, a larger `max_error`, or leave out {' and '.join(levers)}, so that the "
            "error decides how many."
        )

    def levers(self, above: int = 0) -> list[str]:
        """The settings that fix how many are made, where they are above a number."""
        found = []
        for method in methods_of(self.scene.plan):
            if method.lever and method.name in self.scene.asked:
                said = {**dict(self.scene.target), **self.scene.plan.of_method(method.name).banks[0].settings}
                found += [f"`{method.lever}`"] * (said[method.lever] > above)
        return found

    def within_budget(self, budget: float) -> Attempt:
        """The attempt of least predicted error within a fraction of the members' bytes.

        Where what methods share is predicted to save little, all of it apart is tried too, and what is then more exact
        counts.

        Raises:
            PlanError: where nothing is so small.
        """
        found = self.attempts.make(self.of_bytes(self.table, budget))
        if found.counted > budget * self.whole:
            found = self.attempts.make(within_bytes(self.table, 0))
        if (least := found.counted / self.whole) > budget:
            given = f" with {self.given}" if self.given else ""
            fewer = f", or fewer {' or '.join(levers)}" if (levers := self.levers(above=1)) else ""
            use = f"`budget={enough:g}` or more" if (enough := rounded_up(least)) <= 1 else "`max_error`"
            raise PlanError(
                f"A budget of {budget:g} cannot be met{given}: the smallest artifact of these members takes "
                f"{more_than(least, budget)} of their bytes; use {use}{fewer}."
            )
        if self.in_doubt(found):
            other = self.attempts.make(self.of_bytes(self.unshared, budget))
            if other.counted <= budget * self.whole:
                found = min(found, other, key=lambda each: float((each.errors**2).sum()))
        return self.most_exact_of_related(found, budget)

    def most_exact_of_related(self, found: Attempt, budget: float) -> Attempt:
        """The better one of an attempt, what its measured errors lead to, and related sites each apart."""
        if not self.is_together(found):
            return found
        for _ in range(CORRECTIONS):
            self.learn(found)
            other = self.attempts.make(self.of_bytes(self.table, budget))
            if other.counted > budget * self.whole or not better(other, found):
                break
            found = other
        if self.is_far(apart := self.structure.apart(self.table), found):
            return found
        other = self.attempts.make(self.of_bytes(apart, budget))
        return found if other.counted > budget * self.whole or better(found, other) else other

    def of_bytes(self, table: Table, budget: float) -> Choice:
        """The choice of least predicted error for a fraction of the members' bytes.

        What a choice takes shows when it is encoded: coding depends on values, and shared rows may have fewer headers
        than the tensors that they stand for, or more. So the limit of what is predicted is moved until it fits.
        """
        related = bool(np.isfinite(table.fixed[self.structure.together]).any())
        limit, allowed = budget * self.whole + self.headers, budget * self.whole
        choice, best, most = within_bytes(table, limit, common=related), None, -1
        for number in range(ROUNDS):
            nbytes = self.attempts.counted_of(choice)
            if most < nbytes <= allowed:
                best, most = choice, nbytes
            if best is not None and (number >= FILLED or nbytes >= FULL * allowed):
                break
            over = nbytes - allowed
            # Down faster and faster: choices come in steps.
            limit -= over * (1 + number) if over > 0 else over
            following = within_bytes(table, limit, common=related)
            if best is not None and np.array_equal(following.option, choice.option):
                break
            choice = following
        return choice if best is None else best

    def saved_by_sharing(self, found: Attempt) -> int:
        """What the same predicted errors would cost more without shared rows, and copies left out."""
        apart, table = within_errors(self.apart, (found.choice.error * (1 + 1e-9)).tolist()), self.table
        copies = sum(found.stored.tensors[first].nbytes for first in found.stored.aliases.values())
        # Equal tensors that a method generates are no copies any more, but apart they would be.
        generated = np.isin(table.group[table.arrangement], table.group[found.choice.taken & self.doubtful])
        size = table.size[np.arange(len(table.size)), apart.option]
        copies += round(float((size * self.copies)[generated & apart.taken[table.arrangement]].sum()))
        saved = max(0, round(apart.nbytes - found.choice.nbytes)) + copies
        return max(0, min(saved, self.whole - found.nbytes))  # names and headers are no bytes of tensors


def check_bound(errors: Mapping[str, float], bound: float, given: str, advice: str) -> None:
    """Refuse an error bound that outputs do not keep to even in the members' precision.

    Args:
        errors: of members, measured.
        bound: that was asked for.
        given: what settings fix, in words.
        advice: how the bound could be met.

    Raises:
        PlanError: naming the members and their errors.
    """
    over = {name: error for name, error in errors.items() if not error <= bound}
    if over:
        moved = ", ".join(f"{name} moves by {more_than(error, bound)}" for name, error in over.items())
        raise PlanError(
            f"An error of {bound:g} cannot be met{f' with {given}' if given else ''}: in the members' precision the "
            f"output of {moved}. {advice}"
        )


def advice_on_bound(given: str) -> str:
    """How an error that cannot be met could be, where no parameter of a recipe fixes what is made.

    Args:
        given: what settings fix, in words.
    """
    return f"{'Change the `settings` of the method, or use' if given else 'Use'} a larger `max_error`."


def _apart(table: Table) -> Table:
    """The table with the first arrangement of each group alone, which shares no rows."""
    first = np.r_[True, table.group[1:] != table.group[:-1]]
    return replace(table, fixed=np.where(first, table.fixed, np.inf))
