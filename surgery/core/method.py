"""The interface of a method of sharing.

There are two kinds. A `TensorMethod` generates *tensors*: it plans which sites it takes, makes banks from which their
blocks are generated, trains these and stores them. A `ModuleSurgery` (`surgery.core.module_method`) replaces
*modules*: it says which, what stands in their place, and how a plain module comes of that again.

Everything a method needs has a default but for its name, its plan and its bank, so a new one is a few lines
(docs/add_a_method.md). The methods of this package lie below `surgery.methods`, a folder each; those of other packages
are found by the entry points `surgery.methods` of installed packages, or registered by an import.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor

from surgery.anatomy.plan import follow_up, locations_of
from surgery.core.bank import Bank
from surgery.core.foreign_parts import wrong_parts
from surgery.core.moves import Moves
from surgery.errors import PlanError
from surgery.settings.methods import REGISTERED
from surgery.settings.problems import Strict
from surgery.storage.codecs import Encoded, decode, take_rows

if TYPE_CHECKING:
    from surgery.anatomy.plan import BankPlan, Placement, Plan
    from surgery.anatomy.sites import Anatomy, Site
    from surgery.core.joint import JointModel
    from surgery.core.settle import Settled
    from surgery.fitting.scene import Scene
    from surgery.fitting.units import Arrangement, Group
    from surgery.members.member import Member
    from surgery.settings.target import Target
    from surgery.settings.training import Training
    from surgery.storage.stored import Stored
    from surgery.training.loop.trainer import Trainer

Picture = Callable[[dict[str, Any], Sequence[dict[str, Any]], dict[str, Any] | None], bytes | None]
"""Draws lines of a run's log as a PNG file: the first, those of generations, and the last where there is one."""


States = Mapping[str, Mapping[str, Tensor]]
"""State dicts of the members of a joint model, by name."""


@dataclass(frozen=True)
class Curves:
    """What a page draws of a run, a line for each name, generation by generation.

    Attributes:
        title: of the drawing.
        unit: of the values.
        lines: a value for each generation.
    """

    title: str
    unit: str
    lines: Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class PlanRequest:
    """What a recipe asks of a plan.

    Attributes:
        block: (m, n) of sites that are cut into blocks.
        context: c of hypermodules.
        settings: the method's own, as its `settings` class validated them.
        stacks: patterns of the stacks to take; all by default.
        members: by name, as far as a plan may look at more of them than their anatomies.
    """

    block: tuple[int, int] = (16, 16)
    context: int = 4
    settings: Any = None
    stacks: tuple[str, ...] = ()
    members: Mapping[str, Member] = field(default_factory=dict)


@dataclass(frozen=True)
class Opening:
    """How a dictionary is opened for training.

    Attributes:
        generator: on the CPU; of all that is drawn.
        options: by method's name, what only that method reads.
    """

    generator: torch.Generator
    options: Mapping[str, Any] = field(default_factory=dict)


class Method(ABC):
    """What methods that generate tensors and methods that replace modules have in common.

    Attributes:
        name: in recipes, artifacts and on the command line.
        summary: what it does, in one line for `--help`.
        settings: class of its settings, which a recipe gives under `settings`.
        does: what methods of its kind do, as verb and noun.
        sharded: whether processes that each hold a part of the members can train it (FSDP).
        hardens: whether what it learned softly can be made hard (`harden`).
    """

    name: ClassVar[str]
    summary: ClassVar[str] = ""
    settings: ClassVar[type[Strict]] = Strict
    does: ClassVar[tuple[str, str]] = ("share", "weights")
    sharded: ClassVar[bool] = True
    hardens: ClassVar[bool] = False

    @abstractmethod
    def plan(self, anatomies: Sequence[Anatomy], request: PlanRequest) -> Any:
        """What the method takes of the members, from their anatomies alone, without weights.

        Raises:
            PlanError: where it can take nothing, or settings do not suit the members.
        """

    # -- training ------------------------------------------------------------------------------------------

    def unsuited(self, joint: JointModel, config: Training) -> list[str]:
        """Reasons why the settings of a run do not suit a joint model, in sentences; asked before anything changes."""
        return []

    def phases(self, config: Training) -> str:
        """What sets some generations of a run apart, in words such as `the last 2 with hardened templates`; by default
        nothing.

        Args:
            config: settings of the run.
        """
        return ""

    def start(self, joint: JointModel, config: Training, generator: torch.Generator) -> None:
        """Prepare the method's part of an opened joint model, before the optimizer is made.

        Args:
            joint: to be trained.
            config: settings of the run.
            generator: on the CPU, of the run's seed.
        """
        return

    def harden(self, joint: JointModel) -> None:
        """Make hard what the method learned softly, where it `hardens`.

        Args:
            joint: that the method is used in; it is changed in place.
        """
        return

    def ended(self, joint: JointModel) -> None:
        """Finish a joint model after its training run, before it is reported on or saved."""
        return

    def moves(self, trainer: Trainer) -> Moves:
        """What the method does while it is trained; by default nothing but to be stepped by the optimizer."""
        return Moves(self.name, trainer)

    def pictures(self) -> dict[str, Picture]:
        """What is drawn of a run's log, by file name: functions that return a PNG file, or None for nothing."""
        return {}

    def curves(self, generations: Sequence[dict[str, Any]]) -> list[Curves]:
        """What a page draws of a run's log.

        Args:
            generations: lines of the log, one for each.
        """
        return []


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


_Kind = TypeVar("_Kind", bound=type[Method])


def register_method(kind: _Kind) -> _Kind:
    """Make a method known by its name; a decorator for its class.

    Raises:
        ValueError: where another method has the name.
    """
    known = REGISTERED.get(kind.name)
    if known is not None and type(known) is not kind:
        raise ValueError(f"a method named '{kind.name}' is registered already: {type(known).__qualname__}")
    REGISTERED[kind.name] = kind()
    return kind
