"""The losses of all tasks of a run: made from members as they were given, and taken off them at its end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from torch import nn

from surgery.core.joint import JointModel
from surgery.training.tasks.losses import loss_of
from surgery.training.tasks.stateful import close_loss
from surgery.training.tasks.tasks import Loss, Task

Place = Callable[[nn.Module], nn.Module]
"""What puts a copy of a member where it is to run."""


def losses_of(joint: JointModel, tasks: Sequence[Task], place: Place | None = None) -> dict[str, Loss]:
    """Every task's loss; what is distilled are the members as they are now, each copied once and frozen.

    A start may change what members are, where templates are fewer than layers or blocks share by order, so this comes
    before it.

    Args:
        joint: before its start.
        tasks: to be trained.
        place: of the copies; they stay where the members are by default.
    """
    made: dict[str, nn.Module] = {}

    def original(member: str) -> nn.Module:
        if member not in made:
            copy = joint.original(member).eval().requires_grad_(False)
            made[member] = copy if place is None else place(copy)
        return made[member]

    return {
        task.name: loss_of(task.loss, partial(original, task.member), joint[task.member], task.source)
        for task in tasks
    }


@contextmanager
def made_losses(
    joint: JointModel, tasks: Sequence[Task], place: Place | None = None
) -> Iterator[dict[str, Loss]]:
    """`losses_of`, and afterwards members as they were: losses that were made here let go of them."""
    losses = losses_of(joint, tasks, place)
    try:
        yield losses
    finally:
        for task in tasks:
            if not callable(task.loss):
                close_loss(losses[task.name])
