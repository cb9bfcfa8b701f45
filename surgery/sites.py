"""Sites: which tensors of a member are linear maps, and why every other tensor is left alone.

`discover` turns a trace into an `Anatomy`. No tensor is skipped silently: each one in the state dict is a site, an
adapter or skipped with its reason.
"""

from __future__ import annotations

from dataclasses import dataclass

from surgery.views import CanonicalView


@dataclass(frozen=True)
class Site:
    """One weight tensor that is a linear map.

    Attributes:
        member: the member's name.
        name: first owner, a state-dict key.
        owners: all names under which the tensor is tied, `name` first.
        kind: layer kind, for example `linear` or `conv2d`.
        shape: of the tensor.
        dtype: torch name without prefix, for example `float32`.
        view: tensor <-> `[S, out, in]`.
        order: place in execution order.
    """

    member: str
    name: str
    owners: tuple[str, ...]
    kind: str
    shape: tuple[int, ...]
    dtype: str
    view: CanonicalView
    order: int


@dataclass(frozen=True)
class LeftAlone:
    """A tensor that stays with its member: an adapter by its nature or by request, or skipped for a reason."""

    member: str
    name: str
    owners: tuple[str, ...]
    role: str  # "adapter" or "skipped"
    kind: str  # "embedding", "norm", "bias", "depthwise", "first", "last", "buffer", "unused", ...
    shape: tuple[int, ...]
    dtype: str
    reason: str
    order: int


@dataclass(frozen=True)
class Anatomy:
    """What `discover` found in one member; every tensor of its state dict is in exactly one of the two lists."""

    member: str
    tier: str
    inputs: str
    sites: tuple[Site, ...]
    left_alone: tuple[LeftAlone, ...]
    notes: tuple[str, ...] = ()
