"""Serving: which task a joint model serves, where weights or modules depend on it.

Most methods generate the same weights for every task. A bank that is `by_task` generates other ones for each; a module
that a method put into a member may compute something else for each. Both follow `JointModel.serving`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from surgery.anatomy.plan import Placement, Plan
from surgery.core.dictionary import Dictionary
from surgery.core.generation import Weights, generate_weights


@runtime_checkable
class ServesTasks(Protocol):
    """A module within a member that computes something else for each task."""

    def serve_task(self, task: str | None) -> None:
        """The forward passes that follow are those of a task; None is the method's default."""
        ...


def listeners(module: nn.Module) -> list[ServesTasks]:
    """The modules within a module that depend on the task."""
    return [part for part in module.modules() if isinstance(part, ServesTasks)]


def by_task(plan: Plan, dictionary: Dictionary, member: str | None = None) -> list[Placement]:
    """The sites whose weights depend on the task: of one member, or of all."""
    keys = {key for key in dictionary if dictionary[key].by_task}
    if not keys:
        return []
    return [p for p in (plan.placements if member is None else plan.of(member)) if p.bank in keys]


class StepLeaves:
    """What the slots hold within a training step, and the generated tensors to which their gradients go back.

    Args:
        plan: of the joint model.
        dictionary: of the joint model.
        fill: puts weights into slots.

    Attributes:
        steady: leaves of the sites whose weights are the same for every task.
    """

    def __init__(self, plan: Plan, dictionary: Dictionary, fill: Callable[[Weights], None]):
        self._dictionary, self._fill = dictionary, fill
        self._pairs: list[tuple[Tensor, Tensor]] = []
        changing = by_task(plan, dictionary)
        self._changing: dict[str, list[Placement]] = {}
        for p in changing:
            self._changing.setdefault(p.site.member, []).append(p)
        keys = {p.bank for p in changing}
        self.steady = self._leaves([p for p in plan.placements if p.bank not in keys], None)
        fill(self.steady)
        self._made: dict[tuple[str, str | None], Weights] = {}
        self._served: dict[str, str | None] = {}

    def follows(self, member: str, task: str | None) -> bool:
        """Whether a member's slots hold what they shall hold for a task."""
        return member not in self._changing or (member in self._served and self._served[member] == task)

    def serve(self, member: str, task: str | None) -> None:
        """Let a member's slots hold the leaves of a task; several passes of one task share them."""
        if (member, task) not in self._made:
            # A pass without gradients may be the first; those that follow need them all the same.
            with torch.inference_mode(False), torch.enable_grad():
                self._made[member, task] = self._leaves(self._changing[member], task)
        self._fill(self._made[member, task])
        self._served[member] = task

    def go_back(self) -> None:
        """Carry the gradients of all leaves, of all tasks, into the dictionary in one backward pass."""
        reached = [(weight, leaf.grad) for weight, leaf in self._pairs if leaf.grad is not None]
        torch.autograd.backward([weight for weight, _ in reached], [gradient for _, gradient in reached])

    def _leaves(self, placements: Sequence[Placement], task: str | None) -> Weights:
        weights = generate_weights(self._dictionary, placements, task)
        leaves = {key: w.detach().requires_grad_(w.requires_grad) for key, w in weights.items()}
        self._pairs += [(weights[key], leaf) for key, leaf in leaves.items()]
        return leaves
