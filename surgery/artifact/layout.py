"""Converts between the plan of a stored joint model and the compact entries of a manifest.

Sites of one bank, layer kind, shape and view share an entry, so that a placement is a name and two numbers;
where a site's blocks start follows from the sites before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from surgery.anatomy.plan import BankPlan, Placement, Plan
from surgery.anatomy.sites import Site
from surgery.artifact.manifest import BankEntry, EncodedGroup, Manifest, ViewEntry
from surgery.disk.untrusted import shown, shown_text
from surgery.errors import ArtifactError
from surgery.geometry.blocks import BlockGrid
from surgery.geometry.views import CanonicalView
from surgery.settings.methods import package_of
from surgery.settings.names import DEFAULT_METHOD
from surgery.storage.codecs import Encoded, Precision, always_native, part_layout
from surgery.storage.keys import piece_name
from surgery.storage.stored import Stored

Form = tuple[Precision, torch.dtype, tuple[int, ...]]
"""How a tensor is stored: precision, and the dtype and shape that it decodes to."""


def plan_entries(stored: Stored) -> tuple[dict[str, BankEntry], tuple[ViewEntry, ...], dict[str, list[Any]]]:
    """Banks by key, views, and placements by member."""
    plan = stored.plan
    banks = {
        bank.key: BankEntry.model_construct(
            block=bank.block,
            context=bank.context,
            dtype=bank.dtype,
            locations=bank.locations,
            stack=bank.stack,
            method=bank.method if bank.method != _method_of(bank.stack) else "",
            settings=dict(bank.settings),
            encoded=encoded_entries(stored.parts(bank.key)),
            package=package_of(bank.method),
        )
        for bank in plan.banks
    }
    views: dict[tuple, int] = {}
    placements: dict[str, list[Any]] = {}
    follow = dict.fromkeys(banks, 0)
    for member in plan.members:
        for p in plan.of(member):
            key = (p.bank, p.site.kind, p.site.shape, p.site.view.pattern, p.site.view.sizes)
            row = (p.site.name, views.setdefault(key, len(views)), p.site.order)
            placements.setdefault(member, []).append(row if p.start == follow[p.bank] else (*row, p.start))
            follow[p.bank] = p.stop
    listed = (
        ViewEntry.model_construct(bank=bank, kind=kind, shape=shape, pattern=pattern, sizes=dict(sizes))
        for bank, kind, shape, pattern, sizes in views
    )
    return banks, tuple(listed), placements


def plan_of(manifest: Manifest) -> Plan:
    """The plan that a manifest describes; what was left alone is not recorded.

    Raises:
        ArtifactError: where a view does not fit its tensor, or a placement reaches beyond its bank.
    """
    for key, bank in manifest.banks.items():
        _dtype_of(bank.dtype, f"bank {key}")
    banks = tuple(
        BankPlan(
            key,
            bank.block,
            bank.context,
            bank.dtype,
            bank.locations,
            bank.stack,
            bank.method or _method_of(bank.stack),
            bank.settings,
        )
        for key, bank in manifest.banks.items()
    )
    views = [_view(number, entry) for number, entry in enumerate(manifest.views)]
    follow = dict.fromkeys(manifest.banks, 0)
    placements: list[Placement] = []
    for member, entry in manifest.members.items():
        for name, number, order, *start in entry.placements:
            kind = manifest.views[number]
            bank = manifest.banks[kind.bank]
            owners = entry.ties.get(name, (name,))
            site = Site(member, name, owners, kind.kind, kind.shape, bank.dtype, views[number], order)
            grid = BlockGrid(*views[number].shape, *bank.block)
            placement = Placement(site, kind.bank, grid, start[0] if start else follow[kind.bank])
            if placement.stop > bank.locations:
                raise ArtifactError(
                    f"The blocks of {member}:{name} must lie among the {bank.locations:,} locations of "
                    f"bank {kind.bank}, but reach to {placement.stop:,}; copy the artifact "
                    "again."
                )
            follow[kind.bank] = placement.stop
            placements.append(placement)
    return Plan(tuple(manifest.members), banks, tuple(placements), ())


def _method_of(stack: str) -> str:
    """The method of a bank that a manifest names none for."""
    return "templates" if stack else DEFAULT_METHOD


def encoded_entries(named: Mapping[str, Encoded]) -> tuple[EncodedGroup, ...]:
    """Tensors that are not stored in their own dtype, grouped by how they are stored."""
    groups: dict[tuple, list[str]] = {}
    for name, encoded in named.items():
        if not encoded.precision.is_native:
            dtype = str(encoded.dtype).removeprefix("torch.")
            groups.setdefault((str(encoded.precision), dtype, encoded.shape), []).append(name)
    return tuple((*how, tuple(sorted(names))) for how, names in sorted(groups.items()))


def encoded_forms(groups: Iterable[EncodedGroup], where: str) -> dict[str, Form]:
    """The inverse of `encoded_entries`, by name.

    Raises:
        ArtifactError: where a precision or a dtype does not exist.
    """
    forms: dict[str, Form] = {}
    for precision, dtype, shape, names in groups:
        try:
            form = Precision.parse(precision), _dtype_of(dtype, where), shape
            if form[0].is_native or always_native(shape, form[1]):
                raise ValueError(f"{shown(precision)} of {shown(dtype)}, of shape {shown(shape)}")
            part_layout(shape, form[1], form[0])  # a codec may have no room for a shape
        except ValueError as error:
            raise ArtifactError(
                f"{where} must be stored in a known precision and dtype, but the manifest says "
                f"{shown_text(str(error))}; import the module that registers its codec, or copy the artifact again."
            ) from error
        forms.update(dict.fromkeys(names, form))
    return forms


def split_parts(name: str, encoded: Encoded) -> dict[str, torch.Tensor]:
    """The tensors that hold `encoded`, by their names in a file: `name` itself, or `name:part`."""
    return {piece_name(name, piece): tensor for piece, tensor in encoded.parts.items()}


def parts_of(encoded: Mapping[str, Encoded]) -> dict[str, torch.Tensor]:
    """`split_parts` of many.

    Raises:
        ArtifactError: where two tensors would have one name.
    """
    parts: dict[str, torch.Tensor] = {}
    for name, each in encoded.items():
        for part, tensor in split_parts(name, each).items():
            if part in parts:
                raise ArtifactError(
                    f"Every stored tensor needs its own name, but two are called '{part}'; rename one."
                )
            parts[part] = tensor
    return parts


def _dtype_of(name: str, where: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ArtifactError(
            f"{where} must have a dtype that torch has, but has {shown(name)}; copy the artifact again."
        )
    return dtype


def _view(number: int, entry: ViewEntry) -> CanonicalView:
    try:
        return CanonicalView.bind(entry.pattern, entry.shape, entry.sizes)
    except ValueError as error:
        raise ArtifactError(
            f"View {number} of the manifest must fit its tensor, but {shown_text(str(error))}; copy the "
            "artifact again."
        ) from error
