"""Sources: where a task's examples come from; a new one is a function and a line in `SOURCES`.

A source turns what a recipe says into batches for training, validation and test. A recipe that came with an artifact
may name functions that ship with this package; `check_sources` refuses all else that it names without consent.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from surgery.errors import LoadError, PlanError
from surgery.inputs import floating_dtype
from surgery.inputs.reading import read_arrays
from surgery.members.member import Member
from surgery.members.origins.factory import find_function
from surgery.permission import PLACES, SHIPPED, Permission
from surgery.settings.recipe import Recipe, TaskSpec
from surgery.training.tasks.parts import Parts, Unlabelled, check_there, split_rows
from surgery.training.tasks.sources_hub import PREFIX, from_datasets
from surgery.training.tasks.sources_text import TEXT_ENDINGS, from_text
from surgery.training.tasks.streams import Batches
from surgery.training.tasks.tasks import Task
from surgery.util.text import one_line

_LOCAL_TRACKERS = ("tensorboard",)  # which write to the run's folder and nothing else
_FUNCTION = re.compile(r"[^:]*:[A-Za-z_]\w*")


Read = Callable[[TaskSpec, Member], Parts]
"""What reads a task's data for a member."""


def make_tasks(
    recipe: Recipe, members: Mapping[str, Member], permission: Permission, read: Read | None = None
) -> list[Task]:
    """The tasks that a recipe names for its members.

    Args:
        recipe: with the name of every member.
        members: by name.
        permission: of the recipe.
        read: gives the data; by default they are read here.

    Raises:
        ConsentError: where the permission does not cover a source.
        LoadError: where data cannot be read.
        PlanError: where a recipe names no task.
    """
    tasks: list[Task] = []
    rates = {model.name: model.lr for model in recipe.models}
    for name, member, spec in named_specs(recipe):
        parts = (
            read(spec, members[member]) if read else load_data(spec, members[member], recipe.seed, permission)
        )
        data = parts.train if spec.labels else Unlabelled(parts.train)
        rate = rates[member] if spec.lr is None else spec.lr
        tasks.append(
            Task(
                name,
                member,
                data,
                spec.loss,
                spec.metric,
                parts.validation,
                parts.test,
                spec.weight,
                lr=rate,
            )
        )
    if not tasks:
        raise PlanError("A training recipe needs tasks: give at least one of its models a list 'tasks'.")
    return tasks


def named_specs(recipe: Recipe) -> Iterator[tuple[str, str, TaskSpec]]:
    """The name of every task of a recipe, the member that it trains, and what the recipe says of it."""
    for model in recipe.models:
        assert model.name is not None  # `prepare` names every member
        for number, spec in enumerate(model.tasks):
            alone = len(model.tasks) == 1
            yield spec.name or (model.name if alone else f"{model.name}-{number + 1}"), model.name, spec


def load_data(spec: TaskSpec, member: Member, seed: int, permission: Permission) -> Parts:
    """The batches that a task's `data` names.

    Args:
        spec: what the recipe says of the task.
        member: that the task trains.
        seed: of orders and splits.
        permission: of the recipe.

    Raises:
        ConsentError: where the permission does not cover the source.
        LoadError: where there is no such source, or it cannot be read.
    """
    if outside := _outside(spec.data, spec.options):
        permission.require(Permission.OWN, f"the task's data use {', '.join(outside)}")
    for claims, read in SOURCES:
        if claims(spec.data):
            return read(spec, member, seed, permission)
    raise LoadError(no_source(spec.data))


def no_source(data: str) -> str:
    """What to say to data that no source claims."""
    return (
        f"A task's data must be a function as package.module:function or file.py:function, {PREFIX}NAME for Hugging "
        f"Face datasets, or a file that ends in {', '.join((*ENDINGS, *TEXT_ENDINGS))}, found '{data}'."
    )


def check_sources(recipe: Recipe, permission: Permission) -> None:
    """Refuse a recipe that names what its permission does not cover, before anything is loaded.

    Raises:
        ConsentError: naming the functions, files and data sets.
    """
    specs = [spec for model in recipe.models for spec in model.tasks]
    named = [(spec.data, spec.options) for spec in specs]
    named += [(spec.adaptation.data, spec.adaptation.options) for spec in specs if spec.adaptation]
    outside = [each for data, options in named for each in _outside(data, options)]
    if recipe.train is not None and recipe.train.source is not None:
        outside.append(recipe.train.source)
    if recipe.train is not None:  # most of them talk to a server, and start processes
        outside += [f"the tracker {name}" for name in recipe.train.trackers if name not in _LOCAL_TRACKERS]
    if outside:
        found = ", ".join(dict.fromkeys(outside))
        permission.require(Permission.OWN, f"the recipe that came with this artifact uses {found}")


def _outside(data: str, options: Mapping[str, Any]) -> list[str]:
    """What a source names that does not ship with this package: a function, a file, a data set, a folder."""
    named = [] if data in SHIPPED else [data]
    return named + [str(value) for key, value in options.items() if key in (*PLACES, "tokenizer") and value]


def from_function(spec: TaskSpec, member: Member, seed: int, permission: Permission) -> Parts:
    """Call a function with the recipe's options, and with those of `batch`, `seed` and `member` that it takes.

    It returns a mapping with `train` and, where it has them, `validation` and `test`; or the training data alone.
    """
    function = find_function(spec.data, permission)
    offered = {"batch": spec.batch, "seed": seed, "member": member}
    known = inspect.signature(function).parameters
    arguments = {name: value for name, value in offered.items() if name in known} | spec.options
    try:
        made = function(**arguments)
    except Exception as error:
        raise LoadError(f"{spec.data} must return a task's data, but raised {one_line(error)}") from error
    if isinstance(made, Parts):
        return made
    if isinstance(made, Mapping):
        if "train" not in made or set(made) - {"train", "validation", "test"}:
            raise LoadError(
                f"{spec.data} must return 'train' and, where it has them, 'validation' and 'test', found "
                f"{', '.join(map(str, made)) or 'nothing'}."
            )
        return Parts(**made)
    return Parts(made)


def from_tensors(spec: TaskSpec, member: Member, seed: int, permission: Permission) -> Parts:
    """Arrays `inputs` and `targets` of a .npz or .safetensors file, inputs in the member's floating-point dtype.

    Options: `validation` and `test`, numbers or shares of the examples, which are drawn by the seed.
    """
    path = Path(spec.data).expanduser()
    arrays = _read_arrays(path)
    if "inputs" not in arrays:
        raise LoadError(f"{path} must hold 'inputs' and 'targets', found {', '.join(arrays) or 'nothing'}.")
    inputs, targets = arrays["inputs"], arrays.get("targets")
    if inputs.is_floating_point():  # NumPy's usual float64 is no model's
        inputs = inputs.to(floating_dtype(member.module))
    if targets is not None and len(targets) != len(inputs):
        raise LoadError(
            f"{path} must hold one target for each input, found {len(inputs)} and {len(targets)}."
        )
    pieces = split_rows(len(inputs), spec.options, seed)

    def batches(rows: Tensor, shuffle: bool) -> Batches | None:
        if not len(rows):
            return None
        wanted = None if targets is None else targets[rows]
        return Batches(inputs[rows], wanted, spec.batch, shuffle, seed)

    train = batches(pieces["train"], True)
    if train is None:
        raise LoadError(f"{path} must hold examples to train on, found {len(inputs)}.")
    return Parts(train, batches(pieces["validation"], False), batches(pieces["test"], False))


def _read_arrays(path: Path) -> dict[str, Tensor]:
    check_there(path)
    return read_arrays(path)


def is_function(data: str) -> bool:
    """Whether a task's data are a function's."""
    return not data.startswith(PREFIX) and bool(_FUNCTION.fullmatch(data))


def _ends(*endings: str) -> Callable[[str], bool]:
    return lambda data: data.endswith(endings)


ENDINGS = (".npz", ".safetensors")
SOURCES: list[tuple[Callable[[str], bool], Callable[[TaskSpec, Member, int, Permission], Parts]]] = [
    (lambda data: data.startswith(PREFIX), from_datasets),
    (is_function, from_function),
    (_ends(*ENDINGS), from_tensors),
    (_ends(*TEXT_ENDINGS), from_text),
]
