"""What templates do while they are trained: mixtures are regularised, and harden before the final generations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

from surgery.core.bank import Parts, Trained
from surgery.core.moves import Facts, Moves
from surgery.disk.untrusted import shown
from surgery.methods.templates.training import (
    describe_stacks,
    harden_stacks,
    mixtures_of,
    penalty,
    stacks_of,
)
from surgery.storage.keys import StateKey
from surgery.training.loop.optimizers import drop, plain

if TYPE_CHECKING:
    from surgery.training.loop.trainer import Trainer


class TemplateMoves(Moves):
    """Mixtures that learn.

    Attributes:
        hardened: whether every layer takes one template by now.
    """

    top: ClassVar[bool] = True

    def __init__(self, name: str, trainer: Trainer):
        super().__init__(name, trainer)
        self.hardened = False

    def terms(self) -> Facts:
        """Those of the plan, and which mixtures there are, which it may not say."""
        found = {key: {**said, "mixture": self.banks[key].mixing} for key, said in super().terms().items()}
        return {key: {"templates": None, **said} for key, said in found.items()}

    # -- parameters and losses -----------------------------------------------------------------------------

    def groups(self) -> list[Trained]:
        """Templates, and mixtures with a learning rate of their own."""
        rate = self.config.templates.lr
        return [replace(t, lr=rate) if t.role == "mixtures" else t for t in super().groups()]

    def penalty(self) -> Tensor | None:
        """Entropy of mixtures and attraction of templates."""
        return penalty(self.joint, self.config.templates)

    # -- a generation --------------------------------------------------------------------------------------

    def before_generation(self) -> None:
        """Harden where the final generations begin."""
        if self.config.hardens(self.trainer.generation):
            self.harden()

    def begins_anew(self, generation: int) -> bool:
        """Mixtures that were better before they hardened are not what will be exported."""
        return self.config.hardens(generation)

    def harden(self) -> None:
        """From here on every layer of a stack takes one template, and mixtures are trained no more."""
        before = self._mixtures()
        harden_stacks(self.joint)
        drop(plain(self.trainer.optimizer), before)
        self.hardened = True

    def _mixtures(self) -> list[nn.Parameter]:
        """Of each stack."""
        return [next(iter(banks.values())).contexts for banks in stacks_of(self.joint).values()]

    # -- its state -----------------------------------------------------------------------------------------

    def pack(self) -> tuple[Parts, Facts]:
        """Whether mixtures are hard."""
        return {}, {"hardened": self.hardened}

    def reads(self, name: str) -> bool:
        """States of earlier versions number templates too."""
        key = StateKey.parse(name)
        return name in ("hardened", "born") or (key.kind == "identity" and key.owner in self.banks)

    def wrong(self, tensors: Parts, facts: Facts, model: Mapping[StateKey, Tensor]) -> Iterator[str]:
        """Templates that are hard where they shall not be."""
        hardened = facts.get("hardened", False)
        if not isinstance(hardened, bool):
            yield f"whether templates are hardened must be true or false, found {shown(hardened)}"
        elif hardened and not self.config.templates.harden:
            yield "templates are hardened, which the settings do not ask for"

    def leaving(self, facts: Facts) -> list[nn.Parameter]:
        """Mixtures, once they are hard."""
        return self._mixtures() if facts.get("hardened") and not self.hardened else []

    def unpack(self, tensors: Parts, facts: Facts) -> None:
        """Harden what was hard: the mixtures that were restored stay what they are."""
        if facts.get("hardened"):
            self.harden()

    # -- what it tells -------------------------------------------------------------------------------------

    def describe(self) -> Facts:
        """Layers and numbers of templates."""
        return {"stacks": describe_stacks(self.joint)}

    def log(self) -> Facts:
        """The mixtures."""
        return {"mixtures": mixtures_of(self.joint)}

    def reached(self) -> Facts:
        """How many templates each stack has."""
        return {
            "templates": {name: facts["templates"] for name, facts in describe_stacks(self.joint).items()}
        }
