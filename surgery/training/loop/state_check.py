"""Checks that a state fits the run that resumes from it, before anything in memory changes.

Each check yields sentences about what is wrong, so that one error names all of it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from surgery.core.joint import JointModel
from surgery.disk.untrusted import shown, shown_text
from surgery.storage.keys import StateKey, of_owner
from surgery.training.loop.moves import is_read, state_of, unread
from surgery.training.loop.optimizers import plain
from surgery.training.loop.state import model_tensors, of_model
from surgery.training.loop.state_document import StateDocument
from surgery.training.tasks.stateful import pack_loss

if TYPE_CHECKING:
    from surgery.training.loop.trainer import Trainer

_ADAM = {"step", "exp_avg", "exp_avg_sq"}
EVOLUTION = StateKey("random", "evolution")
"""The generator of all that a run decides."""

MOMENTS = {"Adam": _ADAM, "AdamW": _ADAM, "SGD": {"momentum_buffer"}}
"""What an optimizer keeps of each parameter, by its class."""


def wrong_model(joint: JointModel, tensors: Mapping[StateKey, Tensor]) -> Iterator[str]:
    """What keeps `restore` from giving a joint model these tensors."""
    wanted = model_tensors(joint)
    for key, tensor in wanted.items():
        if key.kind == "bank":
            continue
        if key not in tensors:
            yield f"'{shown_text(str(key))}' is missing"
        elif tensors[key].dtype != tensor.dtype:
            yield f"'{key}' must be {tensor.dtype}, found {tensors[key].dtype}"
        elif tensors[key].shape != tensor.shape:
            yield f"'{key}' must be {list(tensor.shape)}, found {list(tensors[key].shape)}"
    for name in sorted(map(str, set(tensors) - set(wanted)))[:5]:
        yield f"'{shown_text(name)}' is none of its tensors"
    for bank in joint.dictionary:
        for wrong in joint.dictionary[bank].misfits(of_owner(tensors, "bank", bank)):
            yield f"bank {bank} {wrong}"


def wrong_state(
    trainer: Trainer, tensors: Mapping[StateKey, Tensor], document: Mapping[str, Any]
) -> Iterator[str]:
    """What keeps `unpack` from going on from a state; the document is typed already."""
    if set(document["streams"]) != set(trainer.streams):
        yield f"its tasks must be {', '.join(trainer.streams)}, found {shown(sorted(document['streams']))}"
    try:
        own = trainer.processes.own(of_model(tensors))
    except (RuntimeError, ValueError, IndexError) as error:  # of a process that holds parts
        yield f"its tensors cannot be cut: {shown_text(str(error))}"
        return
    wrong = [*wrong_model(trainer.joint, own)]
    yield from wrong
    if wrong:  # what follows is measured against these
        return
    for each in trainer.moves:
        mine, facts = state_of(each, tensors, document)
        if wrong := [*each.wrong(mine, facts, own)]:
            yield from wrong
            return
    yield from _wrong_progress(trainer, document)
    yield from _wrong_names(trainer, tensors, document)
    yield from _wrong_optimizer(trainer, tensors, document, own)
    yield from _wrong_losses(trainer, tensors)
    yield from _wrong_random(trainer, tensors, document)


def _wrong_progress(trainer: Trainer, document: Mapping[str, Any]) -> Iterator[str]:
    config, keep = trainer.config, document["keep"]
    generation, step, schedule = document["generation"], document["step"], document["schedule"]
    if generation > config.total or step >= config.steps or (generation == config.total and step):
        yield (
            f"it must be within {config.total} generations of {config.steps} steps, found generation {generation} "
            f"and step {step}"
        )
    if not -1 <= keep["best"] <= generation:
        yield f"the best generation must be one that was done, found {keep['best']} of {generation}"
    if unknown := set(keep["first"]) - set(trainer.streams):
        yield f"first losses are of unknown tasks {shown(sorted(unknown))}"
    if (schedule is None) != (trainer.scheduler is None) or (schedule or 0) > config.total * config.steps:
        yield f"the step of the learning rate's schedule cannot be {schedule}"
    if unknown := unread(trainer.moves, document, StateDocument.model_fields):
        yield f"it is of methods that this run does not use: {shown(unknown)}"


def _wrong_names(
    trainer: Trainer, tensors: Mapping[StateKey, Tensor], document: Mapping[str, Any]
) -> Iterator[str]:
    """Tensors that nothing would read, as those of another version or another run."""
    owners = {
        "loss": {str(number) for number in range(len(trainer.tasks))},
        "random": {str(rank) for rank in range(len(document["random"]))},
        "running": set(trainer.streams),
    }
    for key, tensor in tensors.items():
        ours = (
            key.model or key == EVOLUTION or key.kind == "optimizer" or key.owner in owners.get(key.kind, ())
        )
        if not ours and not any(is_read(each, key) for each in trainer.moves):
            yield f"'{shown_text(str(key))}' is none of a state's tensors"
        elif key.kind == "running" and (tensor.ndim or not tensor.is_floating_point()):
            yield f"'{shown_text(str(key))}' must be one number, found {list(tensor.shape)}"
    running = {key.owner for key in tensors if key.kind == "running"}
    if running and running != set(trainer.streams):
        yield f"running losses must be of all tasks, found {shown(sorted(map(str, running)))}"


def _wrong_optimizer(
    trainer: Trainer,
    tensors: Mapping[StateKey, Tensor],
    document: Mapping[str, Any],
    own: Mapping[StateKey, Tensor],
) -> Iterator[str]:
    """The optimizer's parameters as they will be once the state is in place, and what is kept of each."""
    likes: dict[int, Tensor] = {}  # banks may have had more or fewer rows
    for key in trainer.joint.dictionary:
        for name, parameter in trainer.joint.dictionary[key].named_parameters():
            likes[id(parameter)] = own.get(StateKey("bank", key, name), parameter)
    states = [(each, *state_of(each, tensors, document)) for each in trainer.moves]
    gone = {id(p) for each, _, facts in states for p in each.leaving(facts)}
    listed: list[tuple[Any, Any]] = []  # what each will look like, and the parameter that is there now
    entering = [each.entering(mine) for each, mine, _ in states]
    roles: set[str] = set()
    for group in trainer.optimizer.param_groups:
        listed += [(likes.get(id(p), p), p) for p in group["params"] if id(p) not in gone]
        if group["role"] not in roles:  # `enter` takes the first group of a role
            listed += [(like, None) for each in entering for like in each.get(group["role"], ())]
        roles.add(group["role"])
    inner = plain(trainer.optimizer)
    wanted = MOMENTS.get(type(inner).__name__)
    names = {str(key.owner) for key in tensors if key.kind == "optimizer"}
    names |= {name.split("/")[0] for name in document["optimizer"]}
    if unknown := names - {str(number) for number in range(len(listed))}:
        yield f"the optimizer has {len(listed)} parameters, but something is kept of {shown(sorted(unknown))}"
    for number, (like, parameter) in enumerate(listed):
        kept, scalars = of_owner(tensors, "optimizer", number), scalars_of(document, number)
        if (kept or scalars) and wanted is not None and {*kept, *scalars} != wanted:
            yield f"of parameter {number} the optimizer must keep {shown(sorted(wanted))}, found {shown(sorted(kept))}"
        for name, value in kept.items():
            mine = value if parameter is None else trainer.processes.own_state(parameter, value)
            single = name == "step" and not mine.ndim and mine.is_floating_point() and bool(mine >= 1)
            if not single and (name == "step" or mine.shape != like.shape or mine.dtype != like.dtype):
                yield (
                    f"'{name}' of the optimizer's parameter {number} must be {like.dtype} {list(like.shape)}, found "
                    f"{mine.dtype} {list(mine.shape)}"
                )


def scalars_of(document: Mapping[str, Any], number: int) -> dict[str, Any]:
    """What an optimizer keeps of a parameter beside tensors, by name."""
    places = {place.partition("/")[::2]: value for place, value in document["optimizer"].items()}
    return {name: value for (of, name), value in places.items() if of == str(number)}


def _wrong_losses(trainer: Trainer, tensors: Mapping[StateKey, Tensor]) -> Iterator[str]:
    for number, task in enumerate(trainer.tasks):
        known, found = pack_loss(trainer.losses[task.name]), of_owner(tensors, "loss", number)
        if set(known) != set(found):
            yield (
                f"it must hold the state of the loss of {task.name}, {shown(sorted(known)) if known else 'none'}, but "
                f"has {shown(sorted(found)) if found else 'none'}"
            )
        for name in set(known) & set(found):
            if isinstance(known[name], Tensor) and known[name].dtype != found[name].dtype:
                yield f"'{name}' of the loss of {task.name} must be {known[name].dtype}, found {found[name].dtype}"


def _wrong_random(
    trainer: Trainer, tensors: Mapping[StateKey, Tensor], document: Mapping[str, Any]
) -> Iterator[str]:
    """Generators are tried on ones that nobody uses."""
    ranks = range(len(document["random"]))
    for key in (EVOLUTION, *(StateKey("random", str(rank), "torch") for rank in ranks)):
        try:
            torch.Generator().set_state(tensors[key])
        except (KeyError, RuntimeError, TypeError) as error:
            yield f"'{key}' must be the state of a generator: {shown_text(str(error))}"
    for rank, rest in enumerate(document["random"]):
        words = tensors.get(numpy := StateKey("random", str(rank), "numpy"))
        try:
            assert words is not None and words.dtype == torch.int64 and tuple(words.shape) == (624,)
            assert int(words.min()) >= 0 and int(words.max()) < 1 << 32
            np.random.RandomState().set_state(numpy_state(words, rest["numpy"]))
        except (AssertionError, ValueError, TypeError):
            yield f"'{numpy}' must be the 624 words of NumPy's generator"
        try:
            random.Random().setstate(python_state(rest["python"]))
        except (ValueError, TypeError, OverflowError) as error:
            yield f"the state of Python's generator cannot be used: {shown_text(str(error))}"


def numpy_state(words: Tensor, rest: Any) -> tuple[Any, ...]:
    """What `numpy.random.set_state` takes."""
    kind, position, has, cached = rest
    return kind, words.numpy().astype(np.uint32), int(position), int(has), cached


def python_state(rest: Any) -> tuple[Any, ...]:
    """What `random.setstate` takes."""
    version, inner, gauss = rest
    return version, tuple(inner), gauss
