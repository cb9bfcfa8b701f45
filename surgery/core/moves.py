"""What a method does while its banks are trained, beyond being stepped by the optimizer.

The trainer, a run, its state and its log know methods by this interface alone. By default a method does nothing: its
parameters are stepped, its banks saved and restored. A subclass draws noise for a step, regularises, changes its banks
between generations, keeps a state of its own, and says what the log holds of it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from surgery.core.bank import Parts, Trained
from surgery.disk.untrusted import shown, shown_text

if TYPE_CHECKING:
    from surgery.core.joint import JointModel
    from surgery.settings.training import Training
    from surgery.storage.keys import StateKey
    from surgery.training.loop.trainer import Trainer

Facts = dict[str, Any]
"""JSON values by name."""


class Moves:
    """What one method does during a run, for one trainer.

    Args:
        name: of the method.
        trainer: that asks it; it has no optimizer yet.

    Attributes:
        top: whether its state and what it tells the log lie at the top, as those of the methods of this package do; of
            any other they lie under the method's name.
    """

    top: ClassVar[bool] = False

    def __init__(self, name: str, trainer: Trainer):
        self.name, self.trainer = name, trainer

    # -- what it has to do with ----------------------------------------------------------------------------

    @property
    def joint(self) -> JointModel:
        """The joint model that is trained; its plan has the method's settings."""
        return self.trainer.joint

    @property
    def config(self) -> Training:
        """Settings of the run."""
        return self.trainer.config

    @property
    def generator(self) -> torch.Generator:
        """On the CPU, the same in every process and part of a run's state: all that is decided is drawn from it."""
        return self.trainer.generator

    @property
    def banks(self) -> dict[str, Any]:
        """The method's banks by key."""
        return {key: self.joint.dictionary[key] for key in self.joint.plan.keys_of(self.name)}

    def terms(self) -> Facts:
        """By bank's key, the settings that a run's state must agree with besides those of the run; by default the
        plan's.
        """
        return {key: dict(self.joint.plan.bank(key).settings) for key in self.banks}

    # -- parameters ----------------------------------------------------------------------------------------

    def groups(self) -> list[Trained]:
        """What the optimizer steps of the method's banks, with learning rates of roles and of members.

        A bank of several members learns at the lowest of their rates, unless the method `balances` them.
        """
        found: list[Trained] = []
        for key, bank in self.banks.items():
            members = {p.site.member for p in self.joint.plan.in_bank(key)}
            rate = None if self.balances else self._rate(members)
            found += [replace(t, lr=rate) if rate and t.lr is None else t for t in bank.trained()]
        return found

    @property
    def balances(self) -> bool:
        """Whether the method's banks themselves make a member's weights learn at that member's rate."""
        return False

    def _rate(self, members: Collection[str]) -> float | None:
        """The lowest rate of some members, where any has one of its own."""
        settings = self.config.optimizer
        if not settings.rates:
            return None
        return min((settings.rates.get(name, settings.lr) for name in members), default=None)

    def more_groups(self) -> list[Trained]:
        """Further groups: private parameters that are stepped differently, and groups that are empty at first."""
        return []

    # -- a step --------------------------------------------------------------------------------------------

    def before_step(self) -> None:
        """Before each step: draw what all tensors of the method share in it, or set a temperature."""

    def before_pass(self, task: str) -> None:
        """Before each forward pass of a step, with the task that it serves."""

    def penalty(self) -> Tensor | None:
        """What is added to the losses of a step, weighted; computed from parameters anew. None where nothing is."""
        return None

    def before_update(self) -> None:
        """Before the optimizer steps: gradients are there, averaged over processes, and may be changed."""

    def acts_in_steps(self) -> str | None:
        """What the method does in every step that a captured one would not do again, in words; None where nothing.

        A captured step repeats what was computed on the device. What a method decides, draws or counts in Python in one
        of the four functions above is done once, as the step is captured.
        """
        hooks = ("before_step", "before_pass", "penalty", "before_update")
        own = [hook for hook in hooks if getattr(type(self), hook) is not getattr(Moves, hook)]
        return ", ".join(own) or None

    # -- a generation --------------------------------------------------------------------------------------

    def before_generation(self) -> None:
        """Before the first step of a generation."""

    def after_generation(self) -> None:
        """After the last step of a generation."""

    def begins_anew(self, generation: int) -> bool:
        """Whether states from before a generation no longer count, since they are not what will be exported."""
        return False

    def cost_of(self, member: str) -> float:
        """What a member's parameters are worth as they are now, in units of the loss of all tasks.

        It is added to the loss where states are compared, of which the best is kept.
        """
        return 0.0

    # -- its state -----------------------------------------------------------------------------------------

    def pack(self) -> tuple[Parts, Facts]:
        """Tensors and JSON values, equal in all processes, that `unpack` needs beside the banks' own state."""
        return {}, {}

    def reads(self, name: str) -> bool:
        """Whether `unpack` has a use for a tensor or a JSON value of this name; asked of those that lie at the top."""
        return False

    def wrong(self, tensors: Parts, facts: Facts, model: Mapping[StateKey, Tensor]) -> Iterator[str]:
        """Reasons why `unpack` cannot take a state, in words; nothing in memory changes.

        By default the names, dtypes and shapes must be those that `pack` returns now.

        Args:
            tensors: as `pack` returned them.
            facts: as well.
            model: tensors of the joint model in the same state, of banks and others, which fit already.
        """
        mine, said = self.pack()
        if set(tensors) != set(mine) or set(facts) != set(said):
            found, wanted = sorted({*tensors, *facts}), sorted({*mine, *said})
            yield f"of method {self.name} it must hold {shown(wanted)}, found {shown(found)}"
            return
        for name, own in mine.items():
            if (tensors[name].dtype, tensors[name].shape) != (own.dtype, own.shape):
                yield (
                    f"'{shown_text(name)}' of method {self.name} must be {own.dtype} {list(own.shape)}, found "
                    f"{tensors[name].dtype} {list(tensors[name].shape)}"
                )

    def leaving(self, facts: Facts) -> list[nn.Parameter]:
        """The parameters that `unpack` takes out of the optimizer."""
        return []

    def entering(self, tensors: Parts) -> dict[str, list[Tensor]]:
        """The parameters that `unpack` gives to the optimizer, by role in order: tensors of their shape and dtype."""
        return {}

    def unpack(self, tensors: Parts, facts: Facts) -> None:
        """Take over a state in which `wrong` finds nothing; the banks have been restored before."""

    # -- what it tells -------------------------------------------------------------------------------------

    def describe(self) -> Facts:
        """For the log's first line: what is trained."""
        return {}

    def log(self) -> Facts:
        """For the log's line of a generation, after it."""
        return {}

    def words(self) -> list[str]:
        """For the line that is shown while a run goes on, such as `12 hypermodules`."""
        return []

    def lighter(self) -> list[str]:
        """Changes of settings that would take less memory, such as `fewer train.evolution.challengers`."""
        return []

    def tracked(self) -> dict[str, float]:
        """For trackers, after a generation."""
        return {}

    def reached(self) -> Facts:
        """For the report: what was reached."""
        return {}

    def analyse(self) -> Facts:
        """For the log's last line, beside the report."""
        return {}
