"""Endless, seeded, seekable streams of a task's batches.

Every process reads the same batches and takes its own share of each, so that several processes compute what
one would.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from surgery.errors import PlanError, TrainingError
from surgery.training.tasks.tasks import Batch, Place, as_batch
from surgery.util.randomness import seeded, seeded_others
from surgery.util.text import one_line

_EPOCHS = 1 << 20  # more than any run has; keeps the seeds of two tasks apart


class Batches:
    """Examples that lie in memory, in batches that are shuffled anew in each epoch.

    Args:
        inputs: `[N, ...]`, or a dict of such tensors.
        target: `[N, ...]`, or None.
        batch: examples in a batch.
        shuffle: whether their order changes with the epoch.
        seed: of the order.
        axis: along which the examples lie.

    Example:
        >>> [len(x) for x, y in Batches(torch.zeros(5, 3), torch.zeros(5), batch=2)]
        [2, 2, 1]
    """

    def __init__(
        self,
        inputs: Tensor | dict[str, Tensor],
        target: Tensor | None,
        batch: int,
        shuffle: bool = True,
        seed: int = 0,
        axis: int = 0,
    ):
        self.inputs, self.target, self.batch = inputs, target, batch
        self.shuffle, self.seed, self.axis, self.epoch = shuffle, seed, axis, 0
        first = next(iter(inputs.values())) if isinstance(inputs, dict) else inputs
        self.examples = first.shape[axis]

    def __len__(self) -> int:
        return -(-self.examples // self.batch)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        if not self.shuffle:
            order = torch.arange(self.examples)
        else:
            generator = torch.Generator().manual_seed(self.seed * _EPOCHS + self.epoch)
            order = torch.randperm(self.examples, generator=generator)
        if self.batch >= self.examples:
            order = order.sort().values if self.shuffle else order  # one batch: its order means nothing
        for rows in order.split(self.batch):
            inputs = (
                {key: value.index_select(self.axis, rows) for key, value in self.inputs.items()}
                if isinstance(self.inputs, dict)
                else self.inputs.index_select(self.axis, rows)
            )
            yield inputs, None if self.target is None else self.target.index_select(self.axis, rows)


class Stream:
    """The batches of a task, epoch after epoch.

    Args:
        name: of the task, for errors.
        data: can be iterated over again and again.
        seed: of whatever order the data draw at random.
        rank: of this process.
        world: how many processes share each batch.
    """

    def __init__(self, name: str, data: Iterable[Any], seed: int, rank: int = 0, world: int = 1):
        self.name, self.data, self.seed, self.rank, self.world = name, data, seed, rank, world
        self.epoch, self.position = 0, 0
        self._iterator: Iterator[Any] | None = None

    def __next__(self) -> tuple[Batch, float]:
        """This process's part of the next batch, and the weight of its mean loss in the mean of all.

        Raises:
            PlanError: where the data yield nothing, or cannot be iterated over again.
        """
        raw = self._pull()
        if raw is None:
            self.epoch, self.position, self._iterator = self.epoch + 1, 0, None
            raw = self._pull()
            if raw is None:
                raise PlanError(
                    f"The data of task '{self.name}' must yield batches in every epoch, but epoch {self.epoch + 1} "
                    "had none: give a list, a DataLoader or another object that can be iterated over again."
                )
        self.position += 1
        try:
            batch = as_batch(raw)
        except PlanError as error:
            raise PlanError(f"Task '{self.name}': {error}") from error
        return share(batch, self.rank, self.world)

    def peek(self, count: int) -> list[tuple[Batch, float]]:
        """The next batches, as `next` gives them; the stream goes on where it is.

        Args:
            count: how many.
        """
        before = self.state()
        found = [next(self) for _ in range(count)]
        self.seek(**before)
        return found

    def state(self) -> dict[str, int]:
        """Where the stream is."""
        return {"epoch": self.epoch, "position": self.position}

    def seek(self, epoch: int, position: int) -> None:
        """Go on after `position` batches of `epoch`."""
        self.epoch, self.position, self._iterator = epoch, 0, None
        while self.position < position and self._pull() is not None:
            self.position += 1

    def _pull(self) -> Any:
        try:
            return self._read()
        except Exception as error:  # of a data set of the user's own
            raise TrainingError(
                f"The data of task '{self.name}' must yield batches, but batch {self.position + 1} of epoch "
                f"{self.epoch + 1} raised {one_line(error)}"
            ) from error

    def _read(self) -> Any:
        if self._iterator is not None:
            return next(self._iterator, None)
        if hasattr(self.data, "set_epoch"):
            self.data.set_epoch(self.epoch)  # type: ignore[attr-defined]
        # A DataLoader draws its order from the global generator when it is asked for the first batch; other data may
        # use Python's or NumPy's.
        seed = self.seed * _EPOCHS + self.epoch
        with (
            seeded(seed),
            contextlib.nullcontext() if isinstance(self.data, Batches) else seeded_others(seed),
        ):
            self._iterator = iter(self.data)
            return next(self._iterator, None)


def share(batch: Batch, rank: int, world: int) -> tuple[Batch, float]:
    """The part of a batch that falls to one of `world` processes, and the weight of its mean.

    A batch with fewer examples than processes is left whole in each.
    """
    if world == 1 or (size := batch.size) < world:
        return batch, 1.0
    begin, end = size * rank // world, size * (rank + 1) // world

    def cut(tensor: Tensor) -> Tensor:
        return tensor[begin:end] if tensor.ndim and len(tensor) == size else tensor

    weight = (end - begin) * world / size
    return replace(batch.map(cut), place=Place(begin, size, weight)), weight
