"""Serving: which task a joint model serves, where weights or modules depend on it.

Most methods generate the same weights for every task. A bank that is `by_task` generates other ones for each; a module
that a method put into a member may compute something else for each. Both follow `JointModel.serving`.

Gradient checkpointing runs layers again within a backward pass, when another task may be served, or none. Which task a
layer served the first time follows from the node of the graph that asks for it: autograd numbers its nodes in the order
in which they are made, and the numbers at which tasks changed are kept.
"""

from __future__ import annotations

import inspect
import threading
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import partial
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
        """Note that the forward passes that follow serve a task; None stands for the method's default."""
        ...


def listeners(module: nn.Module) -> list[ServesTasks]:
    """The modules within a module that depend on the task."""
    return [part for part in module.modules() if isinstance(part, ServesTasks)]


def by_task(plan: Plan, dictionary: Dictionary, member: str | None = None) -> list[Placement]:
    """The sites whose weights depend on the task: of one member, or of all."""
    keys = {key for key in dictionary if dictionary.by_task(key)}
    if not keys:
        return []
    return [p for p in (plan.placements if member is None else plan.of(member)) if p.bank in keys]


class Tasks:
    """Which task is served, and which one was when a node of a graph was made.

    Args:
        bodies: the members' modules.

    Attributes:
        heard: the task of which modules were notified last.
    """

    def __init__(self, bodies: nn.Module):
        self._bodies = bodies
        self._listeners: list[ServesTasks] | None = None  # once looked for
        self.heard: str | None = None
        self._since: list[int] = []  # numbers of nodes at which the tasks began to be served
        self._tasks: list[str | None] = []

    def serve(self, task: str | None) -> None:
        """Serve a task from now on."""
        if len(self._since) == _KEPT:
            del self._since[: _KEPT // 2], self._tasks[: _KEPT // 2]
        self._since.append(torch._C._autograd._get_sequence_nr())  # pyright: ignore[reportAttributeAccessIssue]
        self._tasks.append(task)
        self.tell(task)

    def tell(self, task: str | None) -> None:
        """Tell modules that listen."""
        if self._listeners is None:
            self._listeners = listeners(self._bodies)
        self.heard = task
        for each in self._listeners:
            each.serve_task(task)

    def of_node(self, now: str | None) -> str | None:
        """Within a backward pass: the task that was served when the node that is running was made.

        Args:
            now: the task that is served, for nodes of which nothing is known.
        """
        node = torch._C._current_autograd_node()
        at = -1 if node is None else bisect_right(self._since, node._sequence_nr()) - 1
        found = self._tasks[at] if at >= 0 else now
        # What was made while layers ran again belongs to the task of which they were notified.
        return self.heard if found != self.heard and _nested() else found


def _nested() -> bool:
    """Whether a backward pass runs within another one, as that of layers that ran again."""
    # A thread of autograd's own: it runs the nodes of a device, and was not called by `backward`.
    mine = threading.current_thread() is not threading.main_thread() and isinstance(
        threading.current_thread(), threading._DummyThread
    )
    passes, frame = int(mine), inspect.currentframe()
    while frame is not None:
        passes += frame.f_code in _BACKWARD
        frame = frame.f_back
    return passes > 1


_BACKWARD = (torch.autograd.backward.__code__, torch.autograd.grad.__code__)


_KEPT = 4096  # changes of tasks: many more than a step has


def _handed_over(reached: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Gradients of generated tensors, taken from their leaves, for a backward pass.

    Whoever calls `backward` holds what it gives until the pass has ended. So most of these are zeros that take no
    memory: the node that made a tensor takes the gradient itself as it runs, and is the last to hold it.
    """
    found: list[Tensor] = []
    waiting: dict[torch.autograd.graph.Node, dict[int, Tensor]] = {}
    zeros: dict[tuple[torch.dtype, torch.device], Tensor] = {}
    for weight, leaf in reached:
        gradient, node = leaf.grad, weight.grad_fn
        assert gradient is not None  # else it was not reached
        leaf.grad = None
        if node is None:  # a parameter itself
            found.append(gradient)
            continue
        waiting.setdefault(node, {})[weight.output_nr] = gradient
        kind = gradient.dtype, gradient.device
        zero = zeros[kind] = zeros[kind] if kind in zeros else gradient.new_zeros(())
        found.append(zero.expand(gradient.shape))
    for node, own in waiting.items():
        node.register_prehook(partial(_take, own))
    return found


def _take(waiting: dict[int, Tensor], given: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    return tuple(waiting.pop(number, gradient) for number, gradient in enumerate(given))


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
        """Carry the gradients of all leaves, of all tasks, into the dictionary in one backward pass.

        Leaves give their gradients away, which are as large as all weights.
        """
        reached = [(weight, leaf) for weight, leaf in self._pairs if leaf.grad is not None]
        torch.autograd.backward([weight for weight, _ in reached], _handed_over(reached))

    def _leaves(self, placements: Sequence[Placement], task: str | None) -> Weights:
        weights = generate_weights(self._dictionary, placements, task)
        leaves = {key: w.detach().requires_grad_(w.requires_grad) for key, w in weights.items()}
        self._pairs += [(weights[key], leaf) for key, leaf in leaves.items()]
        return leaves
