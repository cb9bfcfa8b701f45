"""The interface of a method of sharing.

There are two kinds. A `TensorMethod` (`surgery.core.tensor_method`) generates *tensors*: it plans which sites it takes,
makes banks from which their blocks are generated, trains these and stores them. A `ModuleSurgery`
(`surgery.core.module_method`) replaces *modules*: it says which, what stands in their place, and how a plain module
comes of that again. What both have in common is here.

Everything a method needs has a default but for its name, its plan and its bank, so a new one is a few lines
(docs/add_a_method.md). The methods of this package lie below `surgery.methods`, a folder each; those of other packages
are found by the entry points `surgery.methods` of installed packages, or registered by an import.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch

from surgery.core.moves import Moves
from surgery.settings.methods import REGISTERED
from surgery.settings.problems import Strict

if TYPE_CHECKING:
    from surgery.anatomy.sites import Anatomy
    from surgery.core.joint import JointModel
    from surgery.members.member import Member
    from surgery.settings.training import Training
    from surgery.training.loop.trainer import Trainer

Picture = Callable[[dict[str, Any], Sequence[dict[str, Any]], dict[str, Any] | None], bytes | None]
"""Draws lines of a run's log as a PNG file: the first, those of generations, and the last where there is one."""


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
        name: in recipes and artifacts, and wherever one is chosen.
        summary: what it does, in one line, shown where one is chosen.
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
