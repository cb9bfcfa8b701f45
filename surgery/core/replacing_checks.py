"""Checks of replacements: where modules can be replaced, and whether what stands in their place fits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from surgery.core.module_method import part_of
from surgery.errors import PlanError, SurgeryError
from surgery.inputs.probes import outputs_of
from surgery.members.member import Inputs, Member
from surgery.members.replacement import Replaced, Replacement
from surgery.util.text import one_line, shorten
from surgery.util.wording import sentence

Calls = Mapping[str, Sequence[str]]
"""What each module gave in one forward pass of the member, call by call, in words; under `""` the member itself."""

# Where PyTorch keeps what is replaced and what is no module.
_NOT_HELD = ("_modules", "_parameters", "_buffers")


def check_places(members: Sequence[Member], replacements: Sequence[Replacement]) -> None:
    """Refuse replacements that cannot be made, all in one error.

    Raises:
        PlanError: naming members and paths that do not exist, places that overlap, and modules that are held elsewhere.
    """
    by_name = {member.name: member for member in members}
    bad: list[str] = []
    taken = [each.replacement for member in members for each in member.replaced]
    for each in replacements:
        if each.member not in by_name:
            bad.append(f"there is no member '{each.member}', but {shorten(list(by_name))}")
            continue
        module, what = by_name[each.member].module, f"{each.path} of '{each.member}'"
        if not each.path:
            bad.append(f"all of member '{each.member}' cannot be replaced: name a module of it")
            continue
        try:
            part = part_of(module, each.path, each.member)
        except PlanError as error:
            bad.append(str(error).removesuffix("."))
            continue
        if any(isinstance(up, torch.jit.ScriptModule) for up in _above(module, each.path)):
            bad.append(
                f"{what} is inside a scripted module, whose parts are compiled: script the model afterwards"
            )
            continue
        bad += _overlaps(each, part, module, taken)
        if (holder := next(_holders(module, part), None)) is not None:
            bad.append(
                f"{what} is also held by {holder}, which would go on using it: replace a module around both"
            )
        taken.append(each)
    if bad:
        raise PlanError(sentence(f"Modules cannot be replaced as asked: {'; '.join(dict.fromkeys(bad))}"))


def _above(module: nn.Module, path: str) -> list[nn.Module]:
    """The modules that a path leads through, without its last."""
    steps = path.split(".")
    return [module.get_submodule(".".join(steps[:depth])) for depth in range(len(steps))]


def _overlaps(
    new: Replacement, part: nn.Module, module: nn.Module, others: Sequence[Replacement]
) -> Iterator[str]:
    """What keeps a module from being replaced beside others of its member."""
    for other in (each for each in others if each.member == new.member):
        by = (
            f"method '{new.method}'"
            if new.method == other.method
            else f"methods '{other.method}' and '{new.method}'"
        )
        if other.path == new.path or module.get_submodule(other.path) is part:
            names = new.path if other.path == new.path else f"{other.path}, which is also {new.path},"
            yield f"{names} of '{new.member}' can be replaced once only, but {by} would do so twice: leave one out"
        elif f"{new.path}.".startswith(f"{other.path}.") or f"{other.path}.".startswith(f"{new.path}."):
            inner, outer = sorted((new.path, other.path), key=len, reverse=True)
            yield f"{inner} of '{new.member}' is inside {outer}, which {by} would replace too: leave one out"


def _holders(root: nn.Module, wanted: nn.Module) -> Iterator[str]:
    """Attributes through which code uses a module without PyTorch's knowing: `path.name`."""
    for path, part in root.named_modules():
        if part is wanted:
            continue
        for name, value in vars(part).items():
            if name not in _NOT_HELD and not name.endswith("_hooks") and _holds(value, wanted):
                yield f"{path}.{name}" if path else name


def _holds(value: Any, wanted: nn.Module, depth: int = 2) -> bool:
    if value is wanted or getattr(value, "__self__", None) is wanted:
        return True
    if depth and isinstance(value, (list, tuple, set)):
        return any(_holds(each, wanted, depth - 1) for each in value)
    return (
        bool(depth)
        and isinstance(value, dict)
        and any(_holds(each, wanted, depth - 1) for each in value.values())
    )


def record_calls(member: Member, paths: Sequence[str]) -> Calls | None:
    """What some modules give while the member runs on its example inputs; None where it has no values or no inputs."""
    module = member.module
    tensors = [*module.parameters(), *module.buffers()]
    if any(t.is_meta for t in tensors) or not (member.inputs.args or member.inputs.kwargs):
        return None
    calls: dict[str, list[str]] = {path: [] for path in paths}
    hooks = [
        module.get_submodule(path).register_forward_hook(
            lambda _, __, found, mine=mine: mine.append(_outline(found))
        )
        for path, mine in calls.items()
    ]
    device = tensors[0].device if tensors else torch.device("cpu")
    args, kwargs = tree_map(
        lambda value: value.to(device) if isinstance(value, Tensor) else value,
        (tuple(member.inputs.args), dict(member.inputs.kwargs)),
    )
    try:
        calls[""] = [_outline(outputs_of(module, Inputs(args, kwargs)))]
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def check_calls(member: Member, replaced: Sequence[Replaced], before: Calls | None) -> None:
    """Whether a member runs with its replacements in place, and gives what it gave before.

    Args:
        member: with the replacements in place.
        replaced: those that were made.
        before: as `record_calls` had it.

    Raises:
        PlanError: naming every module that does not fit, or that is not called but read.
    """
    if before is None:
        return
    what = {
        each.path: f"{each.path} of '{member.name}' ({type(each.original).__name__})" for each in replaced
    }
    if unused := [what[path] for path in what if not before[path]]:
        raise PlanError(
            f"A module that is replaced must be called, but {shorten(unused)} is not called with the example inputs: "
            "other code reads its attributes, or nothing uses it; replace the module around it."
        )
    kinds = {each.path: type(member.module.get_submodule(each.path)).__name__ for each in replaced}
    listed = ", ".join(f"{kinds[path]} in place of {what[path]}" for path in what)
    after = _calls_with(member, list(what), listed)
    if unused := [what[path] for path in what if not after[path]]:
        raise PlanError(
            f"What stands in place of a module must be called, but for {shorten(unused)} it is not: other code holds "
            "the module that was there; replace the module around it."
        )
    if wrong := [
        f"{what[path]} gave {', '.join(dict.fromkeys(before[path]))}, but {kinds[path]} gives "
        f"{', '.join(dict.fromkeys(after[path]))}"
        for path in what
        if set(after[path]) != set(before[path])
    ]:
        raise PlanError(
            f"What stands in place of a module must give outputs of the same shapes: {'; '.join(wrong)}; choose "
            "modules whose shapes fit."
        )
    if after[""] != before[""]:
        raise PlanError(
            f"Member '{member.name}' gave {before[''][0]}, but with {listed} it gives {after[''][0]}: choose modules "
            "that leave its outputs their shapes."
        )


def _calls_with(member: Member, paths: Sequence[str], listed: str) -> Calls:
    """Calls of what stands in the places of modules, which is `listed`; `PlanError` where the member does not run."""
    try:
        return record_calls(member, paths) or {}
    except SurgeryError:  # what stands there says itself what is wrong
        raise
    except AttributeError as error:
        raise PlanError(
            f"Code of member '{member.name}' reads a replaced module by attribute: with {listed} it raises "
            f"{one_line(error)}; replace the module around it, or give what stands there that attribute."
        ) from error
    except Exception as error:
        raise PlanError(
            f"What stands in place of a module must take its inputs, but with {listed} member '{member.name}' raises "
            f"{one_line(error)}; choose modules whose shapes fit."
        ) from error


def _outline(found: Any) -> str:
    """Dtypes and shapes of all tensors in what a module gave."""
    tensors = [leaf for leaf in tree_leaves(_plain(found)) if isinstance(leaf, Tensor)]
    return ", ".join(f"{str(t.dtype).removeprefix('torch.')} {[*t.shape]}" for t in tensors) or "no tensor"


def _plain(found: Any) -> Any:
    """Outputs of transformers as ordinary mappings."""
    return dict(found) if isinstance(found, Mapping) else found
