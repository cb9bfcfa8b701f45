"""Module method: a way of sharing that replaces modules of members, as everything else of the package sees it.

It says which modules, what stands in their place, and how a plain module comes of that again, or why none does. All
else is done for it (`surgery.core.replacing`): modules are put in place all or none and taken back where a merge fails,
outputs are compared with the member as it was, and artifacts say which modules were replaced and how.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from surgery.core.method import Method, PlanRequest
from surgery.errors import ExportError, PlanError
from surgery.members.member import Member
from surgery.members.replacement import Replacement
from surgery.settings.problems import Strict, advice_on
from surgery.util.wording import sentence

if TYPE_CHECKING:
    from surgery.anatomy.sites import Anatomy


@dataclass(frozen=True)
class Place:
    """A place in a member where a module is replaced, as a method sees it.

    Attributes:
        modules: of all members by name, with the replacements before this one in their places; what a module of one
            member shares with another member's is found here too.
        replacement: which module, and how.
        how: the settings of the replacement, as the method's `recorded` class validated them.
    """

    modules: Mapping[str, nn.Module]
    replacement: Replacement
    how: Any = None

    @property
    def module(self) -> nn.Module:
        """The member's whole module."""
        return self.modules[self.replacement.member]

    @property
    def current(self) -> nn.Module:
        """What stands in the place: for `replace` what is to be replaced, for `collapse` what `replace` made."""
        return self.part(self.replacement.path)

    def part(self, path: str, member: str | None = None) -> nn.Module:
        """A module of a member by its path.

        Args:
            path: below the member's module.
            member: whose; by default that of the replacement.

        Raises:
            PlanError: where there is none, with the nearest path.
        """
        name = member or self.replacement.member
        return part_of(self.modules[name], path, name)


class ModuleSurgery(Method):
    """A method that replaces modules.

    The parameters of what stands in their place belong to the member: they are trained, stored and, where they are
    linear maps, shared as any others. Modules that it takes from elsewhere in the member, as they are, share their
    tensors with that place.

    Attributes:
        recorded: class of the settings of one replacement, by which it is made again when an artifact is loaded. They
            may come from an artifact of others: whatever they may be has to be in this class.
        whole: whether sites go into the dictionary as whole matrices where no block is given, for methods that share
            modules: these are then trained nearly as fast as without a dictionary.
    """

    does: ClassVar[tuple[str, str]] = ("replace", "modules")
    recorded: ClassVar[type[Strict]] = Strict
    whole: ClassVar[bool] = False

    @abstractmethod
    def plan(self, anatomies: Sequence[Anatomy], request: PlanRequest) -> Sequence[Replacement]:
        """Which modules are replaced, and all that is needed to do so again when an artifact is loaded."""

    def has_its_own(self, module: nn.Module) -> bool:
        """Whether a member was written with modules of the method, so that none of its own have to be replaced."""
        return False

    @abstractmethod
    def replace(self, place: Place) -> nn.Module:
        """The module that takes a place; modules that exist must not be changed.

        It is made when members are joined and again when an artifact is loaded, where parameters have no values (they
        are on the meta device) and those of the result are read from the artifact. Random draws are the same each time.

        Args:
            place: where, and how.
        """

    def collapse(self, place: Place) -> nn.Module:
        """A plain module that computes what the replaced one does, of the class that was there before, with tensors of
        its own. By default there is none.

        Args:
            place: in a copy of the member that may be used up.

        Raises:
            ExportError: where there is none, saying why and what to do.
        """
        raise ExportError(
            f"{place.replacement.path} of member '{place.replacement.member}' must become an ordinary module, but "
            f"method '{self.name}' has no ordinary form of {type(place.current).__name__}: {SAVE_INSTEAD}"
        )

    def finish(self, member: Member, module: nn.Module, replacements: Sequence[Replacement]) -> None:
        """Finish a copy of a member once all modules that the method replaced in it are plain again; by default
        nothing.

        Args:
            member: as it is in the joint model.
            module: a copy of its module, to be changed in place.
            replacements: that the method made in it.

        Raises:
            ExportError: where no plain model comes of it.
        """
        return


SAVE_INSTEAD = "save the joint model, which `surgery.load` reads where the method is installed."
"""The remedy where a replaced module has no plain form."""


def part_of(module: nn.Module, path: str, member: str) -> nn.Module:
    """A module of a member by its path.

    Raises:
        PlanError: where there is none, with the nearest path.
    """
    paths = {name: part for name, part in module.named_modules(remove_duplicate=False) if name}
    if path not in paths:
        short = sorted(paths, key=lambda name: (name.count("."), name))[:8]
        raise PlanError(
            sentence(f"Member '{member}' has no module '{path}': {advice_on(path, paths, short)}")
        )
    return paths[path]
