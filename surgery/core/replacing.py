"""Replacing: modules of members replaced as a method says, all or none; back as they were; made again; collapsed.

Replacements are made one after the other, each with those before it in place, when members are joined and in the same
order when an artifact is loaded. What was replaced is kept until a fit or a training is over, so that these compare
with the member as it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from surgery.anatomy.plan import SIDE, Plan, make_plan
from surgery.anatomy.sites import discover
from surgery.core.method import PlanRequest
from surgery.core.module_method import ModuleSurgery, Place
from surgery.core.registry import find_method, settings_of
from surgery.core.replacing_checks import check_calls, check_places, record_calls
from surgery.core.sizes import bytes_of_module, parameters_of_module
from surgery.errors import ArtifactError, PlanError, SurgeryError
from surgery.members.member import Alone, Inputs, Member, Origin
from surgery.members.origins.empty import empty_parameters
from surgery.members.replacement import Replaced, Replacement
from surgery.settings.methods import REGISTERED, missing_method, package_of
from surgery.settings.problems import problems_of
from surgery.slots.slots import forget_derived
from surgery.util.copies import duplicate
from surgery.util.randomness import all_seeded, member_seed
from surgery.util.text import one_line
from surgery.util.wording import sentence

# -- plans -----------------------------------------------------------------------------------------------------


def plan_replacements(
    method: str, members: Sequence[Member], request: PlanRequest, *, going_on: bool = False
) -> tuple[Replacement, ...]:
    """The replacements that a method asks for, with the settings that they record.

    Args:
        method: its name.
        members: as they are; nothing is changed.
        request: its settings are the method's own.
        going_on: whether members in which the method replaced modules already, as those of an artifact, stay as they
            are.

    Raises:
        PlanError: where the method can replace nothing, or asks for what is not there.
    """
    found = find_method(method, ModuleSurgery)
    if going_on:
        members = [m for m in members if all(each.replacement.method != method for each in m.replaced)]
    members = [m for m in members if not found.has_its_own(m.module)]
    request = replace(request, members={each.name: each for each in members})
    asked = found.plan([discover(each) for each in members], request) if members else ()
    if members and not asked:
        raise PlanError(
            f"Method '{method}' found no module to replace in {_named(members)}: check `settings`."
        )
    return tuple(replace(each, method=method, package=package_of(method)) for each in asked)


def plan_modules(
    members: Sequence[Member],
    method: str,
    settings: Mapping[str, Any] | None = None,
    *,
    block: tuple[int, int] | None = None,
    context: int = 4,
) -> Plan:
    """Plan a joint model of members in which a method replaces modules: `join` makes the replacements.

    Linear maps of the members with their replacements in place are planned as `make_plan` does.

    Args:
        members: as `load_member` returns them; they are left as they are.
        method: name of a method that replaces modules.
        settings: of that method.
        block: m x n; by default 16 x 16, or whole matrices where the method wants these.
        context: c of the hypermodules that training opens.

    Raises:
        PlanError: for settings that do not suit the method or the members.

    Example:
        >>> import surgery
        >>> member = surgery.load_member("text=./text")
        >>> plan = surgery.plan_modules([member], "routes", {"routing": "gumbel", "layers": 1})
        >>> [each.path for each in plan.replacements]
        ['encoder.layer.0', 'encoder.layer.1']
        >>> joint = surgery.join([member], plan)
    """
    request = PlanRequest(block or (SIDE, SIDE), context, settings_of(method, settings or {}))
    if block is None and not find_method(method, ModuleSurgery).whole:
        block = request.block
    replacements = plan_replacements(method, members, request)
    with modules_replaced(members, replacements) as changed:
        plan = make_plan([discover(each) for each in changed], block, context)
    return replace(plan, replacements=replacements)


# -- in place --------------------------------------------------------------------------------------------------


@contextmanager
def modules_replaced(
    members: Sequence[Member], replacements: Sequence[Replacement], *, keep: bool = False
) -> Iterator[list[Member]]:
    """Inside, members have modules replaced; afterwards, and after an exception, they are as they were.

    Args:
        members: whose modules are changed in place.
        replacements: in their order; none may be within another, and none where one was made before.
        keep: whether replacements stay where all went well.

    Yields:
        the members, which know what was replaced.

    Raises:
        PlanError: for paths that do not exist or overlap, settings that do not hold, modules that cannot be replaced,
            and shapes that do not fit.
    """
    swaps = Swaps()
    try:
        yield _replace_all(members, replacements, swaps) if replacements else list(members)
    except BaseException:
        swaps.undo()
        raise
    if not keep:
        swaps.undo()


def _replace_all(
    members: Sequence[Member], replacements: Sequence[Replacement], swaps: Swaps
) -> list[Member]:
    check_places(members, replacements)
    asked = [_validated(each) for each in replacements]
    modules = {member.name: member.module for member in members}
    mine = {name: [r for r in replacements if r.member == name] for name in modules}
    before = {
        each.name: record_calls(each, [r.path for r in mine[each.name]])
        for each in members
        if mine[each.name]
    }
    alone = {each.name: each.alone or _size_of(each.module) for each in members if mine[each.name]}
    made: dict[str, list[Replaced]] = {name: [] for name in modules}
    for each, (method, how) in zip(replacements, asked, strict=True):
        place = Place(modules, each, how)
        old = place.current
        swaps.put(place.module, old, _made(method, place))
        made[each.member].append(Replaced(each, old))
    found = [
        replace(each, replaced=(*each.replaced, *made[each.name]), alone=alone.get(each.name, each.alone))
        for each in members
    ]
    for each in found:
        if made[each.name]:
            check_calls(each, made[each.name], before[each.name])
            forget_derived(each.module)
    return found


def _size_of(module: nn.Module) -> Alone:
    return Alone(parameters_of_module(module), bytes_of_module(module))


def make_again(name: str, module: nn.Module, replacements: Sequence[Replacement]) -> tuple[Replaced, ...]:
    """`made_again`, where nothing can go wrong afterwards."""
    with made_again(name, module, replacements) as replaced:
        return replaced


@contextmanager
def made_again(
    name: str, module: nn.Module, replacements: Sequence[Replacement]
) -> Iterator[tuple[Replaced, ...]]:
    """Make the replacements that an artifact records; after an exception the module is as it was.

    Args:
        name: of the member.
        module: its architecture as its origin builds it, without weights; it is changed in place.
        replacements: recorded.

    Raises:
        MissingMethodError: where a method is not installed.
        ArtifactError: where the replacements do not suit the architecture.
    """
    for each in replacements:
        try:
            find_method(each.method, ModuleSurgery)
        except PlanError as error:
            raise _not_usable(name, each, error) from None
    bare = Member(name, module, Inputs(), Origin("module", name, name))
    empty = any(p.is_meta for p in module.parameters())
    with ExitStack() as stack:
        try:
            with empty_parameters() if empty else nullcontext():
                made = stack.enter_context(modules_replaced([bare], replacements, keep=True))
        except PlanError as error:
            raise ArtifactError(f"Member '{name}' cannot be built as it was saved: {error}") from error
        yield tuple(Replaced(each.replacement) for each in made[0].replaced)


def _not_usable(name: str, replacement: Replacement, error: PlanError) -> SurgeryError:
    """The error for a replacement whose method is not there, or is of the other kind."""
    if replacement.method in REGISTERED:
        return ArtifactError(
            f"Member '{name}' needs method '{replacement.method}', which replaced {replacement.path}: {error}"
        )
    what = f"replaced {replacement.path}"
    return missing_method(f"Member '{name}'", replacement.method, replacement.package, what)


def _validated(replacement: Replacement) -> tuple[ModuleSurgery, Any]:
    """The method of a replacement, and its settings."""
    method = find_method(replacement.method, ModuleSurgery)
    try:
        return method, method.recorded.model_validate(dict(replacement.settings))
    except ValidationError as error:
        where = f"{replacement.path} of '{replacement.member}'"
        wrong = "; ".join(problems_of(error, method.recorded, where))
        raise PlanError(sentence(f"Method '{replacement.method}': {wrong}")) from None


def _made(method: ModuleSurgery, place: Place) -> nn.Module:
    """What a method puts in a place, where the member is and in its mode."""
    at, old = place.replacement, place.current
    try:
        with all_seeded(member_seed(0, f"{at.member}/{at.path}")):
            new = method.replace(place)
        if not isinstance(new, nn.Module) or new is old:
            raise TypeError(f"replace returned {'the same module' if new is old else type(new).__name__}")
    except SurgeryError:
        raise
    except Exception as error:  # of a method's own
        raise PlanError(
            f"Method '{at.method}' could not replace {at.path} of member '{at.member}': {one_line(error)}; "
            "check its settings."
        ) from error
    devices = {t.device for t in (*place.module.parameters(), *place.module.buffers())}
    if len(devices) == 1 and (device := next(iter(devices))).type not in ("meta", "cpu"):
        new.to(device)
    return new.train(old.training)


class Swaps:
    """Modules that were exchanged, to be taken back in the reverse order."""

    def __init__(self) -> None:
        self._done: list[tuple[nn.Module, str, nn.Module]] = []

    def put(self, root: nn.Module, old: nn.Module, new: nn.Module) -> None:
        """Put a module in the place of another, under each name that it has below `root`."""
        places = [(up, name) for up in root.modules() for name, child in up._modules.items() if child is old]
        for parent, name in places:
            parent._modules[name] = new
            self._done.append((parent, name, old))

    def undo(self) -> None:
        """Take everything back."""
        while self._done:
            parent, name, old = self._done.pop()
            parent._modules[name] = old


# -- as it was, and plain --------------------------------------------------------------------------------------


@contextmanager
def as_it_was(member: Member) -> Iterator[nn.Module]:
    """Inside, a member's module has those modules in it that were replaced and are still kept."""
    swaps = Swaps()
    try:
        yield put_originals(member, swaps)
    finally:
        swaps.undo()


def put_originals(member: Member, swaps: Swaps | None = None) -> nn.Module:
    """Put the modules that were replaced, and are still kept, back into a member's module."""
    swaps = swaps or Swaps()
    for each in reversed(member.replaced):
        if each.original is not None:
            swaps.put(member.module, member.module.get_submodule(each.path), each.original)
    return member.module


def still_replaced(members: Iterable[Member]) -> list[str]:
    """The methods of all replacements whose originals are kept, one for each module."""
    return [
        each.replacement.method for member in members for each in member.replaced if each.original is not None
    ]


def copy_replaced(member: Member, memo: dict[int, Any]) -> tuple[Replaced, ...]:
    """A member's replacements for a copy of it that was made with this memo."""
    return tuple(
        each if each.original is None else replace(each, original=duplicate(each.original, memo))
        for each in member.replaced
    )


def collapse_modules(member: Member, module: nn.Module) -> nn.Module:
    """Turn the replaced modules of a copy of a member into plain ones, in place.

    Args:
        member: whose modules were replaced.
        module: an ordinary copy of its module.

    Raises:
        ExportError: where a method has no plain form of one, with its reason.
    """
    swaps = Swaps()
    for each in reversed(member.replaced):
        method, how = _validated(each.replacement)
        place = Place({member.name: module}, each.replacement, how)
        with torch.inference_mode(False), torch.no_grad():
            plain = method.collapse(place)
        swaps.put(module, place.current, plain.train(place.current.training))
    for name in dict.fromkeys(each.replacement.method for each in member.replaced):
        mine = [each.replacement for each in member.replaced if each.replacement.method == name]
        find_method(name, ModuleSurgery).finish(member, module, mine)
    return module


def _named(members: Sequence[Member]) -> str:
    return ", ".join(f"'{member.name}'" for member in members)
