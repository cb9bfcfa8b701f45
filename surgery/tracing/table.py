"""The static table: uses by module type alone, for modules that cannot be run or were not reached."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from torch import Tensor, nn

from surgery.tracing.layers import KINDS, read_module
from surgery.tracing.layers.axes import Axes
from surgery.tracing.layout import Layout, canonical_view
from surgery.tracing.types import Use

# Where a parameter called `weight` may be found once it is reparametrised.
_STORED_AS = ("{}", "parametrizations.{}.original", "parametrizations.{}.original1", "{}_v", "{}_orig")


def table_uses(module: nn.Module, names: Mapping[int, str]) -> tuple[Use, ...]:
    """Uses of parameters by the type of the module that owns them, in order of registration.

    Args:
        module: any module; it is not run.
        names: state-dict name by `id` of its parameters.

    Returns:
        One use for every owner of a parameter of a known module type, and every other vector as private.
    """
    uses: dict[str, Use] = {}
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for path, part in module.named_modules():
        for name, kind, axes in read_module(part):
            for stored in _STORED_AS:
                key = f"{path}.{stored.format(name)}".removeprefix(".")
                tensor = parameters.get(key)
                if tensor is not None and id(tensor) in names:
                    uses[key] = _use(names[id(tensor)], tensor, path, type(part).__name__, kind, axes)
    uses |= _vectors(parameters, names, {use.parameter for use in uses.values()})
    registered = [uses[key] for key in parameters if key in uses]
    return tuple(replace(use, order=order) for order, use in enumerate(registered))


def _use(parameter: str, tensor: Tensor, path: str, op: str, kind: str, axes: Axes | None) -> Use:
    if axes is None:
        kind = "depthwise" if kind.startswith("conv") else kind
        return Use(parameter, op, "private", kind, path, 0, reached=False, reason=KINDS[kind].reason)
    shape = tuple(tensor.shape)
    view = canonical_view(Layout.whole(shape), axes, shape)
    if isinstance(view, str):
        return Use(parameter, op, "unclear", kind, path, 0, reached=False, reason=view)
    return Use(parameter, op, "map", kind, path, 0, view, reached=False)


def _vectors(
    parameters: Mapping[str, Tensor], names: Mapping[int, str], known: Collection[str]
) -> dict[str, Use]:
    """Parameters of one axis are scales and shifts, whatever module owns them."""
    uses: dict[str, Use] = {}
    for key, tensor in parameters.items():
        name = names.get(id(tensor))
        if name is not None and name not in known and tensor.dim() < 2:
            path, _, local = key.rpartition(".")
            kind = "bias" if "bias" in local else "norm"
            uses[key] = Use(name, "", "private", kind, path, 0, reached=False, reason=KINDS[kind].reason)
    return uses
