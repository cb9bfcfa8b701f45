"""Reductions and gathers among processes that train one joint model.

By default every process holds all of it, and only gradients are averaged. `surgery.training.distributed.sharded`
has processes of which each holds a part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from surgery.core.joint import JointModel
from surgery.storage.keys import StateKey
from surgery.training.loop.state import Tensors
from surgery.util.collectives import average


class Processes:
    """One process, or several that hold everything.

    Args:
        accelerator: whose processes these are.
    """

    def __init__(self, accelerator: Any):
        self.accelerator = accelerator

    # -- a step ----------------------------------------------------------------------------------------------

    def average(self, parameters: Sequence[nn.Parameter]) -> None:
        """Average gradients over the processes, all of them in one call."""
        if self.accelerator.num_processes > 1:
            average(p.grad for p in parameters if p.grad is not None)

    def clip(self, parameters: Sequence[nn.Parameter], norm: float) -> None:
        """Scale all gradients together so that their norm is at most `norm`."""
        self.accelerator.clip_grad_norm_(parameters, norm)

    def agree(self, mine: bool) -> bool:
        """Whether what only one process may have noticed shall be done by all, where they need one another for it."""
        return mine

    # -- what is kept ----------------------------------------------------------------------------------------

    def whole(self, tensors: Mapping[StateKey, Tensor]) -> Tensors:
        """Tensors as `model_tensors` has them, put together from all processes; in the main one, on the CPU."""
        return dict(tensors)

    def own(self, tensors: Mapping[StateKey, Tensor]) -> Tensors:
        """What this process holds of tensors that are whole: the inverse of `whole`."""
        return dict(tensors)

    def whole_state(self, parameter: nn.Parameter, value: Tensor) -> Tensor:
        """What an optimizer keeps for a parameter, put together as in `whole`."""
        return value

    def own_state(self, parameter: nn.Parameter, value: Tensor) -> Tensor:
        """The inverse of `whole_state`."""
        return value

    def gathered(self, joint: JointModel) -> JointModel:
        """The joint model as everybody knows it, once training is over."""
        return joint
