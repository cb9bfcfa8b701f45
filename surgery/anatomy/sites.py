"""Finds the tensors of a member that are linear maps, and says why every other tensor is left alone.

`discover` turns a trace into an `Anatomy`. No tensor is skipped silently: each one in the state dict is a
site, private or skipped with its reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from surgery.anatomy.selectors import matches, miss, refuse
from surgery.anatomy.stacks import Run, find_runs
from surgery.geometry.views import CanonicalView
from surgery.inputs import inputs_for_part
from surgery.members.member import Member, owners_of, state_tensors
from surgery.members.occupancy import check_unoccupied
from surgery.tracing import Bounds, Trace, Use, trace
from surgery.tracing.ends import is_map
from surgery.util.showing import as_text, plural

BY_REQUEST = "private by request"
"""Why a site is left alone that the user named."""


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
    """A tensor that stays with its member: private by nature or by request, or skipped for a reason."""

    member: str
    name: str
    owners: tuple[str, ...]
    role: str  # "private" or "skipped"
    kind: str  # "embedding", "norm", "bias", "depthwise", "first", "last", "buffer", "unused", ...
    shape: tuple[int, ...]
    dtype: str
    reason: str
    order: int


@dataclass(frozen=True, repr=False)
class Anatomy:
    """What `discover` found in one member; every tensor of its state dict is in exactly one list.

    Attributes:
        member: its name.
        tier: of tracing that served.
        inputs: where the example inputs came from.
        sites: in execution order.
        left_alone: everything else, in execution order.
        notes: on how it was traced.
        uses: every use of every parameter, in execution order.
        runs: layers of one structure that are applied one after the other.
    """

    member: str
    tier: str
    inputs: str
    sites: tuple[Site, ...]
    left_alone: tuple[LeftAlone, ...]
    notes: tuple[str, ...] = ()
    uses: tuple[Use, ...] = ()
    runs: tuple[Run, ...] = ()

    def __repr__(self) -> str:
        title = f"Anatomy of '{self.member}': {plural(len(self.sites), 'site')}, "
        title += f"{plural(len(self.left_alone), 'tensor')} left alone; traced by {self.tier}"
        return as_text(title, [f"{run.path}: {plural(len(run.layers), 'layer')}" for run in self.runs])


def discover(
    member: Member,
    *,
    private: Sequence[str] = (),
    sites: Sequence[str] = (),
    skip: Sequence[str] = (),
    bounds: Bounds | None = None,
) -> Anatomy:
    """Find the sites of a member, and say for every other tensor why it is left alone.

    Selectors are exact state-dict names (of any owner) or `re:REGEX`, matched against the whole name.

    Args:
        member: whose module is traced with its example inputs; it is left exactly as it was.
        private: sites that shall be private.
        sites: tensors that are private by default and shall be sites: first and last maps, embeddings,
            depthwise convolutions.
        skip: tensors to leave alone altogether.
        bounds: on the time and the memory of each way of tracing.

    Returns:
        Every tensor of the state dict, buffers included, either as a site or as left alone with its reason.

    Raises:
        TraceError: where the module can neither be run nor read off its module types.
        PlanError: for selectors that match nothing, for `sites` that are no linear maps, and for a module that belongs
            to a joint model already.

    Example:
        >>> from torch import nn, zeros
        >>> from surgery.members.member import Inputs, Origin
        >>> body = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2))
        >>> origin = Origin("module", "Sequential", "Sequential")
        >>> [site.name for site in discover(Member("a", body, Inputs((zeros(1, 4),)), origin)).sites]
        ['1.weight']
    """
    check_unoccupied({member.name: member.module})  # slots are no parameters: it would lack its sites
    tensors = state_tensors(member.module)
    found = trace(member.module, member.inputs, bounds=bounds, inputs_for=inputs_for_part)
    owners = owners_of(member.module)
    merged = _merge_uses(found)
    for name in _scripted(member.module, owners):
        order = merged[name].order if name in merged else len(merged)
        merged[name] = _Found(
            "scripted", None, order, "scripted", "belongs to a scripted module, which has no slots"
        )
    asked = _check(owners, {"private": private, "sites": sites, "skip": skip}, merged, tensors)
    parts = [
        _part(member.name, name, names, tensors[name], merged.get(name), asked, len(merged))
        for name, names in owners.items()
    ]
    return Anatomy(
        member.name,
        found.tier,
        found.inputs,
        tuple(sorted((p for p in parts if isinstance(p, Site)), key=lambda part: part.order)),
        tuple(sorted((p for p in parts if isinstance(p, LeftAlone)), key=lambda part: part.order)),
        found.notes,
        found.uses,
        find_runs(member.name, parts, found),
    )


@dataclass(frozen=True)
class _Asked:
    """Tensor names that the selectors chose."""

    private: frozenset[str]
    sites: frozenset[str]
    skip: frozenset[str]


@dataclass(frozen=True)
class _Found:
    """All uses of one tensor as one: its kind, its view, and why it is left alone by default."""

    kind: str
    view: CanonicalView | None
    order: int
    private: str = ""  # its kind, where it is private by default
    reason: str = ""
    role: str = "private"


def _merge_uses(found: Trace) -> dict[str, _Found]:
    """What each parameter is, over all its uses; the strongest reason to leave it alone decides."""
    uses: dict[str, list[Use]] = {}
    for use in found.uses:
        uses.setdefault(use.parameter, []).append(use)
    ends = _registered_ends(found)
    return {name: _merge(group, ends.get(name, "")) for name, group in uses.items()}


def _merge(uses: list[Use], end: str) -> _Found:
    maps = [use for use in uses if use.view is not None]
    order = uses[0].order
    embedding = next((use for use in uses if use.kind == "embedding"), None)
    if embedding is not None:
        return _Found("embedding", None, order, "embedding", embedding.reason)
    if not maps:
        use = next((use for use in uses if use.role == "unclear"), uses[0])
        role = "private" if use.role == "private" else "skipped"
        return _Found(use.kind, None, order, use.kind, use.reason, role)
    coarse = min(maps, key=lambda use: use.view.shape[0] if use.view else 0)
    if coarse.role == "private":
        return _Found(coarse.kind, coarse.view, order, coarse.kind, coarse.reason)
    end = "first" if any(use.first for use in maps) else "last" if any(use.last for use in maps) else end
    return _Found(coarse.kind, coarse.view, order, end, _END_REASONS.get(end, ""))


def _scripted(module: nn.Module, owners: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Tensors with an owner in a scripted module: compiled code reads them where they are."""
    paths = tuple(
        f"{path}." if path else ""
        for path, part in module.named_modules()
        if isinstance(part, torch.jit.ScriptModule)
    )
    return [name for name, names in owners.items() if any(each.startswith(paths) for each in names if paths)]


def _registered_ends(found: Trace) -> dict[str, str]:
    """Without a graph, the first and the last registered maps stand for those of the network."""
    maps = [use for use in found.uses if is_map(use)]
    if found.ordered or not maps:
        return {}
    return {maps[-1].parameter: "last", maps[0].parameter: "first"}


def _part(
    member: str,
    name: str,
    owners: tuple[str, ...],
    tensor: Tensor,
    found: _Found | None,
    asked: _Asked,
    end: int,
) -> Site | LeftAlone:
    """One tensor as a site, or as left alone with its reason."""
    shape, dtype = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
    order = end if found is None else found.order

    def alone(role: str, kind: str, reason: str) -> LeftAlone:
        return LeftAlone(member, name, owners, role, kind, shape, dtype, reason, order)

    if name in asked.skip:
        return alone("skipped", found.kind if found else "buffer", "skipped by request")
    if not isinstance(tensor, nn.Parameter) or not tensor.is_floating_point():
        return alone("skipped", "buffer", "is no trainable weight")
    if found is None:
        return alone("skipped", "unused", "no traced operation uses it, and its module's type is unknown")
    view = _view(found, shape)
    if view is not None and name in asked.sites:
        return Site(member, name, owners, found.kind, shape, dtype, view, order)
    if found.private:
        asked_for = found.role == "private" and name in asked.private
        return alone(found.role, found.private, BY_REQUEST if asked_for else found.reason)
    if view is None or name in asked.private:
        return alone("private", found.kind, BY_REQUEST if view is not None else found.reason)
    return Site(member, name, owners, found.kind, shape, dtype, view, order)


def _view(found: _Found | None, shape: tuple[int, ...]) -> CanonicalView | None:
    """The view of a tensor that is a linear map, also of one that is private by default."""
    if found is not None and found.kind == "embedding" and len(shape) == 2:
        return CanonicalView.of("v d -> 1 d v", shape)
    return None if found is None else found.view


def _select(owners: Mapping[str, tuple[str, ...]], selectors: Sequence[str]) -> frozenset[str]:
    """The tensors that selectors mean by any of their names."""
    return frozenset(
        name for name, names in owners.items() if any(matches(s, each) for s in selectors for each in names)
    )


def _check(
    owners: Mapping[str, tuple[str, ...]],
    selectors: Mapping[str, Sequence[str]],
    merged: Mapping[str, _Found],
    tensors: Mapping[str, Tensor],
) -> _Asked:
    """The tensors that are asked for, or one error that names every selector that cannot be met."""
    every = {name for names in owners.values() for name in names}
    wrong = {
        option: [f"'{selector}' {why}" for selector in chosen if (why := miss(selector, every))]
        for option, chosen in selectors.items()
    }
    good = {option: [s for s in chosen if not miss(s, every)] for option, chosen in selectors.items()}
    asked = _Asked(**{option: _select(owners, chosen) for option, chosen in good.items()})
    for name in sorted(asked.sites - asked.skip):
        if _view(merged.get(name), tuple(tensors[name].shape)) is None:
            reason = merged[name].reason if name in merged else "it is a buffer or is not used"
            wrong["sites"].append(f"'{name}' has no view as a linear map ({reason})")
    refuse(wrong)
    return asked


_END_REASONS = {
    "first": "first map of the network: it reads the inputs",
    "last": "last map of the network: it makes the outputs",
}
