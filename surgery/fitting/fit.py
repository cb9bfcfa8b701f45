"""Fit a dictionary to pretrained weights, without data: the smallest artifact within an error, or the best in a budget.

Three means, each reported for what it saved: *sharing* (equal tensors and blocks, related sites together, what methods
share), *precision* (fewer bits for parts of banks and plain tensors), and *leaving alone*. Which tensor gets what is a
Lagrangian choice (`fitting.allocation`) under estimated sensitivities, corrected until the members' measured outputs
meet the target (`fitting.search`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surgery.anatomy.plan import Plan
from surgery.core.dictionary import Dictionary
from surgery.core.generation import to_blocks
from surgery.core.joint import JointModel
from surgery.core.known import Known
from surgery.core.registry import with_settings
from surgery.core.replacing import still_replaced
from surgery.core.sizes import bytes_alone, parameters_alone
from surgery.disk.aside import aside
from surgery.disk.files import failure
from surgery.errors import OutputError, PlanError
from surgery.fitting.bound import fits, within
from surgery.fitting.exactly import make_exactly
from surgery.fitting.learning import inputs_to_learn_from, warn_of_few
from surgery.fitting.recording import recipe_of_fit
from surgery.fitting.report import FitReport, Probes, describe, describe_stacks
from surgery.fitting.scene import Scene, as_asked, asked_of
from surgery.fitting.search import advice_on_bound, check_bound, search
from surgery.fitting.trial import Trial, to_device
from surgery.fitting.variation import warn_of_faint
from surgery.handles.state import LazyState
from surgery.inputs.probes import outputs_over, probe_inputs, relative_error
from surgery.members.member import Inputs, content_hash, whole_state
from surgery.members.replacement import count_replaced
from surgery.settings.names import PARAMETERS_OF, Mixing
from surgery.settings.quantities import Seed
from surgery.settings.resources import Resources
from surgery.settings.target import Target, warn_of_percentage
from surgery.slots.collapse import collapsed
from surgery.slots.slots import assign
from surgery.storage.codecs import NATIVE, stored_bytes
from surgery.storage.states import lazy_state_of, same_state
from surgery.storage.stored import Stored, adopt, compressed, expand, extra, store, ties
from surgery.storage.trim import trim
from surgery.util import memory as held_memory
from surgery.util.devices import pick_device
from surgery.util.modules import device_of, kept_modes
from surgery.util.wording import size


class Asked(Target):
    """What is asked of one fit: the target, and the seed."""

    seed: Seed = 0


def fit(
    joint: JointModel,
    *,
    max_error: float | None = None,
    budget: float | None = None,
    hypermodules: int | None = None,
    block: tuple[int, int] | None = None,
    context: int | None = None,
    templates: int | None = None,
    mixture: Mixing | None = None,
    settings: Mapping[str, Any] | None = None,
    probes: Mapping[str, Sequence[Inputs]] | None = None,
    seed: int = 0,
    device: str = "auto",
    memory: int | str | None = None,
    folder: str | Path | None = None,
) -> JointModel:
    """Compress a joint model in place, to an error bound or to a size, without training data.

    `joint.report` then says whether the target was met, every member's measured error, and how many bytes sharing
    between members and fewer bits saved. Members whose outputs hardly differ between inputs are warned of where that
    error may be most of what they tell.

    Of `max_error`, `budget` and `hypermodules` at most one is given. Without any, the bound is `max_error=0.05`; but
    where modules were replaced, or the plan is of a method whose settings say what it makes (a rank, a number of
    templates), exactly this is made, at the members' precision.

    Args:
        joint: as `join` returns it.
        max_error: the most that any member's outputs may move on its probe inputs, as relative L2 error; 0 is lossless.
        budget: the most bytes, as a fraction of the members' together; within it outputs move as little as possible.
            The manifest and members' small files come on top.
        hypermodules: K for a bank of exactly K hypermodules, the start for joint training.
        block: rows and columns of the blocks that are shared; by default whole matrices, or 16x16 with `hypermodules`.
        context: basis blocks of a hypermodule (c in MUiR), with `hypermodules`; 4 by default.
        templates: K templates for each stack, in place of what a plan of templates says. With an error bound or a
            budget precisions follow from that, and where K is given nowhere, so does K.
        mixture: of templates, in place of what the plan says: `linear`, `softmax`, or `one-hot`, which ties layers.
        settings: of the plan's method, in place of those that it was planned with, also `templates` and `mixture`.
        probes: inputs to learn from and to compare outputs on, by member, 64 or more of each; by default made up from
            the seed, others to learn from than to compare on.
        seed: of everything that is drawn at random.
        device: where the fit computes: `auto`, `cpu`, `cuda`, ...
        memory: the most that the process may hold besides pages of files, in bytes or as text such as `8GiB`.
        folder: on a disk with room, for large tensors that the fit makes; with `memory` it is used where they would
            not fit otherwise. Its files have no names, so it looks empty all the time.

    Raises:
        PlanError: several targets at once, a target out of range, a budget or an error that cannot be met; the joint
            model is then what it was.
        MemoryLimitError: where more than `memory` was held after all; likewise.
        OutputError: where the disk has no room; likewise.

    Example:
        >>> import surgery
        >>> members = [surgery.load_member("text=./text"), surgery.load_member("vision=./vision")]
        >>> joint = surgery.fit(surgery.join(members), max_error=0.02)
        >>> joint.report.met, max(joint.report.errors.values()) <= 0.02
        (True, True)
    """
    asked = Asked.of(
        {
            "max_error": max_error,
            "budget": budget,
            "hypermodules": hypermodules,
            "block": block,
            "context": context,
            "seed": seed,
        }
    )
    _check_request(joint, asked, probes)
    warn_of_percentage(max_error)
    place = pick_device(device)
    own = {
        name: value for name, value in (("templates", templates), ("mixture", mixture)) if value is not None
    }
    plan = with_settings(joint.plan, {**(settings or {}), **own})
    replaced, made = still_replaced(joint.members.values()), bool(asked_of(plan, asked))
    fixed, free = made or bool(replaced), asked.max_error is None and asked.budget is None
    recipe = recipe_of_fit(
        joint.known, joint.members, plan, asked, seed=seed, device=device, measured=bool(probes), fixed=fixed
    )
    exactly = not made and (asked.max_error == 0 or (fixed and free))
    with _held(joint, Resources.of({"memory": memory}).memory, folder, lossless=exactly):
        if exactly:
            _adopt(joint, _lossless(joint, probes or {}, asked, replaced))
        else:
            _adopt(joint, _fitted(joint, plan, asked, probes, place))
    joint.recipe = recipe
    return joint


@contextmanager
def _held(
    joint: JointModel, memory: int | None, folder: str | Path | None, *, lossless: bool
) -> Iterator[None]:
    """Inside, a fit is stopped where it holds more than `memory`, and keeps what it makes in `folder` where it has to.

    Raises:
        PlanError: where it has to and no folder is given, or would hold more all the same.
        OutputError: where the folder cannot be made.
    """
    files = folder is not None
    if memory is not None:
        states = {name: _by_owner(joint, name, collapsed(joint, name)) for name in joint.names}
        elements = [math.prod(h.shape) for state in states.values() for h in state.handles.values()]
        files = not fits(elements, memory, lossless=lossless)
        if files and folder is None:
            raise PlanError(
                f"`memory` is {size(memory)}, within which a fit of these members keeps what it makes in files: give "
                "a `folder` for them, on a disk with room."
            )
    with ExitStack() as inside:
        if memory is not None:
            inside.enter_context(within(memory))
        if files and folder is not None:
            place = Path(folder).expanduser()
            try:
                place.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise OutputError(failure(place, error)) from error
            inside.enter_context(aside(place))
        yield


@dataclass(frozen=True)
class Fitted:
    """What a joint model is given by a fit; whatever else the fit held is let go of before.

    Attributes:
        stored: what it made.
        report: of it.
        before: what was known before it.
        hashes: of each member's weights before it.
        kept: members whose weights are known to be what they were.
    """

    stored: Stored
    report: FitReport
    before: Known
    hashes: Mapping[str, str]
    kept: Collection[str] = ()


def _lossless(
    joint: JointModel, probes: Mapping[str, Sequence[Inputs]], asked: Asked, replaced: Sequence[str]
) -> Fitted:
    """Equal tensors and blocks once, and nothing rounded.

    Args:
        joint: to be stored.
        probes: given inputs, by member.
        asked: an error of 0, or no target.
        replaced: methods of modules that were replaced, one for each.

    Raises:
        PlanError: where an error of 0 was asked for, and modules that were replaced move outputs.
    """
    errors = _errors_of_replacing(joint, probes, asked.seed)
    if asked.max_error == 0:
        check_bound(errors, 0, given := count_replaced(replaced), advice_on_bound(given))
    stored, states = trim(store(joint)), {name: collapsed(joint, name) for name in joint.names}
    originals = {name: _by_owner(joint, name, state) for name, state in states.items()}
    precision = sum(
        stored_bytes(each.shape, each.dtype, NATIVE) - each.nbytes for each in stored.tensors.values()
    )
    stacks = describe_stacks(joint.plan, stored, originals)
    before, was = joint.known, _as_they_were(joint)
    target = "lossless" if asked.max_error == 0 else count_replaced(replaced)
    measured = (
        Probes(asked.seed, tuple(sorted(name for name in probes if probes[name]))) if replaced else None
    )
    report = _report(
        target, True, stored, originals, precision, errors, was, before.original, measured, stacks
    )
    plain = [name for name, member in joint.members.items() if not member.replaced]
    kept = [name for name in plain if same_state(states[name], lazy_state_of(stored, name))]
    return Fitted(stored, report, before, was.hashes, kept)


def _fitted(
    joint: JointModel,
    plan: Plan,
    asked: Asked,
    probes: Mapping[str, Sequence[Inputs]] | None,
    place: torch.device,
) -> Fitted:
    """Fit on ordinary weights, which the modules then hold alone; what goes wrong leaves the joint model as it was."""
    given = {name: batches for name, batches in (probes or {}).items() if batches}
    planned, known, was = joint.plan, joint.known, _as_they_were(joint)
    with _on_originals(joint) as originals:
        trials = {}
        for name, member in joint.members.items():
            inputs = given.get(name) or probe_inputs(member, seed=asked.seed)
            others = inputs_to_learn_from(member, originals[name], asked.seed, given.get(name, ()))
            trials[name] = Trial(member, originals[name], joint.owners[name], inputs, place, others)
        replaced = still_replaced(joint.members.values())
        scene = Scene(trials, as_asked(plan), asked, asked.seed, replaced, frozenset(given))
        free = asked.max_error is None and asked.budget is None
        made = make_exactly if free and scene.asked else search
        outcome = made(scene, ties(joint))
    stored = trim(outcome.stored)
    precision = sum(bytes_alone(stored).values()) - stored.nbytes - outcome.sharing
    errors = dict(zip(joint.names, map(float, outcome.errors), strict=True))
    variations = {name: v for name, trial in trials.items() if (v := trial.variation()) is not None}
    warn_of_faint(errors, variations)
    warn_of_few(given)
    measured = Probes(asked.seed, tuple(sorted(given)))
    stacks = describe_stacks(planned, stored, originals)
    report = _report(
        outcome.target, outcome.met, stored, originals, precision, errors, was, known.original, measured, stacks,
        variations,
    )  # fmt: skip
    return Fitted(stored, report, known, was.hashes)


@contextmanager
def _on_originals(joint: JointModel) -> Iterator[dict[str, Mapping[str, Tensor]]]:
    """Inside, modules have no slots and hold ordinary weights, in evaluation mode; yields these, by first owner.

    Afterwards they hold these weights again, where and in the modes in which they were, until the joint model is given
    what was fitted; after an exception it is as it was.
    """
    resting, home = joint.dictionary.resting(), device_of(joint)
    states = {name: collapsed(joint, name) for name in joint.names}  # nothing is made yet
    before = plan, dictionary, _, _ = joint.plan, joint.dictionary, joint.encoded, joint.known
    originals: dict[str, Mapping[str, Tensor]] = {}
    given_up: list[Callable[[], None]] = []
    joint.vacate()
    try:
        for name, state in states.items():
            originals[name] = _by_owner(joint, name, state).resident(writable=False)
        states.clear()
        dictionary.rest(resting)
        given_up = _give_up(plan, dictionary, originals)
        held_memory.give_back()
        with kept_modes(joint.bodies.modules()):
            joint.bodies.eval()  # a forward pass in training mode would change buffers, and drop at random
            yield originals
    except BaseException:
        for take_back in given_up:
            take_back()
        _back_home(joint, originals, home)
        originals.clear()
        held_memory.give_back()
        joint.occupy(*before)
        raise
    _back_home(joint, originals, home)


def _back_home(joint: JointModel, originals: Mapping[str, Mapping[str, Tensor]], home: torch.device) -> None:
    """Give modules without slots their original weights, and the device that they had before trials.

    Weights on trial are not moved: where members are larger than memory there is no room for them.
    """
    for name, tensors in originals.items():
        assign(joint[name], tensors, joint.owners[name])
    joint.to(home)


def _give_up(
    plan: Plan, dictionary: Dictionary, originals: Mapping[str, Mapping[str, Tensor]]
) -> list[Callable[[], None]]:
    """Free the rows of a dictionary that repeat the original weights; returns what restores them, bank by bank."""

    def blocks(key: str) -> Iterator[tuple[int, Tensor]]:
        for p in plan.placements:
            if p.bank == key:
                yield p.start, to_blocks(originals[p.site.member][p.site.name], p)

    freed = (dictionary[key].give_up(partial(blocks, key)) for key in dictionary if not dictionary.rests(key))
    return [take_back for take_back in freed if take_back]


def _adopt(joint: JointModel, fitted: Fitted) -> None:
    """Give a joint model what was fitted, with what is now known of it: the report describes these weights alone."""
    stored, before = replace(fitted.stored, extra=extra(joint)), fitted.before
    described = {
        name: fitted.hashes[name] if name in fitted.kept else content_hash(lazy_state_of(stored, name))
        for name in joint.names
    }
    unmoved = {name for name in joint.names if described[name] == fitted.hashes[name]}
    same = frozenset(before.original) & unmoved
    sources = {name: folder for name, folder in before.sources.items() if name in unmoved}
    joint.forget_originals()  # what the fit compared with
    forms = compressed(stored.plan, expand(stored))
    adopt(joint, stored, Known(fitted.report, None, described, same, forms, sources=sources))


def _report(
    target: str,
    met: bool,
    stored: Stored,
    originals: Mapping[str, Mapping[str, Tensor]],
    precision: int,
    errors: Mapping[str, float],
    was: AsTheyWere,
    known: Collection[str],
    probes: Probes | None = None,
    stacks: Mapping[str, Any] | None = None,
    variations: Mapping[str, float] | None = None,
) -> FitReport:
    sizes = bytes_alone(stored)
    saved = {"sharing": sum(sizes.values()) - stored.nbytes - precision, "precision": precision}
    whole = {**sizes, **was.nbytes}
    if was.nbytes:
        saved["replacing"] = sum(whole.values()) - sum(sizes.values())
    # An origin can be known by its hash: of members whose weights are still the origin's.
    hashes = {name: found for name, found in was.hashes.items() if name in known}
    detail = describe(stored, originals)
    return FitReport(
        target, met, whole, stored.nbytes, saved, errors, hashes, probes or Probes(), detail, stacks or {},
        was.parameters, variations=variations or {},
    )  # fmt: skip


def _by_owner(joint: JointModel, name: str, state: LazyState) -> LazyState:
    """A member's tensors by first owner."""
    return LazyState({first: state.entries[first] for first in joint.owners[name]})


@dataclass(frozen=True)
class AsTheyWere:
    """Members before a fit, and before modules of them were replaced where these are still kept.

    Attributes:
        hashes: of each member's weights.
        parameters: of each member.
        nbytes: of each member in which modules were replaced.
    """

    hashes: Mapping[str, str]
    parameters: Mapping[str, int]
    nbytes: Mapping[str, int]


def _as_they_were(joint: JointModel) -> AsTheyWere:
    hashes = {}
    for name, member in joint.members.items():
        if all(each.original is None for each in member.replaced):
            hashes[name] = content_hash(collapsed(joint, name))
            continue
        hashes[name] = content_hash(whole_state(joint.original(name)))
    nbytes = {name: each.alone.nbytes for name, each in joint.members.items() if each.alone is not None}
    return AsTheyWere(hashes, parameters_alone(joint), nbytes)


def _errors_of_replacing(
    joint: JointModel, probes: Mapping[str, Sequence[Inputs]], seed: int
) -> dict[str, float]:
    """How far the outputs of members moved with modules replaced, and nothing else: 0 where none was."""
    errors = dict.fromkeys(joint.names, 0.0)
    for name, member in joint.members.items():
        if still_replaced([member]):
            device = device_of(joint)
            inputs = [to_device(each, device) for each in probes.get(name) or probe_inputs(member, seed=seed)]
            original, module = joint.original(name).eval(), joint.copy_member(name).module.eval()
            errors[name] = relative_error(outputs_over(original, inputs), outputs_over(module, inputs))
    return errors


def _check_request(joint: JointModel, asked: Asked, probes: Mapping[str, Sequence[Inputs]] | None) -> None:
    """Refuse what the plan or the members have no use for.

    Raises:
        PlanError: naming it.
    """
    leading = joint.plan.method
    for method, names in PARAMETERS_OF.items():
        if (given := [name for name in names if getattr(asked, name)]) and method != leading:
            raise PlanError(
                f"`{given[0]}` needs `method={method}`, but this joint model was planned by method {leading}."
            )
    if unknown := sorted({*(probes or {})} - {*joint.names}):
        raise PlanError(
            f"Probe inputs need members, found {', '.join(unknown)}; "
            f"the members are {', '.join(joint.names)}."
        )
