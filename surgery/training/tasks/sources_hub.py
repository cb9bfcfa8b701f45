"""Hugging Face datasets as task data, where that package is installed: `datasets:NAME`."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from surgery.errors import LoadError
from surgery.members.member import Member
from surgery.permission import Permission
from surgery.training.tasks.parts import Parts, split_rows, take_option
from surgery.training.tasks.sources_text import LENGTH, TextBatches, load_tokenizer
from surgery.training.tasks.streams import Batches
from surgery.util.quiet import quiet
from surgery.util.text import one_line

if TYPE_CHECKING:
    from surgery.settings.recipe import TaskSpec

PREFIX = "datasets:"
SPLITS = {"train": "train", "validation": "validation", "test": "test"}


def from_datasets(spec: TaskSpec, member: Member, seed: int, permission: Permission) -> Parts:
    """A data set of the hub, or a folder that `save_to_disk` wrote.

    Options: `name`, of a configuration; `splits`, which of its splits are `train`, `validation` and `test`; `text`
    and `length` for a column of texts, or `inputs` for one of numbers; `target`, a column (`label` by default,
    null for none); `tokenizer`, a folder, for members that have none; `validation` and `test`, numbers or shares
    of the training examples, for parts that the data set has no split for.

    Raises:
        LoadError: where the package is missing, or the data set or a column of it.
    """
    options = dict(spec.options)
    splits = _read(
        spec.data.removeprefix(PREFIX),
        take_option(options, "name", None, str, type(None)),
        take_option(options, "splits", SPLITS, dict),
    )
    column = take_option(options, "inputs", None, str, type(None))
    text = take_option(options, "text", "text", str)
    target = take_option(options, "target", "label", str, type(None))
    length = take_option(options, "length", LENGTH, int)
    folder = take_option(options, "tokenizer", None, str, type(None))
    tokenizer = None
    if column is None:
        tokenizer = load_tokenizer(member if folder is None else Path(folder).expanduser())
    parts = {name: (rows, torch.arange(len(rows))) for name, rows in splits.items()}
    held = {name: value for name, value in options.items() if name not in splits or name not in SPLITS}
    for name, rows in split_rows(len(splits["train"]), held, seed).items():
        if len(rows):
            parts[name] = (splits["train"], rows)
    made: dict[str, Any] = {}
    for name, (rows, places) in parts.items():
        wanted = [each for each in (column or text, target) if each is not None]
        if lacking := [each for each in wanted if each not in rows.column_names]:
            raise LoadError(
                f"{spec.data} must have the columns {', '.join(wanted)}, but lacks {', '.join(lacking)}; it has "
                f"{', '.join(rows.column_names)}: name them by the options text, inputs and target."
            )
        chosen = rows.select(places.tolist())
        wanted_target = None if target is None else torch.as_tensor(chosen[target][:])
        if tokenizer is not None:
            texts = list(chosen[text])
            made[name] = TextBatches(
                tokenizer, texts, wanted_target, spec.batch, name == "train", seed, length
            )
        else:
            inputs = torch.tensor(chosen[column][:])
            made[name] = Batches(inputs, wanted_target, spec.batch, name == "train", seed)
    return Parts(**made)


def _read(name: str, config: str | None, splits: Any) -> dict[str, Any]:
    """The splits that a data set has, by what they are for."""
    if importlib.util.find_spec("datasets") is None:
        raise LoadError(f'{PREFIX}{name} needs the package datasets: pip install "model-surgery[datasets]".')
    import datasets  # pyright: ignore[reportMissingImports]

    try:
        with quiet():
            local = Path(name).expanduser().is_dir()
            found: Any = datasets.load_from_disk(name) if local else datasets.load_dataset(name, config)
    except Exception as error:
        raise LoadError(f"The data set {name} cannot be loaded: {one_line(error)}") from error
    if not isinstance(found, dict):
        found = {"train": found}
    parts = {part: found[split] for part, split in dict(splits).items() if split in found}
    if "train" not in parts:
        raise LoadError(
            f"{PREFIX}{name} must have a split to train on, found {', '.join(found)}: name it by the option splits."
        )
    return parts
