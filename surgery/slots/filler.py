"""Fills the slots of members with generated weights.

Without gradients slots are filled once and kept until the dictionary changes; with gradients every call from outside
of a member generates its weights anew; within a step they are leaves that gather gradients, generated once.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from surgery.anatomy.plan import Placement, Plan
from surgery.core.dictionary import Dictionary
from surgery.core.generation import Weights, generate_weights
from surgery.disk.aside import is_aside, put_aside
from surgery.errors import PlanError
from surgery.slots.edits import take_edits
from surgery.slots.serving import StepLeaves, by_task
from surgery.slots.slots import forget_derived
from surgery.util import memory

if TYPE_CHECKING:
    from surgery.core.joint import JointModel


class Filler:
    """Fills the slots of a joint model's members from its dictionary.

    Args:
        joint: the joint model.

    Attributes:
        in_step: whether a step is running.
        inside: by member that runs, outside of steps: the path at which it was entered.
    """

    def __init__(self, joint: JointModel):
        self.joint = joint
        self.in_step = False
        # By member: versions of the dictionary that it was filled from, and task.
        self.filled: dict[str, tuple] = {}
        self.inside: dict[str, str] = {}
        # By member, outside of steps: the task whose weights slots hold.
        self._held: dict[str, str | None] = {}
        self._leaves: StepLeaves | None = None  # what slots hold within a step
        self._resting: set[str] = set()  # members whose slots hold tensors that are mapped

    # -- without gradients -----------------------------------------------------------------------------------

    def begin(self) -> None:
        """Fill the slots of members for the first time: those of mapped weights with the mapped tensors themselves.

        These take no memory, and are generated when their member first runs.
        """
        self.refuse_in_step("Filling the slots")
        with torch.inference_mode(False), torch.no_grad():
            lent = {
                (p.site.member, p.site.name): tensor
                for key in self.joint.dictionary
                for p, tensor in self.joint.dictionary.lent(key)
            }
            if lent:
                self._put_leaves(lent)
            left = [p for p in self.joint.plan.placements if (p.site.member, p.site.name) not in lent]
            for placements in self._in_turn(left):
                with self.joint.dictionary.borrowed():
                    made = generate_weights(self.joint.dictionary, placements, self.joint.task)
                    self._put_leaves({key: put_aside(weight) for key, weight in made.items()})
            if self.joint.dictionary.resting():
                memory.give_back()
            for name in dict.fromkeys(p.site.member for p in self.joint.plan.placements):
                forget_derived(self.joint[name])
        self._note_filled(self.joint.names)
        self._resting = {member for member, _ in lent}

    def _in_turn(self, placements: Sequence[Placement]) -> list[list[Placement]]:
        """Sites that are generated at a time: bank by bank where weights are put aside, and of banks that rest."""
        by_bank = _by_bank(placements)
        rests = {key for key in by_bank if is_aside() or self.joint.dictionary.rests(key)}
        together = [p for p in placements if p.bank not in rests]
        return [
            *([together] if together else []),
            *(by_bank[key] for key in self.joint.dictionary if key in rests),
        ]

    def _note_filled(self, members: Sequence[str]) -> None:
        self.filled.update({name: self._generated_from(name) for name in members})
        self._held.update(dict.fromkeys(members, self.joint.task))
        self._resting -= set(members)

    def refresh(self, members: Sequence[str] | None = None) -> None:
        """Fill slots without gradients, from the dictionary as it is now; see `JointModel.refresh`."""
        self.refuse_in_step("Filling the slots")
        # Tensors made in inference mode could not take part in a later training of private parameters.
        with torch.inference_mode(False), torch.no_grad():
            self._fill_leaves(self.joint.generate(members))
        self._note_filled(tuple(members or self.joint.names))

    def make_current(self, name: str, below: str = "") -> None:
        """Bring a member's slots whose owners begin with `below` up to date with the dictionary, before they are read.

        What a forward pass has generated from the dictionary as it is stays, for its backward pass.
        """
        if self.in_step:
            self._follow_task(name, self.joint.task)
            return
        take_edits(self.joint, [name])
        if self.is_filled(name):
            return
        held = self.joint.slots.fillings[name]
        # By value: a fused optimizer changes rows and leaves no trace in their versions.
        with torch.inference_mode(False), torch.no_grad():
            made = generate_weights(self.joint.dictionary, self._below(name, below), self.joint.task)
            self._fill_leaves({key: t for key, t in made.items() if not torch.equal(held[key[1]].tensor, t)})

    def is_filled(self, name: str) -> bool:
        """Whether a member's slots were filled, without gradients, from the dictionary as it is."""
        return self.filled.get(name) == self._generated_from(name)

    @contextmanager
    def still_filled(self) -> Iterator[None]:
        """Inside, the dictionary becomes what slots hold: those that were filled from it are so afterwards."""
        filled = [name for name in self.joint.names if self.is_filled(name)]
        yield
        self.filled.update({name: self._generated_from(name) for name in filled})

    # -- a step ----------------------------------------------------------------------------------------------

    @contextmanager
    def step(self) -> Iterator[Weights]:
        """Generate once, and go back through the dictionary once; see `JointModel.step`."""
        self._leaves = StepLeaves(self.joint.plan, self.joint.dictionary, self._fill)
        self.in_step = True
        try:
            yield self._leaves.steady
            take_edits(self.joint, self.joint.names)
            self._leaves.go_back()
        finally:
            self.in_step, self._leaves = False, None
            self.filled.clear()

    def _follow_task(self, name: str, task: str | None) -> None:
        """Within a step: let a member's slots hold the weights of a task."""
        if self._leaves is not None and not self._leaves.follows(name, task):
            take_edits(self.joint, [name])
            self._leaves.serve(name, task)

    def refuse_in_step(self, what: str) -> None:
        """Refuse what would lose the gradients of a step.

        Raises:
            PlanError: while a step is running.
        """
        if self.in_step:
            raise PlanError(f"{what} must wait for the end of joint.step(), which is running.")

    # -- calls -----------------------------------------------------------------------------------------------

    def enter(self, name: str, path: str) -> bool:
        """Bring a member's slots up to date before a part of it runs; returns whether they were out of date."""
        if "torch._dynamo" not in sys.modules:
            return self.fill_before(name, path)
        from surgery.slots import untraced  # here, as it imports the compiler

        return untraced.enter(self, name, path)

    enter._torchdynamo_disable = True  # a compiled member breaks its graph once, before its first layer

    def fill_before(self, name: str, path: str) -> bool:
        """What `enter` does; code that a compiler traces calls that one."""
        # Within a backward pass a part runs again for gradient checkpointing, with the weights it had.
        if path and self.is_within(name):
            return False
        again, task = torch._C._current_graph_task_id() != -1, self.joint.task
        if again or task != self.joint.tasks.heard:
            task = self.listen(again)
        if self.in_step:
            self._follow_task(name, task)
            return False
        if path and again:
            if self._held.get(name, task) != task:
                self._fill_again(name, task)
            return False
        take_edits(self.joint, [name])
        self.inside[name] = path
        if torch.is_grad_enabled() and self._learns():
            self.filled.clear()  # a fused optimizer changes rows and leaves no trace in their versions
            mine = self._below(name, f"{path}." if path else "")
            self._fill(generate_weights(self.joint.dictionary, mine, task))
            self._held[name] = task
        elif name in self._resting or not self.is_filled(name):
            self.joint.refresh([name])
        return True

    def _fill_again(self, name: str, task: str | None) -> None:
        """Outside of steps: let slots hold the weights of the task that a part served when it ran first."""
        self._held[name] = task
        if changing := by_task(*self._all, name):
            self.filled.pop(name, None)
            self._fill(generate_weights(self.joint.dictionary, changing, task))

    def listen(self, again: bool) -> str | None:
        """Notify modules that depend on the task, before a part of a member runs, and return that task.

        Args:
            again: whether it runs again, within a backward pass.
        """
        tasks, task = self.joint.tasks, self.joint.task
        if again:
            task = tasks.of_node(task)
        if task != tasks.heard:
            tasks.tell(task)
        return task

    def leave(self, name: str, path: str) -> None:
        """Note that a part of a member has run."""
        if self.inside.get(name) == path:
            del self.inside[name]

    leave._torchdynamo_disable = True

    def is_within(self, name: str) -> bool:
        """Whether a part of a member that begins to run is within one for which all was seen to."""
        return name in self.inside and not self.in_step

    def runs(self, name: str) -> bool:
        """Whether a part of a member is running, called from outside of it."""
        return name in self.inside

    # -- internals -------------------------------------------------------------------------------------------

    def _generated_from(self, name: str) -> tuple:
        """A value that stays equal as long as a member's generated weights do."""
        changes = by_task(*self._all, name)
        return self.joint.versions(), self.joint.task if changes else None

    @property
    def _all(self) -> tuple[Plan, Dictionary]:
        return self.joint.plan, self.joint.dictionary

    def _below(self, name: str, below: str) -> list[Placement]:
        """The sites of a member with an owner whose name begins with `below`."""
        return [p for p in self.joint.plan.of(name) if any(o.startswith(below) for o in p.site.owners)]

    def _fill(self, weights: Weights) -> None:
        """Fill slots for passes that go backward: there will be other weights before the next one."""
        for (member, site), weight in weights.items():
            self.joint.slots.put(member, site, weight)
            self.joint.slots.leave_in_place(member, site)
        for name in {member for member, _ in weights}:
            forget_derived(self.joint[name])

    def _fill_leaves(self, weights: Weights) -> None:
        self._put_leaves(weights)
        for name in {member for member, _ in weights}:
            forget_derived(self.joint[name])

    def _put_leaves(self, weights: Weights) -> None:
        learns = self._learns()
        # PyTorch picks the order of a product's sums by whether its factors are views and require gradients,
        # also where nothing is recorded: slots are leaves like the parameters that they replace.
        for key, weight in weights.items():
            leaf = weight.detach().requires_grad_(learns and self.joint.trains(*key))
            self.joint.slots.put(*key, leaf)

    def _learns(self) -> bool:
        return self.joint.dictionary.learns


def _by_bank(placements: Sequence[Placement]) -> dict[str, list[Placement]]:
    """Placements of each bank by its key."""
    found: dict[str, list[Placement]] = {}
    for p in placements:
        found.setdefault(p.bank, []).append(p)
    return found
