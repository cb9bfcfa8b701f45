"""Describes a joint model in a manifest: its members, where each came from, and how its tensors are stored."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from surgery.artifact.layout import encoded_entries, plan_entries
from surgery.artifact.manifest import VERSION, Manifest, MemberEntry, OriginEntry, ReplacementEntry
from surgery.artifact.sketch import sketch
from surgery.disk.places import Places
from surgery.fitting.report import FitReport
from surgery.inputs.probes import followed
from surgery.members.member import Alone, Member, Origin, content_hash
from surgery.members.replacement import Replacement
from surgery.safetensors.writing import aligned_file_bytes
from surgery.storage.states import lazy_state_of
from surgery.storage.stored import Stored
from surgery.version import __version__

_LIBRARIES = ("torch", "transformers", "timm")


@dataclass(frozen=True)
class Described:
    """What a manifest says of a member besides how its tensors are stored.

    Attributes:
        name: of the member.
        origin: with a reference that is relative to the artifact.
        inputs: their sketch.
        hash: content hash of its state dict, where its own files do not hold every tensor as it is.
        bytes: of its own files before it was joined.
        replacements: of its modules.
        alone: what it took before modules of it were replaced; None where none was.
    """

    name: str
    origin: OriginEntry
    inputs: Any
    hash: str | None
    bytes: int
    replacements: tuple[ReplacementEntry, ...] = ()
    alone: Alone | None = None


def describe_member(member: Member, stored: Stored, known: str | None = None) -> Described:
    """What a manifest says of a member that is at hand.

    Args:
        member: with its module, where it has one.
        stored: of the joint model.
        known: content hash of its state dict, where that was taken already.
    """
    state = lazy_state_of(stored, member.name)
    once = {id(each): (key, each.dtype, each.shape) for key, each in state.handles.items()}
    return Described(
        member.name,
        OriginEntry.model_construct(**asdict(member.origin)),
        sketch(member.inputs, _followed(member)),
        (known or content_hash(state)) if _is_changed(stored, member.name) else None,
        aligned_file_bytes(once.values()) + sum(map(len, member.files.values())),
        tuple(_replaced(each.replacement) for each in member.replaced),
        member.alone,
    )


def placed(origin: Origin, places: Places) -> Origin:
    """An origin whose reference is relative to the artifact; that of a live module is no reference."""
    return (
        origin if origin.kind == "module" else replace(origin, reference=places.reference(origin.reference))
    )


def _is_changed(stored: Stored, member: str) -> bool:
    """Whether a member's own files do not hold every tensor of it as it is."""
    coded = any(not each.precision.is_native for each in stored.own(member).values())
    return coded or bool(stored.same(member)) or bool(stored.plan.of(member))


def make_manifest(
    stored: Stored,
    members: Sequence[Described],
    report: FitReport | None,
    recipe: Mapping[str, Any] | None,
    borrowed: Mapping[str, Mapping[str, str]],
    folders: Mapping[str, str],
) -> Manifest:
    """The manifest, still without files.

    Args:
        stored: what the artifact holds.
        members: all of them.
        report: of a fit, if there was one.
        recipe: its document, if there is one.
        borrowed: by member, small files that another one has too, with that member's name.
        folders: by member.
    """
    banks, views, placements = plan_entries(stored)
    entries: dict[str, MemberEntry] = {}
    first: dict[str, str] = {}  # members by what their origin and inputs are
    for each in members:
        name = each.name
        like = first.setdefault(json.dumps([each.origin.model_dump(), each.inputs]), name)
        described: dict[str, Any] = {"origin": each.origin, "inputs": each.inputs}
        if like != name:
            described = {"like": like}
        entries[name] = MemberEntry.model_construct(
            **described,  # pyright: ignore[reportArgumentType]
            hash=each.hash if _is_changed(stored, name) else None,
            bytes=each.bytes,
            ties=dict(stored.ties.get(name, {})),
            encoded=encoded_entries(stored.own(name)),
            same={own: str(at) for own, at in stored.same(name).items()},
            placements=tuple(placements.get(name, ())),
            borrowed=dict(borrowed.get(name, {})),
            folder=None if folders[name] == name else folders[name],
            replacements=each.replacements,
            alone=each.alone and (each.alone.parameters, each.alone.nbytes),
        )
    return Manifest.model_construct(
        format="surgery",
        version=VERSION,
        versions=_versions(),
        members=entries,
        seed=(recipe or {}).get("seed", None if report is None else report.probes.seed),
        banks=banks,
        views=views,
        report=report if report is not None and report.to_json() else None,
    )


def _followed(member: Member) -> frozenset[str]:
    """Places of example inputs on whose values probe inputs depend; none where no probe inputs can be made."""
    try:
        return followed(member)
    except Exception:  # of odd values: nothing can have been measured on what is like them
        return frozenset()


def _replaced(replacement: Replacement) -> ReplacementEntry:
    found = asdict(replacement)
    del found["member"]
    return ReplacementEntry.model_construct(**found)


def _versions() -> dict[str, str]:
    found = {"surgery": __version__}
    for library in _LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found
