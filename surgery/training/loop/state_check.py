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
from surgery.methods.templates.training import stacks_of
from surgery.training.loop.optimizers import plain
from surgery.training.loop.state import Tensors, model_tensors, under
from surgery.training.tasks.stateful import pack_loss

if TYPE_CHECKING:
    from surgery.training.loop.trainer import Trainer

_ADAM = {"step", "exp_avg", "exp_avg_sq"}
MOMENTS = {"Adam": _ADAM, "AdamW": _ADAM, "SGD": {"momentum_buffer"}}
"""What an optimizer keeps of each parameter, by its class."""


def wrong_model(joint: JointModel, tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """What keeps `restore` from giving a joint model these tensors."""
    wanted = model_tensors(joint)
    for name, tensor in wanted.items():
        if name.startswith("bank/"):
            continue
        if name not in tensors:
            yield f"'{shown_text(name)}' is missing"
        elif tensors[name].dtype != tensor.dtype:
            yield f"'{name}' must be {tensor.dtype}, found {tensors[name].dtype}"
        elif tensors[name].shape != tensor.shape:
            yield f"'{name}' must be {list(tensor.shape)}, found {list(tensors[name].shape)}"
    for name in sorted(set(tensors) - set(wanted))[:5]:
        yield f"'{shown_text(name)}' is none of its tensors"
    for key in joint.dictionary:
        for wrong in joint.dictionary[key].misfits(under(tensors, f"bank/{key}/")):
            yield f"bank {key} {wrong}"


def wrong_state(
    trainer: Trainer, tensors: Mapping[str, Tensor], document: Mapping[str, Any]
) -> Iterator[str]:
    """What keeps `unpack` from going on from a state; the document is typed already."""
    if set(document["streams"]) != set(trainer.streams):
        yield f"its tasks must be {', '.join(trainer.streams)}, found {shown(sorted(document['streams']))}"
    try:
        own = trainer.processes.own(under(tensors, "model/"))
    except (RuntimeError, ValueError, IndexError) as error:  # of a process that holds parts
        yield f"its tensors cannot be cut: {shown_text(str(error))}"
        return
    wrong = [*wrong_model(trainer.joint, own)]
    yield from wrong
    if wrong:  # what follows is measured against these
        return
    opened: dict[str, Tensors] = {}
    for key, bank in trainer.banks.items():
        rows, psi = own[f"bank/{key}/rows"], own[f"bank/{key}/psi"]
        count = len(rows) // bank.context
        opened[key] = under(tensors, f"contest/{key}/")
        if opened[key]:
            evolves = key in trainer.evolving
            yield from (
                _wrong_contest(opened[key], psi, count, bank.context)
                if evolves
                else (f"{key} has a contest",)
            )
        yield from _wrong_identity(tensors.get(f"identity/{key}"), document["born"].get(key), count, key)
    yield from _wrong_progress(trainer, document)
    yield from _wrong_names(trainer, tensors, document)
    yield from _wrong_optimizer(trainer, tensors, document, own, opened)
    yield from _wrong_losses(trainer, tensors)
    yield from _wrong_random(trainer, tensors, document)


def _wrong_contest(parts: Tensors, psi: Tensor, count: int, context: int) -> Iterator[str]:
    names = {"chosen", "candidates", "soft"}
    if not names <= set(parts) <= names | {"contexts"}:
        yield f"a contest must have {', '.join(sorted(names))} and maybe contexts, found {shown(sorted(parts))}"
        return
    chosen, candidates, soft = parts["chosen"], parts["candidates"], parts["soft"]
    contexts = parts.get("contexts")
    whole = chosen.dtype == candidates.dtype == torch.int64 and soft.is_floating_point()
    flat = chosen.ndim == 1 and len(chosen) and candidates.ndim == 2 and candidates.shape[1] > 1
    if not whole or not flat or len(candidates) != len(chosen) or soft.shape != candidates.shape:
        shapes = {name: [str(t.dtype), *t.shape] for name, t in parts.items()}
        yield f"a contest must have a soft weight for each candidate of each location chosen, found {shown(shapes)}"
        return
    if int(chosen[0]) < 0 or int(chosen[-1]) >= len(psi) or not bool((chosen[1:] > chosen[:-1]).all()):
        yield f"a contest must be of some of the {len(psi)} locations in their order"
    elif int(candidates.min()) < 0 or int(candidates.max()) >= count or int(psi.max()) >= count:
        yield f"a contest must be among hypermodules 0 to {count - 1}, found up to {int(candidates.max())}"
    elif not torch.equal(candidates[:, 0].cpu(), psi.cpu()[chosen.cpu()]):
        yield "a contest must have each location's own hypermodule as its first candidate"
    shape = (len(chosen), candidates.shape[1] - 1, context)
    if contexts is not None and (tuple(contexts.shape) != shape or not contexts.is_floating_point()):
        yield f"challengers must have contexts of {list(shape)}, found {list(contexts.shape)}"


def _wrong_identity(identity: Tensor | None, born: int | None, count: int, key: str) -> Iterator[str]:
    if identity is None or identity.dtype != torch.int64 or tuple(identity.shape) != (count,) or born is None:
        found = None if identity is None else list(identity.shape)
        yield f"the {count} hypermodules of bank {key} must be numbered, found {found} and {born} born"
    elif count and (int(identity.min()) < 0 or int(identity.max()) >= born):
        yield f"hypermodules of bank {key} must have numbers below {born}, found up to {int(identity.max())}"


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
    if document.get("hardened") and not config.templates.harden:
        yield "templates are hardened, which the settings do not ask for"


def _wrong_names(
    trainer: Trainer, tensors: Mapping[str, Tensor], document: Mapping[str, Any]
) -> Iterator[str]:
    """Tensors that nothing would read, as those of another version or another run."""
    known = [f"contest/{key}/" for key in trainer.banks] + [
        f"loss/{number}/" for number in range(len(trainer.tasks))
    ]
    known += ["model/", "optimizer/", *(f"random/{rank}/" for rank in range(len(document["random"])))]
    single = {f"identity/{key}" for key in trainer.banks} | {f"running/{name}" for name in trainer.streams}
    for name, tensor in tensors.items():
        if name not in single and name != "random/evolution" and not name.startswith(tuple(known)):
            yield f"'{shown_text(name)}' is none of a state's tensors"
        elif name.startswith("running/") and (tensor.ndim or not tensor.is_floating_point()):
            yield f"'{shown_text(name)}' must be one number, found {list(tensor.shape)}"
    running = under(tensors, "running/")
    if running and set(running) != set(trainer.streams):
        yield f"running losses must be of all tasks, found {shown(sorted(running))}"


def _wrong_optimizer(
    trainer: Trainer,
    tensors: Mapping[str, Tensor],
    document: Mapping[str, Any],
    own: Mapping[str, Tensor],
    opened: Mapping[str, Tensors],
) -> Iterator[str]:
    """The optimizer's parameters as they will be once the state is in place, and what is kept of each."""
    rows = {id(bank.rows): own[f"bank/{key}/rows"] for key, bank in trainer.banks.items()}
    gone: set[int] = set()
    if document.get("hardened") and not trainer.hardened:
        gone = {id(next(iter(banks.values())).contexts) for banks in stacks_of(trainer.joint).values()}
    listed: list[tuple[Any, Any]] = []  # what each will look like, and the parameter that is there now
    for group in trainer.optimizer.param_groups:
        listed += [(rows.get(id(p), p), p) for p in group["params"] if id(p) not in gone]
        part = {"soft": "soft", "contexts": "contexts"}.get(group["role"])
        listed += [(parts[part], None) for parts in opened.values() if part in parts]
    inner = plain(trainer.optimizer)
    wanted = MOMENTS.get(type(inner).__name__)
    names = {name.split("/")[1] for name in tensors if name.startswith("optimizer/")}
    names |= {name.split("/")[0] for name in document["optimizer"]}
    if unknown := names - {str(number) for number in range(len(listed))}:
        yield f"the optimizer has {len(listed)} parameters, but something is kept of {shown(sorted(unknown))}"
    for number, (like, parameter) in enumerate(listed):
        kept = under(tensors, f"optimizer/{number}/")
        scalars = under(document["optimizer"], f"{number}/")
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


def _wrong_losses(trainer: Trainer, tensors: Mapping[str, Tensor]) -> Iterator[str]:
    for number, task in enumerate(trainer.tasks):
        known, found = pack_loss(trainer.losses[task.name]), under(tensors, f"loss/{number}/")
        if set(known) != set(found):
            yield (
                f"it must hold the state of the loss of {task.name}, {shown(sorted(known)) if known else 'none'}, but "
                f"has {shown(sorted(found)) if found else 'none'}"
            )
        for name in set(known) & set(found):
            if isinstance(known[name], Tensor) and known[name].dtype != found[name].dtype:
                yield f"'{name}' of the loss of {task.name} must be {known[name].dtype}, found {found[name].dtype}"


def _wrong_random(
    trainer: Trainer, tensors: Mapping[str, Tensor], document: Mapping[str, Any]
) -> Iterator[str]:
    """Generators are tried on ones that nobody uses."""
    places = ["random/evolution", *(f"random/{rank}/torch" for rank in range(len(document["random"])))]
    for name in places:
        try:
            torch.Generator().set_state(tensors[name])
        except (KeyError, RuntimeError, TypeError) as error:
            yield f"'{name}' must be the state of a generator: {shown_text(str(error))}"
    for rank, rest in enumerate(document["random"]):
        words = tensors.get(f"random/{rank}/numpy")
        try:
            assert words is not None and words.dtype == torch.int64 and tuple(words.shape) == (624,)
            assert int(words.min()) >= 0 and int(words.max()) < 1 << 32
            np.random.RandomState().set_state(numpy_state(words, rest["numpy"]))
        except (AssertionError, ValueError, TypeError):
            yield f"'random/{rank}/numpy' must be the 624 words of NumPy's generator"
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
