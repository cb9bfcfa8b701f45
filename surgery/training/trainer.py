"""Trainer: members, tasks, optimizer and evolution, one step and one generation at a time. # MUiR, Algorithm 2

A step generates all weights once, runs every task's forward and backward pass at its member's own speed, goes
back through the dictionary once and steps the optimizer once. Evolutionary decisions come from a generator on
the CPU and from parameters that are equal in all processes, so every process takes the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from surgery.errors import TrainingError
from surgery.joint import JointModel
from surgery.training.config import Training
from surgery.training.evolution import Resized, carry, conclude, contend
from surgery.training.losses import loss_of
from surgery.training.optimizers import make_optimizer, make_scheduler
from surgery.training.starts import siblings
from surgery.training.streams import Stream
from surgery.training.tasks import Task


class Trainer:
    """What changes while a joint model is trained.

    Attributes:
        generation: how many are done.
        step: how many steps of the present generation are done.
        moved: share of locations whose hypermodule the last decision changed.
    """

    def __init__(
        self, joint: JointModel, tasks: Sequence[Task], config: Training, seed: int, accelerator: Any
    ):
        self.joint, self.tasks, self.config, self.accelerator = joint, tuple(tasks), config, accelerator
        self.generation, self.step, self.moved = 0, 0, 0.0
        originals: dict[str, nn.Module] = {}
        self.losses = {
            task.name: loss_of(task.loss, lambda t=task: _original(joint, t, originals)) for task in tasks
        }
        joint.to(accelerator.device)
        self.capacity = {key: bank.hypermodules for key, bank in self.banks.items()}
        self.generator = torch.Generator().manual_seed(seed)
        self.siblings = {key: siblings(joint, key) for key in self.banks}
        self.optimizer = make_optimizer(joint, config.optimizer)
        steps = config.total * config.steps
        self.scheduler = make_scheduler(self.optimizer, config.optimizer, steps)
        rank, world = accelerator.process_index, accelerator.num_processes
        self.streams = {
            task.name: Stream(task.name, task.data, seed + number, rank, world)
            for number, task in enumerate(tasks)
        }
        self.running: dict[str, Tensor] = {}
        total = sum(task.weight for task in tasks)
        self.weights = {task.name: task.weight / total for task in tasks}

    @property
    def banks(self) -> Mapping[str, Any]:
        """The dictionary's banks by key."""
        return {key: self.joint.dictionary[key] for key in self.joint.dictionary}

    @property
    def done(self) -> bool:
        """Whether all generations are done."""
        return self.generation >= self.config.total

    # -- one step ------------------------------------------------------------------------------------------

    def advance(self) -> None:
        """One step of the optimizer, and at a generation's ends its evolution.

        Raises:
            TrainingError: where a loss is not finite; nothing is stepped.
        """
        if self.step == 0 and self.config.competes(self.generation):
            self.contend()
        self.train_step()
        self.step += 1
        if self.step == self.config.steps:
            self.conclude()
            self.step, self.generation = 0, self.generation + 1

    def train_step(self) -> None:
        """Every task's forward and backward pass, and one step of the optimizer. # Eq. (1)"""
        parts: dict[str, Tensor] = {}
        accumulate = self.config.accumulate
        with self.joint.step():
            for task in self.tasks:
                for _ in range(accumulate):
                    batch, share = next(self.streams[task.name])
                    batch = batch.map(self._place)
                    with self.accelerator.autocast():
                        output = self.joint[task.member](*batch.args, **batch.kwargs)
                        loss = self.losses[task.name](output, batch)
                    scaled = loss * (share * self.weights[task.name] / accumulate)
                    self.accelerator.backward(scaled)
                    part = loss.detach() * (share / accumulate)
                    parts[task.name] = parts[task.name] + part if task.name in parts else part
        self._reduce()
        for name, value in parts.items():
            self.running[name] = self.running[name] + value if name in self.running else value
        if self.config.optimizer.clip is not None:
            self.accelerator.clip_grad_norm_(self._parameters(), self.config.optimizer.clip)
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)

    def losses_so_far(self) -> dict[str, float]:
        """Each task's mean loss over the steps since the last call.

        Raises:
            TrainingError: naming the tasks whose loss is not finite.
        """
        steps = self.step or self.config.steps
        names = list(self.running)
        sums = torch.stack([self.running[name].float() for name in names]) if names else torch.zeros(0)
        if names:
            sums = self.accelerator.reduce(sums, "mean")
        found = {name: float(value) / steps for name, value in zip(names, sums.tolist(), strict=True)}
        self.running.clear()
        if bad := [name for name, value in found.items() if not math.isfinite(value)]:
            raise TrainingError(
                f"The loss of task {', '.join(bad)} must be finite, found "
                f"{', '.join(str(found[name]) for name in bad)} in generation {self.generation}: lower the "
                "learning rate, clip gradients (train.optimizer.clip), or look at its data."
            )
        return found

    # -- one generation ------------------------------------------------------------------------------------

    def contend(self) -> None:
        """Let alternatives compete for sampled locations of every bank."""
        alpha = self.config.alpha(self.generation)
        for key, bank in self.banks.items():
            resized = contend(
                bank,
                self.config.evolution,
                alpha,
                self.capacity[key],
                self.generator,
                self.siblings[key],
            )
            self._follow(resized)
            parameters = [bank.contest.soft]
            self._soft_group()["params"] += parameters
            if bank.contest.contexts is not None:
                self._context_group()["params"].append(bank.contest.contexts)

    def conclude(self) -> None:
        """Decide every contest; unused hypermodules and their optimizer rows go."""
        changed, locations = 0, 0
        for bank in self.banks.values():
            contest = bank.contest
            if contest is None:
                continue
            resized, moved = conclude(bank)
            self._drop([contest.soft, contest.contexts])
            self._follow(resized)
            changed, locations = changed + moved, locations + bank.locations
        self.moved = changed / locations if locations else 0.0

    def _drop(self, parameters: Sequence[nn.Parameter | None]) -> None:
        gone = {id(p) for p in parameters if p is not None}
        for group in self.optimizer.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in gone]
        for parameter in parameters:
            if parameter is not None:
                _plain(self.optimizer).state.pop(parameter, None)

    def _follow(self, resized: Sequence[Resized]) -> None:
        for each in resized:
            carry(_plain(self.optimizer), each)

    # -- internals -----------------------------------------------------------------------------------------

    def _soft_group(self) -> dict[str, Any]:
        return next(g for g in self.optimizer.param_groups if g["role"] == "soft")

    def _context_group(self) -> dict[str, Any]:
        return next(g for g in self.optimizer.param_groups if g["role"] == "contexts")

    def _parameters(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _place(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.accelerator.device, non_blocking=True)

    def _reduce(self) -> None:
        """Average gradients over the processes, all of them in one call."""
        if self.accelerator.num_processes == 1:
            return
        gradients = [p.grad for p in self._parameters() if p.grad is not None]
        flat = torch.cat([g.reshape(-1).float() for g in gradients])
        flat = self.accelerator.reduce(flat, "mean")
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))


def _plain(optimizer: Any) -> torch.optim.Optimizer:
    return getattr(optimizer, "optimizer", optimizer)


def _original(joint: JointModel, task: Task, made: dict[str, nn.Module]) -> nn.Module:
    """A frozen copy of the task's member as it is now, one for all tasks of the member."""
    if task.member not in made:
        made[task.member] = joint.extract(task.member).eval().requires_grad_(False)
    return made[task.member]
