"""Measuring: which layers of a pretrained stack a task misses least, before anything of its route is learned.

Layers are left out one after the other, each time that one without which the loss on a few batches stays lowest; those
between which these batches hardly tell are measured on more. That takes forward passes alone. What stays is where
learning begins. Where the last choice is still close, each may be trained for a few steps, all of which are undone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

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


_CLOSE, _MORE = 1.25, 4
"""Losses within this factor of the lowest are close; those are measured on so many times as many batches."""
_TRIED = 3
"""How many of these are tried at most."""


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
    count, steps = gates[0].settings.measure, gates[0].settings.trials
    ahead = max(_MORE * count, steps) + _MORE * count * bool(steps)
    batches = {task.name: [batch for batch, _ in trainer.streams[task.name].peek(ahead)] for task in mine}
    found = {}
    for row, name in enumerate(gates[0].tasks):
        served = [task for task in mine if name in ("", task.name)]
        found[name] = _leave_out(trainer, gates, row, served, batches)
        for depth, each in enumerate(gates):
            each.begin(row, depth not in found[name].left)
    return found


def _leave_out(
    trainer: Trainer,
    gates: Sequence[BernoulliGates],
    row: int,
    tasks: Sequence[Task],
    batches: Mapping[str, Sequence[Batch]],
) -> Measured:
    wanted = count_of(gates)
    assert wanted is not None
    kept, left, losses, passes = list(range(len(gates))), [], [], 0
    count = gates[0].settings.measure
    while len(kept) > wanted:
        places = list(range(len(kept)))
        found = torch.zeros(len(kept), dtype=torch.float64)
        for begin, end in ((0, count), (count, _MORE * count)):
            some = {task.name: batches[task.name][begin:end] for task in tasks}
            new = torch.zeros(len(places), dtype=torch.float64)
            for number, place in enumerate(places):
                on = [depth for depth in kept if depth != kept[place]]
                with _taking(gates, row, on):
                    new[number] = _loss(trainer, tasks, some)
            average([new])  # each process has measured its part of the batches
            found[places] = (found[places] * begin + new * (end - begin)) / end
            passes += len(places) * (len(kept) - 1) * (end - begin) * len(tasks)
            places = [place for place in places if found[place] <= _CLOSE * found[places].min()]
            if len(places) < 2:
                break
        places = sorted(places, key=lambda place: float(found[place]))[:_TRIED]
        steps = gates[0].settings.trials
        if steps and len(places) > 1 and len(kept) == wanted + 1:
            for place in places:
                on = [depth for depth in kept if depth != kept[place]]
                found[place] = _trained(trainer, gates, row, on, tasks, batches, steps)
            judged = _MORE * count
            passes += len(places) * (len(kept) - 1) * (3 * steps + judged) * len(tasks)
        best = min(places, key=lambda place: float(found[place]), default=int(found.argmin()))
        losses.append(float(found[best]))
        left.append(kept.pop(best))
    return Measured(tuple(left), tuple(losses), passes)


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
    batches: Mapping[str, Sequence[Batch]],
    steps: int,
) -> float:
    """The loss of a route on batches that follow, once it alone was trained on the first ones; all of it is undone."""
    judged = _MORE * gates[0].settings.measure
    with _undone(trainer), _taking(gates, row, on):
        settings, total = trainer.config.optimizer, trainer.config.total * trainer.config.steps
        trainer.optimizer = make_optimizer(trainer.joint, settings, trainer.moves)
        trainer.turn = tuple(tasks)
        scheduler = make_scheduler(trainer.optimizer, settings, total)
        for step in range(steps):
            if scheduler is not None:  # the rates that these steps of the run would have
                set_rates(scheduler, trainer.steps + step)
            trainer.compute({task.name: [(batches[task.name][step], 1.0)] for task in tasks})
        found = torch.tensor([_loss(trainer, tasks, {t.name: batches[t.name][-judged:] for t in tasks})])
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
