"""Parts: a task's data for training, validation and test."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surgery.disk.untrusted import shown
from surgery.errors import LoadError, PlanError
from surgery.training.tasks.tasks import Batch, as_batch


@dataclass(frozen=True)
class Parts:
    """Batches for training, and for what training does not see."""

    train: Iterable[Any]
    validation: Iterable[Any] | None = None
    test: Iterable[Any] | None = None


class Unlabelled:
    """Batches without their targets: those of another domain, of which only inputs are known.

    Args:
        data: batches, as a task takes them.
    """

    def __init__(self, data: Iterable[Any]):
        self.data = data

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch, where the data have one."""
        if hasattr(self.data, "set_epoch"):
            self.data.set_epoch(epoch)  # type: ignore[attr-defined]

    def __iter__(self) -> Iterator[Batch]:
        for raw in self.data:
            yield replace(as_batch(raw), target=None)


class First:
    """The first batches of some data.

    Args:
        data: batches.
        batches: how many.
    """

    def __init__(self, data: Iterable[Any], batches: int = 2):
        self.data, self.batches = data, batches

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self.data), self.batches)


def check_there(path: Path) -> None:
    """Check that there is a file of data.

    Raises:
        LoadError: where there is none.
    """
    if not os.path.lexists(path):
        raise LoadError(f"The data file {path} does not exist: check the path and the working folder.")


def take_option(options: dict[str, Any], name: str, default: Any, *kinds: type) -> Any:
    """Take an option out of those of a task's data.

    Raises:
        PlanError: where it is of none of the kinds that it may be of.

    Example:
        >>> take_option({"text": "body"}, "text", "text", str)
        'body'
    """
    value = options.pop(name, default)
    if not isinstance(value, kinds) or isinstance(value, bool):
        known = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
        raise PlanError(f"The option {name} of a task's data must be {known}, found {shown(value)}.")
    return value


def split_rows(count: int, options: Mapping[str, Any], seed: int) -> dict[str, Tensor]:
    """Row numbers for `train`, `validation` and `test`, drawn by the seed.

    Args:
        count: examples in all.
        options: `validation` and `test`, each a number of examples or a share below 1; others are errors.
        seed: of the order.

    Raises:
        PlanError: for other options, or more than there are.
    """
    if strange := sorted(set(options) - {"validation", "test"}):
        raise PlanError(f"Files take the options validation and test, found {shown(strange)}.")
    for name in ("validation", "test"):
        value = options.get(name, 0)
        endless = isinstance(value, float) and not math.isfinite(value)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or endless:
            raise PlanError(
                f"The option {name} must be a number of examples or a share of them, found {shown(value)}."
            )
    sizes = {
        name: round(value * count) if 0 < value < 1 else int(value)
        for name, value in ((name, options.get(name, 0)) for name in ("validation", "test"))
    }
    if sum(sizes.values()) >= count or min(sizes.values()) < 0:
        raise PlanError(f"Of {count} examples some must be left to train on, found {shown(sizes)}.")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    held = {"validation": order[: sizes["validation"]]}
    held["test"] = order[sizes["validation"] : sum(sizes.values())]
    return {"train": order[sum(sizes.values()) :], **held}
