"""Plain models of hard routes: stacks without the layers that a route leaves out, and configurations that say so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from surgery.core.module_method import SAVE_INSTEAD
from surgery.errors import ExportError, SurgeryError
from surgery.inputs.probes import outputs_of
from surgery.members.member import Member
from surgery.members.origins.layers import correct_layers
from surgery.methods.routes.layers import Left
from surgery.methods.routes.plan import Branches
from surgery.util.modules import kept_modes


def close_stacks(member: Member, module: nn.Module, stacks: Sequence[Sequence[str]]) -> None:
    """Take layers that are left out of a module, number the others anew, and have its configuration say how many.

    Args:
        member: that the module is a copy of.
        module: with a plain layer, or `Left`, at every place; it is changed in place.
        stacks: paths of the layers of each stack.

    Raises:
        ExportError: where layers do not lie in a list, or the module does not compute the same without those left out.
    """
    before = [*module.state_dict(), *(f"{path}.left" for stack in stacks for path in stack)]
    kinds = {tuple(stack): [type(module.get_submodule(path)) is Left for path in stack] for stack in stacks}
    shorter = any(any(gone) for gone in kinds.values())
    wanted = _outputs(member, module) if shorter else None
    for stack, gone in kinds.items():
        if any(gone):
            _close(member, module, stack)
        _number(module, stack)
    if shorter:
        _configure(module, before, kinds)
    if wanted is not None:
        _compare(member, module, wanted)


def turn_off(module: nn.Module, off: Sequence[tuple[Branches, int]]) -> set[tuple[str, ...]]:
    """Have branches that are off add zeros, and put `Left` where nothing is left of a layer.

    Args:
        module: with plain modules at every place; it is changed in place.
        off: what is recorded of the layers of each branch that is off, and its number among those of all layers.

    Returns:
        paths of the layers of each stack some of which are left out.
    """
    found: dict[str, list[int]] = {}
    known: dict[str, Branches] = {}
    for how, depth in off:
        layer, number = divmod(depth, len(how.zeros))
        found.setdefault(how.layers[layer], []).append(number)
        known[how.layers[layer]] = how
    stacks = set()
    for path, numbers in found.items():
        how = known[path]
        if how.passes_on and len(numbers) == len(how.zeros):
            module.set_submodule(path, Left())
            stacks.add(tuple(how.layers))
            continue
        layer = module.get_submodule(path)
        for name in (name for number in numbers for name in how.zeros[number]):
            with torch.no_grad():
                layer.get_parameter(name).zero_()
    return stacks


def _close(member: Member, module: nn.Module, stack: Sequence[str]) -> None:
    parents = {path.rpartition(".")[0] for path in stack}
    parent = module.get_submodule(next(iter(parents))) if len(parents) == 1 else None
    if not isinstance(parent, (nn.ModuleList, nn.Sequential)):
        raise ExportError(
            f"Layers of member '{member.name}' are left out, but {stack[0]} and those after it lie in no list that can "
            f"become shorter: {SAVE_INSTEAD}"
        )
    kept = [child for child in parent._modules.values() if type(child) is not Left]
    parent._modules.clear()
    parent._modules.update({str(i): child for i, child in enumerate(kept)})


def _number(module: nn.Module, stack: Sequence[str]) -> None:
    """Layers know their place where they use it for a cache."""
    parent = stack[0].rpartition(".")[0]
    for number, child in enumerate(module.get_submodule(parent).children()):
        for part in child.modules():
            if isinstance(getattr(part, "layer_idx", None), int):
                part.__dict__["layer_idx"] = number


def _configure(module: nn.Module, before: Sequence[str], kinds: Mapping[tuple[str, ...], list[bool]]) -> None:
    """Have configurations of transformers, and the arguments of timm, say how many layers there are."""
    now = list(module.state_dict())
    seen: set[int] = set()
    for part in module.modules():
        config = getattr(part, "config", None)
        if config is not None and hasattr(config, "to_dict") and id(config) not in seen:
            seen.add(id(config))
            _apply(config, config.to_dict(), correct_layers(config.to_dict(), before, now)[0], kinds)
    if isinstance(getattr(module, "pretrained_cfg", None), Mapping) and len(kinds) == 1:
        (gone,) = kinds.values()
        said = dict(getattr(module, "_model_args", None) or {})
        module.__dict__["_model_args"] = {**said, "depth": gone.count(False)}


def _apply(
    config: Any,
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    kinds: Mapping[tuple[str, ...], list[bool]],
) -> None:
    """Write what differs between two forms of a configuration into it."""
    for key, value in new.items():
        if value == old.get(key):
            continue
        inner = getattr(config, key, None)
        if isinstance(value, Mapping) and hasattr(inner, "to_dict"):
            _apply(inner, old[key], value, kinds)
        elif key == "layer_types":
            gone = next((g for g in kinds.values() if len(g) == len(old[key])), None)
            kept = value if gone is None else [k for k, left in zip(old[key], gone, strict=True) if not left]
            setattr(config, key, kept)
        else:
            setattr(config, key, value)


@torch.no_grad()
def _outputs(member: Member, module: nn.Module) -> Tensor | None:
    """What a module gives for its member's example inputs; None where it has no values, or none are known."""
    tensors = [*module.parameters(), *module.buffers()]
    if any(t.is_meta for t in tensors) or not (member.inputs.args or member.inputs.kwargs):
        return None
    with kept_modes(module.modules()):
        return _flat(outputs_of(module.eval(), member.inputs))


def _flat(found: Any) -> Tensor:
    from torch.utils._pytree import tree_leaves

    leaves = tree_leaves(dict(found) if isinstance(found, Mapping) else found)
    return torch.cat([leaf.flatten().double() for leaf in leaves if isinstance(leaf, Tensor)])


def _compare(member: Member, module: nn.Module, wanted: Tensor) -> None:
    """Whether a module computes what it did with layers that pass on, which are gone now."""
    try:
        found = _outputs(member, module)
    except SurgeryError:
        raise
    except Exception as error:
        found, why = None, f"it raises {type(error).__name__}"
    else:
        why = "it gives others"
    if (
        found is None
        or found.shape != wanted.shape
        or not torch.allclose(found, wanted, rtol=1e-4, atol=1e-5)
    ):
        raise ExportError(
            f"Member '{member.name}' must give the same outputs without the layers that its route leaves out, but "
            f"{why}: other code reads the outputs of single layers. Choose other stacks, or {SAVE_INSTEAD}"
        )
