"""Trainer: members, tasks, optimizer and evolution, one step and one generation at a time. # MUiR, Algorithm 2

A step generates all weights once, runs every task's forward and backward pass at its member's own speed, goes
back through the dictionary once and steps the optimizer once; where tasks alternate, it does so for each of them. What
methods decide comes from a generator on the CPU and from parameters that are equal in all processes, so every process
decides alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from surgery.core.joint import JointModel
from surgery.errors import SurgeryError, TrainingError
from surgery.settings.training import Training
from surgery.training.loop.captured import captured_of
from surgery.training.loop.moves import moves_of
from surgery.training.loop.optimizers import make_optimizer, make_scheduler, plain
from surgery.training.loop.processes import Processes
from surgery.training.tasks.explain import explain_failure
from surgery.training.tasks.running_losses import RunningLosses
from surgery.training.tasks.shared_batches import average_statistics
from surgery.training.tasks.streams import Stream
from surgery.training.tasks.task_losses import losses_of
from surgery.training.tasks.tasks import Batch, Loss, Task


class Trainer:
    """What changes while a joint model is trained.

    Attributes:
        generation: how many are done.
        step: how many steps of the present generation are done.
        moves: what each method does while it is trained.
        turn: the tasks whose batches the present step of the optimizer takes: all, or one where tasks alternate.
    """

    def __init__(
        self,
        joint: JointModel,
        tasks: Sequence[Task],
        config: Training,
        seed: int,
        accelerator: Any,
        losses: Mapping[str, Loss] | None = None,
        processes: Processes | None = None,
    ):
        self.processes = processes or Processes(accelerator)
        self.joint, self.tasks, self.config, self.accelerator = joint, tuple(tasks), config, accelerator
        self.generation, self.step, self.turn = 0, 0, self.tasks
        self.losses = dict(losses or losses_of(joint, tasks))
        joint.to(accelerator.device)
        self.generator = torch.Generator().manual_seed(seed)
        self.moves = moves_of(self)
        self.optimizer = make_optimizer(joint, config.optimizer, self.moves)
        steps = config.total * config.steps
        self.scheduler = make_scheduler(self.optimizer, config.optimizer, steps)
        rank, world = accelerator.process_index, accelerator.num_processes
        self.streams = {
            task.name: Stream(task.name, task.data, seed + number, rank, world)
            for number, task in enumerate(tasks)
        }
        self.running = RunningLosses(accelerator)
        total = sum(task.weight for task in tasks)
        self.weights = {task.name: task.weight / total for task in tasks}
        self.captured = captured_of(self)

    @property
    def steps(self) -> int:
        """The number of steps done so far."""
        return self.generation * self.config.steps + self.step

    @property
    def done(self) -> bool:
        """Whether all generations are done."""
        return self.generation >= self.config.total

    # -- one step ------------------------------------------------------------------------------------------

    def advance(self) -> None:
        """One step of the optimizer, and at a generation's ends what methods do there.

        Raises:
            TrainingError: where a loss is not finite; nothing is stepped.
        """
        if self.step == 0:
            for each in self.moves:
                each.before_generation()
        try:
            self.train_step()
        except torch.OutOfMemoryError as error:  # a member's own pass is explained where it runs
            raise TrainingError(
                "Memory ran out in the dictionary or the optimizer, not in a member: take "
                f"{''.join(f'{words}, ' for each in self.moves for words in each.lighter())}or fewer members together."
            ) from error
        self.step += 1
        if self.step == self.config.steps:
            for each in self.moves:
                each.after_generation()
            if self.captured is not None:
                self.captured.forget()
            self.running.trace = []
            self.step, self.generation = 0, self.generation + 1

    def train_step(self) -> None:
        """Every task's forward and backward pass, and one step of the optimizer, or one for each task. # Eq. (1)"""
        parts: dict[str, Tensor] = {}
        for turn in self._turns():
            self.turn = turn
            drawn = {task.name: self._draw(task.name) for task in turn}  # each as its pass begins
            if self.captured is None:
                parts |= self.compute(drawn)
            else:
                parts |= self.captured.step({name: list(each) for name, each in drawn.items()})
        self.running.add({task.name: parts[task.name] for task in self.tasks})
        if self.scheduler is not None:
            self.scheduler.step()

    def _turns(self) -> list[tuple[Task, ...]]:
        """All tasks together, or each alone in a random order."""
        if not self.config.alternate:
            return [self.tasks]
        order = torch.randperm(len(self.tasks), generator=self.generator)
        return [(self.tasks[number],) for number in order.tolist()]

    def weight(self, task: Task) -> float:
        """The factor of a task's loss, and of what is added for it: one on average where tasks alternate.

        Args:
            task: one of `turn`.
        """
        return self.weights[task.name] * (len(self.tasks) / len(self.turn))

    def _draw(self, task: str) -> Iterator[tuple[Batch, float]]:
        """The batches of a task's passes in one step."""
        for _ in range(self.config.accumulate):
            yield next(self.streams[task])

    def compute(self, batches: Mapping[str, Iterable[tuple[Batch, float]]]) -> dict[str, Tensor]:
        """What one step of the optimizer computes from its batches, for the tasks whose turn it is; their losses.

        Args:
            batches: by task, as many as are accumulated, each with its share of the whole batch.
        """
        parts: dict[str, Tensor] = {}
        accumulate = self.config.accumulate
        for each in self.moves:
            each.before_step()
        with self.joint.step():
            for task in self.turn:
                for batch, share in batches[task.name]:
                    batch = batch.map(self._place)
                    for each in self.moves:
                        each.before_pass(task.name)
                    with self.joint.serving(task.name):
                        loss = self._run(task, batch, share * self.weight(task) / accumulate)
                    part = loss.detach() * (share / accumulate)
                    parts[task.name] = parts[task.name] + part if task.name in parts else part
        for each in self.moves:
            if (extra := each.penalty()) is not None:
                self._backward(extra)
        self.processes.average(self.parameters())
        average_statistics(self.joint.bodies)
        for each in self.moves:
            each.before_update()
        if self.config.optimizer.clip is not None:
            self.processes.clip(self.parameters(), self.config.optimizer.clip)
        optimizer = plain(self.optimizer) if self._direct else self.optimizer
        optimizer.step()
        for parameter in self.parameters():  # as `zero_grad` does, which tells the profiler first
            parameter.grad = None
        return parts

    def _run(self, task: Task, batch: Batch, weight: float) -> Tensor:
        """One task's forward and backward pass; its loss."""
        try:
            with nullcontext() if self.accelerator.mixed_precision == "no" else self.accelerator.autocast():
                output = self.joint[task.member](*batch.args, **batch.kwargs)
                loss = self.losses[task.name](output, batch)
            self.running.look(task.name, loss, self.generation)
            self._backward(loss * weight)
        except SurgeryError:
            raise
        except Exception as error:  # of the member or of a loss of the user's own
            raise TrainingError(explain_failure(task, batch, error)) from error
        return loss

    def losses_so_far(self) -> dict[str, float]:
        """Each task's mean loss over the steps since the last call.

        Raises:
            TrainingError: naming the tasks whose loss is not finite.
        """
        found = self.check()
        self.running.sums = {}
        return found

    def check(self) -> dict[str, float]:
        """Each task's mean loss as `losses_so_far` gives it, without beginning to count anew.

        Raises:
            TrainingError: naming the tasks whose loss is not finite.
        """
        return self.running.means(self.step or self.config.steps, self.generation)

    # -- internals -----------------------------------------------------------------------------------------

    def parameters(self) -> list[nn.Parameter]:
        """All that is trained now, in the order of the optimizer's groups."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    @property
    def _direct(self) -> bool:
        """Whether accelerate would only pass on: no scaled losses, no device that reduces by itself.

        Its wrappers look for packages and signatures in every call, a tenth of a step of small members.
        """
        return self.accelerator.scaler is None and self.accelerator.device.type != "xla"

    def _backward(self, loss: Tensor) -> None:
        if self._direct:
            loss.backward()
        else:
            self.accelerator.backward(loss)

    def _place(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.accelerator.device, non_blocking=True)
