"""Accumulates the tasks' losses over a generation and checks that they are finite."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from surgery.errors import TrainingError
from surgery.util.dtypes import wide


class RunningLosses:
    """Sums over the steps since they were last reported.

    Args:
        accelerator: whose device they are on and whose processes share them.

    Attributes:
        sums: by task.
        trace: the losses of every step of a generation, a tensor of all tasks for each.
    """

    def __init__(self, accelerator: Any):
        self.accelerator = accelerator
        self.sums: dict[str, Tensor] = {}
        self.trace: list[Tensor] = []

    @property
    def prompt(self) -> bool:
        """Whether each loss is looked at as it is made.

        Elsewhere that would wait for the device, or other processes for this one, so the sums tell.
        """
        return self.accelerator.device.type == "cpu" and self.accelerator.num_processes == 1

    def look(self, name: str, loss: Tensor, generation: int) -> None:
        """Raise at once, where it is looked at.

        Raises:
            TrainingError: naming the task whose loss is not finite.
        """
        if self.prompt and not math.isfinite(loss.detach()):
            raise TrainingError(_not_finite({name: float(loss.detach())}, generation))

    def add(self, losses: Mapping[str, Tensor]) -> None:
        """Add a step's; after one that is not finite none, so that it names its task."""
        before = self.sums
        self.trace.append(torch.stack([wide(value) for value in losses.values()]))
        if not before or self.prompt:
            self.sums = {name: before[name] + value if before else value for name, value in losses.items()}
            return
        good = torch.stack(list(before.values())).sum().isfinite()
        self.sums = {name: before[name] + torch.where(good, value, 0) for name, value in losses.items()}

    def steps(self) -> list[list[float]]:
        """The losses of every step of this generation, a list of all tasks for each; all processes call it."""
        if not self.trace:
            return []
        return self.accelerator.reduce(torch.stack(self.trace), "mean").tolist()

    def means(self, steps: int, generation: int) -> dict[str, float]:
        """By task, over so many steps and all processes.

        Raises:
            TrainingError: naming the tasks whose losses are not finite.
        """
        if not self.sums:
            return {}
        sums = self.accelerator.reduce(torch.stack([wide(each) for each in self.sums.values()]), "mean")
        found = {name: float(value) / steps for name, value in zip(self.sums, sums.tolist(), strict=True)}
        if bad := {name: value for name, value in found.items() if not math.isfinite(value)}:
            raise TrainingError(_not_finite(bad, generation))
        return found


def _not_finite(losses: Mapping[str, float], generation: int) -> str:
    return (
        f"The loss of task {', '.join(losses)} must be finite, found {', '.join(map(str, losses.values()))} in "
        f"generation {generation + 1}: lower the learning rate, clip gradients (train.optimizer.clip), or look at its "
        "data."
    )
