"""Processes of which each holds a part of the joint model (`surgery.training.distributed.sharded`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isclose
from typing import Any

import torch
from torch import Tensor, nn

from surgery.core.joint import JointModel
from surgery.errors import PlanError
from surgery.storage.keys import StateKey
from surgery.training.distributed.sharded import ShardedModel
from surgery.training.distributed.shards import Part
from surgery.training.loop.processes import Processes
from surgery.training.loop.state import Tensors
from surgery.util.dtypes import wide


class ShardedProcesses(Processes):
    """Reductions and gathers where no process holds everything.

    Args:
        accelerator: whose processes these are.
        model: of which each holds a part.
    """

    def __init__(self, accelerator: Any, model: ShardedModel):
        super().__init__(accelerator)
        self.model = model

    def average(self, parameters: Sequence[nn.Parameter]) -> None:
        """Gradients of losses are as they shall be after a step; what a penalty added is handed over."""
        self.model.hand_over()

    @torch.no_grad()
    def clip(self, parameters: Sequence[nn.Parameter], norm: float) -> None:
        """Scale all gradients together by their norm over all processes."""
        held, shared = [], []
        for p in parameters:
            if p.grad is not None:
                (shared if self._part(p) is None else held).append(p.grad)
        device = self.accelerator.device
        square = torch.stack([wide(g).square().sum() for g in held] or [torch.zeros((), device=device)]).sum()
        torch.distributed.all_reduce(square)
        square = square + sum(wide(g).square().sum() for g in shared)
        scale = (norm / (square.sqrt() + 1e-6)).clamp_max(1.0)
        for gradient in (*held, *shared):
            gradient.mul_(scale.to(gradient.dtype))

    def agree(self, mine: bool) -> bool:
        """Whether any process says so."""
        said = torch.tensor(float(mine), device=self.accelerator.device)
        torch.distributed.all_reduce(said, torch.distributed.ReduceOp.MAX)
        return bool(said)

    def whole(self, tensors: Mapping[StateKey, Tensor]) -> Tensors:
        """Put together on the CPU of the main process; elsewhere what is held in parts is empty."""
        found = dict(tensors)
        for key, part in self.model.parts.items():
            if key in found:
                found[key] = part.whole(found[key], self.accelerator.device)
        return found

    def own(self, tensors: Mapping[StateKey, Tensor]) -> Tensors:
        """This process's parts of tensors that are whole."""
        parts = self.model.parts
        return {key: parts[key].own(t) if key in parts else t for key, t in tensors.items()}

    def whole_state(self, parameter: nn.Parameter, value: Tensor) -> Tensor:
        """Put together as in `whole` where it has a number for every one of the parameter."""
        part = self._part(parameter)
        return value if part is None or not value.ndim else part.whole(value, self.accelerator.device)

    def own_state(self, parameter: nn.Parameter, value: Tensor) -> Tensor:
        """The inverse of `whole_state`."""
        part = self._part(parameter)
        return value if part is None or not value.ndim else part.own(value)

    def gathered(self, joint: JointModel) -> JointModel:
        """The joint model that was cut, whole again in every process and on the CPU."""
        return self.model.give_back()

    def _part(self, parameter: nn.Parameter) -> Part | None:
        return self.model.part_of(parameter)


def check_alike(joint: JointModel) -> None:
    """Refuse processes that did not load the same weights.

    Raises:
        PlanError: saying what may have kept them from it.
    """
    sizes = [torch.linalg.vector_norm(p.detach(), 1, dtype=torch.float64) for p in joint.parameters()]
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, [float(size) for size in sizes])
    # Machines may sum in another order.
    if any(not isclose(a, b, rel_tol=1e-6) for each in found for a, b in zip(each, found[0], strict=True)):
        raise PlanError(
            "Under FSDP every process must load all members' weights, but they differ: set "
            "`fsdp_cpu_ram_efficient_loading: false`, or load members before training starts its processes."
        )
