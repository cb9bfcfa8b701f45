"""The interface of a method that generates tensors.

It plans which sites it takes, makes banks from which their blocks are generated, trains these and stores them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from surgery.anatomy.plan import follow_up, locations_of
from surgery.core.bank import Bank
from surgery.core.foreign_parts import wrong_parts
from surgery.core.method import Method, Opening, PlanRequest
from surgery.errors import PlanError
from surgery.settings.problems import Strict
from surgery.storage.codecs import Encoded, decode, take_rows

if TYPE_CHECKING:
    from surgery.anatomy.plan import BankPlan, Placement, Plan
    from surgery.anatomy.sites import Anatomy, Site
    from surgery.core.joint import JointModel
    from surgery.core.settle import Settled
    from surgery.fitting.scene import Scene
    from surgery.fitting.units import Arrangement, Group
    from surgery.settings.target import Target
    from surgery.settings.training import Training
    from surgery.storage.stored import Stored

States = Mapping[str, Mapping[str, Tensor]]
"""State dicts of the members of a joint model, by name."""


class TensorMethod(Method):
    """A method that generates tensors.

    Attributes:
        form: the layout of stored parts that `unpack` reads; see `Bank.form`.
        stored_as: how reports say that a tensor is stored; by default the method's name.
        recorded: class of the settings of a bank in an artifact, which bounds all that others may have written; by
            default that of `settings`.
        claims: whether `arrange` decides on the sites of its banks, in place of the fit's own ways of storing them.
        lever: the number among settings, or of the target, that `asks` reads, for advice.
    """

    does: ClassVar[tuple[str, str]] = ("generate", "tensors")
    form: ClassVar[str]
    stored_as: ClassVar[str] = ""
    recorded: ClassVar[type[Strict] | None] = None
    claims: ClassVar[bool] = True
    lever: ClassVar[str] = ""

    @abstractmethod
    def plan(self, anatomies: Sequence[Anatomy], request: PlanRequest) -> Plan:
        """Which sites go into which banks; what the method has no use for is planned as `make_plan` does."""

    @abstractmethod
    def make(self, plan: BankPlan, blocks: Tensor, generator: torch.Generator) -> Bank:
        """The bank that comes nearest to given blocks.

        Args:
            plan: of the bank, with the method's `settings`.
            blocks: `[L, m*n]`, float32 or float64.
            generator: on the CPU.
        """

    @abstractmethod
    def unpack(self, plan: BankPlan, parts: Mapping[str, Tensor]) -> Bank:
        """The inverse of the bank's `pack`, of decoded parts.

        Raises:
            KeyError: where a part is missing.
        """

    def weight(self, plan: BankPlan, placement: Placement, parts: Mapping[str, Tensor]) -> Tensor | None:
        """The weight of a site that has a bank to itself, made of parts alone; None, the default, has the bank made
        instead.

        Members that stay packed ask for it whenever a layer runs. Bits are those of the bank's `settled_blocks`.

        Args:
            plan: of a bank of this site alone, as `restrict` makes it.
            placement: of the site.
            parts: decoded; nobody may write to them.
        """
        return None

    def wrong_parts(self, plan: BankPlan, parts: Mapping[str, Encoded]) -> list[str]:
        """Reasons why `unpack` cannot read parts that somebody else may have written, in words.

        Shapes are checked before values, and both before anything is computed from them. By default a bank is made of
        the parts, which must have as many locations as planned, generate a block of the planned shape for each, and all
        be of use to `unpack`.
        """
        return wrong_parts(self, plan, parts)

    def location_bytes(self, plan: BankPlan, parts: Mapping[str, Encoded]) -> Tensor:
        """Bytes that each location takes of stored parts `[L]`, float64; by default an equal part of all."""
        whole = sum(each.nbytes for each in parts.values())
        return torch.full((plan.locations,), whole / max(plan.locations, 1), dtype=torch.float64)

    def open(self, plan: Plan, banks: Mapping[str, Bank], how: Opening) -> dict[str, Bank]:
        """Banks that can be trained in place of those that a joint model has: joined, fitted or loaded.

        By default a bank of the method's own form stays, and any other is made anew from what it generates.

        Args:
            plan: of the joint model.
            banks: of this method, by key.
            how: generator and options.
        """
        made = {}
        for key, bank in banks.items():
            own = bank.form == self.form
            made[key] = bank if own else self.make(plan.bank(key), bank.settled_blocks(), how.generator)
        return made

    def restrict(
        self, plan: BankPlan, placements: Sequence[Placement], parts: Mapping[str, Encoded]
    ) -> tuple[BankPlan, list[Placement], dict[str, Encoded]]:
        """The part of a stored bank that some placements need; what they share is not decoded.

        By default parts with as many rows as the bank has locations are cut, where that generates the same blocks, and
        otherwise all of the bank is kept.

        Args:
            plan: of the bank.
            placements: those to keep.
            parts: of the bank, by name.

        Returns:
            the plan of what is left, the placements in it, and its parts.
        """
        chosen = locations_of(placements)
        rows = {name for name, each in parts.items() if each.shape[:1] == (plan.locations,)}
        cut = {name: take_rows(each, chosen) if name in rows else each for name, each in parts.items()}
        smaller, moved = replace(plan, locations=len(chosen)), follow_up(placements)
        whole = self.unpack(plan, {name: decode(each) for name, each in parts.items()})
        try:
            own = self.unpack(smaller, {name: decode(each) for name, each in cut.items()})
            same = torch.equal(own.settled_blocks(), whole.settled_blocks()[chosen])
        except Exception:  # of a method's own: what else has as many rows belongs to no location
            same = False
        return (smaller, moved, cut) if same else (plan, list(placements), dict(parts))

    def common(self, plan: BankPlan, parts: Mapping[str, Encoded]) -> Encoded | None:
        """The part of a stored bank that all its sites have in common, a matrix `[S * out, in]`, where `addition` and
        `extend` can add a site that resembles it; None, the default, where sites cannot be added.
        """
        return None

    def addition(self, scene: Scene, site: Site, common: Encoded) -> Arrangement:
        """An arrangement that stores one more site in a stored bank, which stays as it is.

        Its first unit is what the bank has in common, which costs nothing; its bank is of the one site alone, with that
        part as it is stored.

        Args:
            scene: of the member that the site is of.
            site: to be added.
            common: as the method of this name returns it.
        """
        raise NotImplementedError(f"method {self.name} adds no sites to its banks")

    def extend(
        self, plan: BankPlan, parts: Mapping[str, Encoded], more: BankPlan, added: Mapping[str, Encoded]
    ) -> tuple[BankPlan, dict[str, Encoded]]:
        """A stored bank with further sites behind its own, nothing of it decoded; the inverse of `restrict`.

        Args:
            plan: of the bank.
            parts: of the bank, by name; they stay as they are.
            more: the plan of the bank of the added sites, which has the same in common.
            added: its parts.
        """
        raise NotImplementedError(f"method {self.name} adds no sites to its banks")

    def lend(
        self, key: str, site: Site, tensor: Encoded
    ) -> tuple[BankPlan, Placement, dict[str, Encoded]] | None:
        """A new bank whose common part is a plain tensor as it is stored, so that other sites can be added to it; None,
        the default, where that cannot be.

        Args:
            key: of the bank.
            site: of the tensor.
            tensor: of its shape.
        """
        return None

    def given_back(self, plan: BankPlan, parts: Mapping[str, Encoded]) -> Encoded | None:
        """The tensor that `lend` made a bank of, where no site of it has anything of its own; else None."""
        return None

    def alignment(self, plan: BankPlan, parts: Mapping[str, Encoded]) -> tuple[Tensor, int]:
        """Who shares what in a stored bank: the number of what each location draws on `[L]`, and how many of these
        numbers, from 0 on, are hypermodules. By default every location has its own.
        """
        return torch.arange(plan.locations), 0

    def asks(self, plan: Plan, target: Target) -> str:
        """What settings fix, in words such as `rank 4`: a fit without another target then makes exactly this.

        With an error bound or a budget besides, precisions follow from these. Empty where a fit may choose whether to
        use the method at all. By default the settings of the method's banks, where they have any.

        Args:
            plan: of this method's banks alone.
            target: what is asked of the fit.
        """
        settings = plan.banks[0].settings if plan.banks else {}
        return ", ".join(f"{name} {value}" for name, value in settings.items())

    def told_by(self, plan: Plan) -> dict[str, Any]:
        """The settings by which a recipe makes a plan again; by default those of its banks.

        Args:
            plan: of this method's banks alone.
        """
        return dict(plan.banks[0].settings)

    def exactly(self, scene: Scene, plan: Plan) -> Settled | None:
        """The banks that settings ask for, in the members' precision; None, the default, for those that `make` gives.

        Args:
            scene: what is being fitted.
            plan: of this method's banks alone.

        Raises:
            PlanError: where there are no such banks.
        """
        return None

    def arrange(self, scene: Scene, plan: Plan) -> list[Group] | None:
        """What a fit can choose from for the sites of the method's banks; None, the default, for the sites apart or the
        banks that `make` gives.

        Args:
            scene: what is being fitted.
            plan: of this method's banks alone.
        """
        return None

    def report(
        self, plan: Plan, stored: Stored, originals: Mapping[str, Mapping[str, Tensor]]
    ) -> dict[str, Any]:
        """What a fit's report says of the stacks of a plan, by name: dataclasses of whole numbers; nothing by default.

        Args:
            plan: of this method's banks alone, as it was before the fit.
            stored: what the fit made.
            originals: of each member.
        """
        return {}

    def training_options(self, config: Training) -> Any:
        """The options that `open` gets when a run begins; None where the method has no use for any."""
        return None

    def candidates(self, joint: JointModel, states: States) -> tuple[str, ...]:
        """The members of a source that a joint model could start as (transfer).

        Args:
            joint: as `join` made it.
            states: of the source.

        Raises:
            PlanError: where there is none; by default for all methods, which take nothing of a source.
        """
        raise PlanError(f"Method '{self.name}' begins from no source: leave `train.templates.source` out.")

    def begin_as(self, joint: JointModel, states: States, like: str, config: Training, seed: int) -> None:
        """Start a joint model as one member of a source.

        Args:
            joint: as `join` made it; it is changed in place.
            states: of the source.
            like: the source's member as which it begins.
            config: settings of the run.
            seed: of all that is drawn.
        """
        raise NotImplementedError(f"method {self.name} begins from no source")

    def take_over(self, joint: JointModel, loaded: JointModel) -> None:
        """Give members that were joined anew the banks that they had in the artifact they came from.

        By default a bank goes on where the method made it and its sites lie as they did.

        Args:
            joint: as `join` made it; its banks are replaced in place.
            loaded: as `load` returned it.
        """
        for key in joint.plan.keys_of(self.name):
            mine, theirs = (
                [(p.site.member, p.site.name, p.grid, p.start) for p in each.plan.in_bank(key)]
                for each in (joint, loaded)
            )
            if mine and mine == theirs and loaded.dictionary[key].form == self.form:
                joint.dictionary.banks[key] = loaded.dictionary[key]
