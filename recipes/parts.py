"""Splits, sizes and lazily prepared batches, shared by the data functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from surgery.errors import PlanError
from surgery.training.tasks.streams import Batches


class Prepared:
    """Batches that are changed as they are drawn: kept small, seen large.

    Args:
        batches: as they are kept.
        change: of inputs and target.
    """

    def __init__(self, batches: Batches, change: Callable[[Any, Any], Any]):
        self.batches, self.change = batches, change

    def __len__(self) -> int:
        return len(self.batches)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch."""
        self.batches.set_epoch(epoch)

    def __iter__(self) -> Iterator[Any]:
        for inputs, target in self.batches:
            yield self.change(inputs, target)


def split_groups(groups: Sequence[str], validation: float, test: float) -> dict[str, Tensor]:
    """Rows for `train`, `validation` and `test`, such that no group is in two of them.

    The split is the same in every run, so that runs with several seeds are measured on the same examples.

    Args:
        groups: of every example.
        validation: share of the groups.
        test: share of the groups.
    """
    names = sorted(set(groups))
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(0)).tolist()
    held = round(validation * len(names)), round((validation + test) * len(names))
    part = {names[n]: 0 if place < held[0] else 1 if place < held[1] else 2 for place, n in enumerate(order)}
    rows: list[list[int]] = [[], [], []]
    for row, group in enumerate(groups):
        rows[part[group]].append(row)
    return {name: torch.tensor(r) for name, r in zip(("validation", "test", "train"), rows, strict=True)}


def first(rows: Tensor, count: int | None, what: str) -> Tensor:
    """`count` of some rows, drawn the same in every run; all where it is None.

    Raises:
        PlanError: where there are none, or fewer.
    """
    if not len(rows) or (count is not None and not 0 < count <= len(rows)):
        raise PlanError(f"The option {what} must lie between 1 and {len(rows)} examples, found {count}.")
    if count is None:
        return rows
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    return rows[order[:count]]


def of_classes(examples: Tensor, target: Tensor, classes: Sequence[int] | None) -> tuple[Tensor, Tensor]:
    """Examples of some classes, counted from 0 in the order given; all where it is None.

    Raises:
        PlanError: where a class has no example, or is given twice.
    """
    if classes is None:
        return examples, target
    wanted = torch.tensor(list(classes), dtype=target.dtype)
    if len(set(classes)) < len(classes) or not set(classes) <= set(target.tolist()):
        found = f"{min(target.tolist())} to {max(target.tolist())}"
        raise PlanError(f"The option classes must be distinct ones of {found}, found {list(classes)}.")
    rows, numbers = (target.unsqueeze(1) == wanted).nonzero(as_tuple=True)
    return examples[rows], numbers
