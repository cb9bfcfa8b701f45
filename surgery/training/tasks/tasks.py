"""Task: what one member is trained to do. A batch is what its data yield, whatever their form."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from surgery.errors import PlanError

if TYPE_CHECKING:
    from surgery.training.tasks.features import SourceFeatures

TARGETS = ("labels", "label", "target", "targets")

Loss = Callable[[Any, "Batch"], Tensor]
"""Of a member's output and the batch; it may have a state of its own (see `surgery.training.tasks.stateful`)."""


@dataclass(frozen=True)
class Place:
    """Where the examples of this process lie in a batch that several processes share.

    Attributes:
        begin: the first of them.
        whole: how many the batch has in all.
        weight: of their mean in the mean of all.
    """

    begin: int
    whole: int
    weight: float


@dataclass(frozen=True)
class Batch:
    """Arguments of one forward call and what is wanted of it.

    Attributes:
        args: positional arguments.
        kwargs: keyword arguments.
        target: what the loss compares with, or None.
        place: in the batch that several processes share; None where each has all of it.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    target: Any = None
    place: Place | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The same batch with every tensor changed."""

        def leaf(value: Any) -> Any:
            return change(value) if isinstance(value, Tensor) else value

        def mapped(value: Any) -> Any:
            if value is None or isinstance(
                value, Tensor
            ):  # a walk through a tree costs more than a small step's layer
                return leaf(value)
            return tree_map(leaf, value)

        args, kwargs = tuple(map(mapped, self.args)), {key: mapped(each) for key, each in self.kwargs.items()}
        return Batch(args, kwargs, mapped(self.target), self.place)

    @property
    def size(self) -> int:
        """Examples: the first axis of the first tensor, 0 where there is none."""
        for leaf in tree_leaves((self.args, dict(self.kwargs), self.target)):
            if isinstance(leaf, Tensor) and leaf.ndim:
                return len(leaf)
        return 0


def as_batch(raw: Any) -> Batch:
    """What a data loader yields as a `Batch`.

    Args:
        raw: `(inputs, target)`, where inputs are a tensor, a tuple of arguments or a dict of them; a dict
            with its target under `labels`, `label`, `target` or `targets`; or inputs alone.

    Raises:
        PlanError: for anything else.

    Example:
        >>> import torch
        >>> as_batch({"input_ids": torch.zeros(2, 8), "labels": torch.tensor([1, 0])}).target
        tensor([1, 0])
    """
    if isinstance(raw, Batch):
        return raw
    if isinstance(raw, Mapping):
        inputs = dict(raw)
        named = next((name for name in TARGETS if name in inputs), None)
        return Batch((), inputs, inputs.pop(named) if named else None)
    if isinstance(raw, Tensor):
        return Batch((raw,))
    if isinstance(raw, (tuple, list)) and len(raw) == 2:
        inputs, target = raw
        if isinstance(inputs, Mapping):
            return Batch((), dict(inputs), target)
        return Batch(tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,), {}, target)
    if isinstance(raw, (tuple, list)) and len(raw) == 1:
        return as_batch(raw[0])
    several = f" of {len(raw)}" if isinstance(raw, (tuple, list)) else ""
    raise PlanError(
        f"A task's data must yield (inputs, target) pairs, dicts or tensors, found a {type(raw).__name__}{several}."
    )


@dataclass(frozen=True)
class Task:
    """What one member is trained to do.

    Attributes:
        name: unique among the tasks.
        member: name of the member that it trains; several tasks may train one.
        data: anything that can be iterated over again and again and yields batches, for example a
            `DataLoader`; where several processes train, their examples lie along the first axis.
        loss: a function of the member's output and the `Batch`, or a name or a mapping of names to weights
            (see `surgery.training.tasks.losses`).
        metric: a name (see `surgery.training.tasks.metrics`), a torchmetrics metric, or None for the loss alone.
        validation: data for choosing the checkpoint; without any, the training loss chooses.
        test: data that nothing is chosen by.
        weight: of its loss among the tasks' losses.
        source: features of another domain, which losses of adaptation compare with.
        lr: learning rate of the member, in place of the run's; tasks of one member must agree on it.
    """

    name: str
    member: str
    data: Iterable[Any]
    loss: str | Mapping[str, float] | Loss = "cross_entropy"
    metric: Any = None
    validation: Iterable[Any] | None = None
    test: Iterable[Any] | None = None
    weight: float = 1.0
    source: SourceFeatures | None = None
    lr: float | None = None


def prediction_of(output: Any) -> Tensor:
    """The tensor in a member's output that a loss compares: itself, `logits`, or the first one in it.

    Raises:
        PlanError: where the output holds no tensor.
    """
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    values = output.values() if isinstance(output, Mapping) else output
    if isinstance(values, Iterable):
        for value in values:
            if isinstance(value, Tensor):
                return value
    raise PlanError(f"A member's output must hold a tensor, found {type(output).__name__}.")
