"""Fit a dictionary to pretrained weights, without data: the smallest artifact within an error, or the best in a budget.

Three means, each reported for what it saved: *sharing* (equal tensors and blocks, principal rows of siblings, or a
fixed bank of hypermodules), *precision* (fewer bits for rows and plain tensors), and *leaving alone*. Which tensor
gets what is a Lagrangian choice (`fitting.allocation`) under estimated sensitivities, corrected until the members'
measured outputs meet the target.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from surgery import progress
from surgery.errors import PlanError
from surgery.fitting.allocation import Choice, Table, within_bytes, within_errors
from surgery.fitting.assembly import Assembler, weights_of
from surgery.fitting.fixed_bank import BankRequest, fixed_bank
from surgery.fitting.groups import make_groups, make_scene
from surgery.fitting.report import FitReport, describe, original_bytes
from surgery.fitting.trial import Trial
from surgery.fitting.units import Arrangement, tabulate
from surgery.joint import JointModel
from surgery.member import Inputs, content_hash
from surgery.plan import Plan
from surgery.probes import probe_inputs
from surgery.slots import assign
from surgery.storage import Stored, adopt, store, ties

ROUNDS = 6  # corrections of the predicted errors by the measured ones
SLACK = 0.97  # an error this close below its bound is close enough


def fit(joint: JointModel, *, max_error: float | None = None, budget: float | None = None,
        hypermodules: int | None = None, block: tuple[int, int] | None = None, context: int | None = None,
        probes: Mapping[str, Sequence[Inputs]] | None = None, seed: int = 0, device: str = "auto") -> JointModel:
    """Make a joint model small, in place; `joint.report` says what was met and what each means saved.

    Args:
        joint: as `join` returns it.
        max_error: every member's outputs stay within this relative L2 error on its probe inputs; 0 is lossless;
            0.05 where no target is given.
        budget: instead, the best quality within this fraction of the members' summed bytes.
        hypermodules: instead, a bank of exactly K hypermodules, the start for joint training.
        block: block shape of shared rows; whole matrices where not given (16x16 for a bank of K).
        context: c of a bank of K, 4 where not given.
        probes: inputs to measure on, by member; seeded made-up ones where not given.
        seed: of everything random here.
        device: `auto`, `cpu`, `cuda`, ...

    Raises:
        PlanError: several targets at once, a target out of range, a budget that cannot be met.

    Example:
        >>> joint = surgery.fit(surgery.join(members), max_error=0.02)
        >>> joint.report.errors
        {'a': 0.0196, 'b': 0.0193}
    """
    _check_target(max_error, budget, hypermodules)
    if hypermodules is not None:
        return _fit_lossy(joint, BankRequest(hypermodules, block or (16, 16), context or 4, seed), probes, device)
    if max_error == 0:
        stored, sizes = store(joint), original_bytes(joint)
        saved = {"sharing": sum(sizes.values()) - stored.nbytes, "precision": 0}
        detail = describe(stored, _originals(joint))
        report = FitReport("lossless", True, sizes, stored.nbytes, saved, dict.fromkeys(sizes, 0.0), _hashes(joint),
                           detail=detail)
        return adopt(joint, stored, report)
    bound = 0.05 if max_error is None else max_error
    return _fit_lossy(joint, _Request(bound, budget, block, seed), probes, device)


@dataclass(frozen=True)
class _Outcome:
    """What a search found; `sharing` is the number of bytes that sharing saved."""

    target: str
    stored: Stored
    errors: np.ndarray
    met: bool
    sharing: int


@dataclass(frozen=True)
class _Request:
    """What a lossy fit was asked for."""

    max_error: float
    budget: float | None
    block: tuple[int, int] | None
    seed: int


def _fit_lossy(joint: JointModel, request: _Request | BankRequest, probes: Mapping[str, Sequence[Inputs]] | None,
               device: str) -> JointModel:
    """Fit on ordinary weights; whatever goes wrong, the joint model is left as it was."""
    place, probes = pick_device(device), probes or {}
    originals, hashes, home = _originals(joint), _hashes(joint), _device(joint)
    before = (joint.plan, joint.dictionary, joint.encoded, joint.report)
    joint.vacate()
    try:
        trials = {}
        for name, member in joint.members.items():
            inputs = probes.get(name) or probe_inputs(member, seed=request.seed)
            trials[name] = Trial(member, originals[name], joint.owners[name], inputs, place)
        search = _bank_of_size if isinstance(request, BankRequest) else _search
        outcome = search(joint, before[0], trials, request)
    except BaseException:
        for name, member in joint.members.items():
            assign(member.module, originals[name], joint.owners[name])
        joint.occupy(*before)
        raise
    finally:
        joint.to(home)
    return adopt(joint, outcome.stored, _report(joint, outcome, originals, hashes, request.seed, sorted(probes)))


def _report(joint: JointModel, outcome: _Outcome, originals: Mapping[str, Mapping[str, Tensor]],
            hashes: Mapping[str, str], seed: int, given: list[str]) -> FitReport:
    sizes = {name: sum(t.numel() * t.element_size() for t in state.values()) for name, state in originals.items()}
    saved = {"sharing": outcome.sharing,
             "precision": sum(sizes.values()) - outcome.stored.nbytes - outcome.sharing}
    errors = dict(zip(joint.names, map(float, outcome.errors), strict=True))
    return FitReport(outcome.target, outcome.met, sizes, outcome.stored.nbytes, saved, errors, hashes,
                     {"seed": seed, "given": given}, describe(outcome.stored, originals))


def _search(joint: JointModel, plan: Plan, trials: Mapping[str, Trial], request: _Request) -> _Outcome:
    """Measure what can be done with every tensor, and choose."""
    sites = [p.site for p in plan.placements]
    groups = make_groups(make_scene(trials, sites, request.block, request.seed))
    table, units, arrangements = tabulate(groups, joint.names)
    assembler = Assembler(plan, ties(joint), units, arrangements)

    def attempt(choice: Choice) -> tuple[Stored, np.ndarray]:
        stored = assembler.assemble(choice)
        return stored, _errors(stored, trials)

    if request.budget is not None:
        whole = sum(t.numel() * t.element_size() for trial in trials.values() for t in trial.originals.values())
        choice, stored, errors = _meet_budget(table, attempt, whole, request.budget)
        target, met = f"budget {request.budget:g}", True
    else:
        choice, stored, errors = _meet_error(table, attempt, request.max_error)
        target, met = f"max-error {request.max_error:g}", bool((errors <= request.max_error).all())
    sharing = sum(apart - shared for apart, shared in _apart(table, arrangements, choice)) + _copied_bytes(stored)
    return _Outcome(target, stored, errors, met, round(sharing))


def _bank_of_size(joint: JointModel, plan: Plan, trials: Mapping[str, Trial], request: BankRequest) -> _Outcome:
    """A bank of K hypermodules and everything else as it is: all that is saved is saved by sharing."""
    originals = {name: trial.originals for name, trial in trials.items()}
    stored = fixed_bank(plan, originals, ties(joint), request)
    whole = sum(t.numel() * t.element_size() for state in originals.values() for t in state.values())
    target = f"{request.hypermodules} hypermodules"
    return _Outcome(target, stored, _errors(stored, trials), True, whole - stored.nbytes)


def _errors(stored: Stored, trials: Mapping[str, Trial]) -> np.ndarray:
    """Measured output error of every member with the weights of a stored form."""
    errors = []
    for name, trial in trials.items():
        trial.wear(weights_of(stored, name))
        errors.append(trial.error())
    return np.array(errors)


Attempt = Callable[[Choice], tuple[Stored, np.ndarray]]


def _meet_error(table: Table, attempt: Attempt, bound: float) -> tuple[Choice, Stored, np.ndarray]:
    """The smallest choice whose measured errors stay within `bound`; predictions are corrected by what is measured."""
    goal = np.full(table.weight.shape[1], bound**2)
    best: tuple[Choice, Stored, np.ndarray] | None = None
    with progress.task("Fitting to the error bound", ROUNDS) as task:
        for _ in range(ROUNDS):
            choice = within_errors(table, goal.tolist())
            stored, errors = attempt(choice)
            task.advance()
            if (errors <= bound).all() and (best is None or stored.nbytes < best[1].nbytes):
                best = choice, stored, errors
            if best is not None and (errors[goal > 0] >= SLACK * bound).all() and (errors <= bound).all():
                break
            ratio = np.divide(bound * (1 + SLACK) / 2, errors, out=np.full_like(errors, 4.0), where=errors > 0)
            goal = goal * np.clip(ratio, 0.25, 4.0) ** 2
    if best is None:  # predictions led nowhere: full precision is always within
        choice = within_errors(table, np.zeros_like(goal).tolist())
        stored, errors = attempt(choice)
        best = choice, stored, errors
    return best


def _meet_budget(table: Table, attempt: Attempt, whole: int, budget: float
                 ) -> tuple[Choice, Stored, np.ndarray]:
    """The choice of least predicted error within `budget` times `whole` bytes."""
    choice = within_bytes(table, budget * whole)
    if choice.nbytes > budget * whole:
        raise PlanError(f"A budget of {budget:g} cannot be met: the smallest artifact of these members takes "
                        f"{choice.nbytes / whole:.3f} of their bytes; use --budget {choice.nbytes / whole + 0.005:.2f} "
                        "or more.")
    stored, errors = attempt(choice)
    return choice, stored, errors


def _apart(table: Table, arrangements: Sequence[Arrangement], choice: Choice) -> list[tuple[float, float]]:
    """For every group stored as shared rows: its bytes apart, and its bytes shared."""
    units = np.arange(len(choice.option))
    cost = table.fixed + np.bincount(table.arrangement, table.size[units, choice.option], len(table.fixed))
    return [(cost[number - 1], cost[number]) for number, arrangement in enumerate(arrangements)
            if choice.taken[number] and arrangement.siblings is not None]


def _copied_bytes(stored: Stored) -> int:
    """Bytes of the copies of tensors that are stored once for several."""
    return sum(stored.tensors[first].nbytes for first in stored.aliases.values())


def _originals(joint: JointModel) -> dict[str, dict[str, Tensor]]:
    return {name: {first: state[first] for first in joint.owners[name]}
            for name in joint.names for state in [joint.collapse(name)]}


def _hashes(joint: JointModel) -> dict[str, str]:
    return {name: content_hash(joint.collapse(name)) for name in joint.names}


def _check_target(max_error: float | None, budget: float | None, hypermodules: int | None) -> None:
    given = [name for name, value in (("--max-error", max_error), ("--budget", budget),
                                      ("--hypermodules", hypermodules)) if value is not None]
    if len(given) > 1:
        raise PlanError(f"One target is needed, found {' and '.join(given)}; give only one of them.")
    if max_error is not None and not (math.isfinite(max_error) and max_error >= 0):
        raise PlanError(f"--max-error must be 0 or more, found {max_error}; 0 is lossless, 0.05 the default.")
    if budget is not None and not 0 < budget <= 1:
        raise PlanError(f"--budget must be above 0 and at most 1, found {budget}: it is a fraction of the bytes.")
    if hypermodules is not None and hypermodules < 1:
        raise PlanError(f"--hypermodules must be at least 1, found {hypermodules}.")


def pick_device(device: str) -> torch.device:
    """`auto` is the accelerator where there is one.

    Raises:
        PlanError: where the device is not there.
    """
    if device == "auto":
        return torch.device(torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise PlanError(f"Device '{device}' is not available here ({str(error).splitlines()[0]}); "
                        "use --device cpu or auto.") from error


def _device(joint: JointModel) -> torch.device:
    return next((p.device for p in joint.parameters()), torch.device("cpu"))
