"""Measuring: which layers of a pretrained stack a task misses least, before anything of its route is learned.

Layers are left out one after the other, each time that one without which the loss on a few batches stays lowest.
Choices between which these batches hardly tell race: they are measured on more, until the differences of their losses,
batch by batch, leave one. That takes forward passes alone. What stays is where learning begins. Where the last choice
is still close, each may be trained for a few steps, all of which are undone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from surgery.methods.routes.gates import BernoulliGates, Gates
from surgery.methods.routes.groups import count_of
from surgery.training.loop.optimizers import make_optimizer, make_scheduler, set_rates
from surgery.training.loop.state import random_state, set_random_state, undone
from surgery.training.tasks.stateful import pack_loss, unpack_loss
from surgery.training.tasks.tasks import Batch, Task
from surgery.training.tasks.validation import evaluate
from surgery.util.collectives import average

if TYPE_CHECKING:
    from surgery.training.loop.trainer import Trainer


_CLOSE = 1.25  # times the lowest loss is close, as far as the first batches tell
_SURE = 2.0  # standard errors by which a loss exceeds the lowest, batch by batch, where a race is lost
_LOOKS = (1, 4, 8, 16)  # times as many batches as at first, after each of which a race may be over
_EARLY = 2  # of these, before the last choice: later ones make up for most of what more would tell
_JUDGED = 4  # times as many batches judge what was tried
_TELLING = 8  # batches from which on they tell how much losses scatter
_TRIED = 3  # close choices that are tried, at most


@dataclass(frozen=True)
class Measured:
    """What was measured of one task's route.

    Attributes:
        left: depths in the order in which their layers were left out.
        losses: after each of them.
        passes: forward passes through a single layer, of one batch each; a step of a trial counts three times.
    """

    left: tuple[int, ...]
    losses: tuple[float, ...]
    passes: int

    def document(self) -> dict[str, Any]:
        """As JSON values."""
        return {"left": list(self.left), "losses": list(self.losses), "passes": self.passes}


def can_measure(depths: Sequence[Gates]) -> bool:
    """Whether a route begins with what is measured: one of `gumbel` over a pretrained stack, some layers of which stay.

    Args:
        depths: the gates of a route.
    """
    count = count_of(depths)
    return bool(depths[0].settings.measure and count is not None and count < len(depths)) and all(
        isinstance(gates, BernoulliGates) and gates.own is not None and gates.rest for gates in depths
    )


def begin_with_measured(trainer: Trainer, member: str, depths: Sequence[Gates]) -> dict[str, Measured]:
    """Set the probabilities of a route: `p_init` for layers that stay, `1 - p_init` for those left out.

    Args:
        trainer: whose tasks, losses and next batches are used; its streams stay where they are.
        member: whose route it is.
        depths: its gates.

    Returns:
        by task of the route, what was measured.
    """
    gates = [each for each in depths if isinstance(each, BernoulliGates)]
    mine = [task for task in trainer.tasks if task.member == member]
    batches = _Ahead(trainer)
    found = {}
    for row, name in enumerate(gates[0].tasks):
        served = [task for task in mine if name in ("", task.name)]
        found[name] = _leave_out(trainer, gates, row, served, batches)
        for depth, each in enumerate(gates):
            each.begin(row, depth not in found[name].left)
    return found


class _Ahead:
    """The next batches of tasks, read as far as they are asked for."""

    def __init__(self, trainer: Trainer):
        self.streams = trainer.streams
        self.read: dict[str, list[Batch]] = {}

    def of(self, tasks: Sequence[Task], begin: int, end: int) -> dict[str, list[Batch]]:
        """By task, batches from `begin` to `end`."""
        for task in tasks:
            if len(self.read.get(task.name, ())) < end:
                self.read[task.name] = [batch for batch, _ in self.streams[task.name].peek(end)]
        return {task.name: self.read[task.name][begin:end] for task in tasks}


def _leave_out(
    trainer: Trainer, gates: Sequence[BernoulliGates], row: int, tasks: Sequence[Task], batches: _Ahead
) -> Measured:
    wanted = count_of(gates)
    assert wanted is not None
    kept, left, losses, passes = list(range(len(gates))), [], [], 0
    steps = gates[0].settings.trials
    while len(kept) > wanted:
        choices = [[depth for depth in kept if depth != gone] for gone in kept]
        last = len(kept) == wanted + 1
        times = _LOOKS if last else _LOOKS[:_EARLY]
        close, found, looks = _race(trainer, gates, row, choices, tasks, batches, times)
        passes += looks * (len(kept) - 1) * len(tasks)
        if steps and len(close) > 1 and last:
            close = close[:_TRIED]
            for choice in close:
                found[choice] = _trained(trainer, gates, row, choices[choice], tasks, batches)
            judged = _JUDGED * gates[0].settings.measure
            passes += len(close) * (len(kept) - 1) * (3 * steps + judged) * len(tasks)
        best = min(close, key=lambda choice: found[choice])
        losses.append(found[best])
        left.append(kept.pop(best))
    return Measured(tuple(left), tuple(losses), passes)


def _race(
    trainer: Trainer,
    gates: Sequence[BernoulliGates],
    row: int,
    choices: Sequence[Sequence[int]],
    tasks: Sequence[Task],
    batches: _Ahead,
    times: Sequence[int] = _LOOKS,
) -> tuple[list[int], list[float], int]:
    """Measure choices of layers on more and more batches, as long as several are close.

    Args:
        trainer, gates, row, tasks: of the route.
        choices: depths at which it has its own layers.
        batches: of the tasks.
        times: as multiples of `measure`, the numbers of batches after which a race may be over.

    Returns:
        those that are still close, of lowest mean loss first; the mean losses of all, as far as they came; how many
        batches were passed through choices.
    """
    count = gates[0].settings.measure
    close, means, begin, looks = list(range(len(choices))), [0.0] * len(choices), 0, 0
    found = torch.empty(len(choices), 0, dtype=torch.float64)
    for end in (each * count for each in times):
        new = torch.full((len(choices), end - begin), torch.inf, dtype=torch.float64)
        more = batches.of(tasks, begin, end)
        for number in range(end - begin):
            some = {name: own[number : number + 1] for name, own in more.items()}
            for choice in close:
                with _taking(gates, row, choices[choice]):
                    new[choice, number] = _loss(trainer, tasks, some)
        average([new])  # each process has measured its part of the batches
        found = torch.cat([found, new], 1)
        for choice in close:
            means[choice] = float(found[choice].mean())
        looks += len(close) * (end - begin)
        close = [close[place] for place in still_close(found[close])]
        begin = end
        if len(close) < 2:
            break
    return close, means, looks


def still_close(losses: Tensor) -> list[int]:
    """Which choices may be the best one, of lowest mean loss first.

    Close to the lowest mean are those within a quarter of it; once there are eight batches, only those that exceed it,
    batch by batch, by at most two standard errors of the mean difference.

    Args:
        losses: `[choices, batches]`, all on the same batches.

    Example:
        >>> still_close(torch.tensor([[1.0, 3.0], [1.1, 3.2], [5.0, 5.0]]))
        [0, 1]
        >>> still_close(torch.tensor([[1.0, 3.0], [1.1, 3.2], [5.0, 5.0]]).repeat(1, 4))
        [0]
    """
    means, count = losses.mean(1), losses.shape[1]
    order = means.argsort(stable=True).tolist()
    best = order[0]
    if not means[best].isfinite():
        return [best]
    found = [place for place in order if means[place] <= _CLOSE * means[best]]
    if count < _TELLING:
        return found
    more = losses[found] - losses[best]
    sure = more.mean(1) > _SURE * more.std(1) / count**0.5
    return [place for place, lost in zip(found, sure.tolist(), strict=True) if not lost]


@contextmanager
def _taking(gates: Sequence[BernoulliGates], row: int, on: Sequence[int]) -> Iterator[None]:
    """Inside, a task's route has its own layer at some depths and the identity at the others."""
    task = gates[0].tasks[row]
    try:
        for depth, each in enumerate(gates):
            assert each.own is not None
            own = (each.own if depth in on else len(each.names) - 1,)
            each.harden({name: own if name == task else (each.own,) for name in each.tasks})
        yield
    finally:
        for each in gates:
            each.soften()


def _trained(
    trainer: Trainer,
    gates: Sequence[BernoulliGates],
    row: int,
    on: Sequence[int],
    tasks: Sequence[Task],
    batches: _Ahead,
) -> float:
    """The loss of a route on batches that follow, once it alone was trained on the first ones; all of it is undone."""
    count, steps = gates[0].settings.measure, gates[0].settings.trials
    seen = max(_LOOKS[-1] * count, steps)
    ahead = batches.of(tasks, 0, seen + _JUDGED * count)
    with _undone(trainer), _taking(gates, row, on):
        settings, total = trainer.config.optimizer, trainer.config.total * trainer.config.steps
        trainer.optimizer = make_optimizer(trainer.joint, settings, trainer.moves)
        trainer.turn = tuple(tasks)
        scheduler = make_scheduler(trainer.optimizer, settings, total)
        for step in range(steps):
            if scheduler is not None:  # the rates that these steps of the run would have
                set_rates(scheduler, trainer.steps + step)
            trainer.compute({name: [(own[step], 1.0)] for name, own in ahead.items()})
        found = torch.tensor([_loss(trainer, tasks, {name: own[seen:] for name, own in ahead.items()})])
    average([found])
    return float(found)


@contextmanager
def _undone(trainer: Trainer) -> Iterator[None]:
    """Afterwards all that steps change is as it was: weights, what losses keep, and every generator."""
    optimizer, turn = trainer.optimizer, trainer.turn
    losses = {
        name: {key: value.clone() for key, value in pack_loss(loss).items()}
        for name, loss in trainer.losses.items()
    }
    drawn, own = random_state(), trainer.generator.get_state()
    try:
        with undone(trainer.joint):
            yield
    finally:
        trainer.optimizer, trainer.turn = optimizer, turn
        for name, state in losses.items():
            unpack_loss(trainer.losses[name], state, name)
        set_random_state(*drawn)  # else dropout would go on from where trials left it
        trainer.generator.set_state(own)


def _loss(trainer: Trainer, tasks: Sequence[Task], batches: Mapping[str, Sequence[Batch]]) -> float:
    """The weighted loss of some tasks; infinite where it is not finite."""
    asked = [replace(task, validation=batches[task.name], metric=None) for task in tasks]
    scores = evaluate(trainer.joint, asked, trainer.losses)
    total = sum(trainer.weights[name] * (score.loss or 0.0) for name, score in scores.items())
    return total if total < float("inf") else float("inf")
