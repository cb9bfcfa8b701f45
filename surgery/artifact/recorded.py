"""Reads what an artifact records of a member besides tensors, and checks it against an architecture."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from surgery.anatomy.plan import torch_dtype
from surgery.artifact.manifest import Manifest
from surgery.artifact.sketch import draw
from surgery.disk.untrusted import UnreadableError, parse_json, read_regular, shown_text
from surgery.errors import ArtifactError
from surgery.members.extra_state import NAME as EXTRA_STATE
from surgery.members.extra_state import from_document
from surgery.members.member import Alone, Inputs, Member, Origin, shapes_of
from surgery.members.replacement import Replaced, Replacement
from surgery.storage.stored import Stored
from surgery.util.text import shorten

LARGEST_SMALL = 1 << 28  # bytes of a tokenizer or a configuration
DICTIONARY, WEIGHTS = "dictionary", "weights"
TOGETHER = f"members/{WEIGHTS}"  # what members have of their own where that is little, by folder
TENSOR_FILE = re.compile(rf"(.*/)?({DICTIONARY}|{WEIGHTS})(-\d{{5}}-of-\d{{5}})?\.safetensors")
INDEX_FILE = re.compile(rf"(.*/)?({DICTIONARY}|{WEIGHTS})\.safetensors\.index\.json")


def origin_of(manifest: Manifest, member: str) -> Origin:
    """Where a member came from."""
    entry = manifest.members[manifest.members[member].like or member].origin
    assert entry is not None  # the manifest was validated
    return Origin(**entry.model_dump())


def replacements_of(manifest: Manifest, member: str) -> tuple[Replacement, ...]:
    """The modules of a member in whose places others stand."""
    return tuple(
        Replacement(member, each.path, each.method, each.settings, each.package)
        for each in manifest.members[member].replacements
    )


def alone_of(manifest: Manifest, member: str) -> Alone | None:
    """What a member took before modules of it were replaced, as far as it is recorded; None where none was."""
    entry, report = manifest.members[member], manifest.report
    if entry.alone is not None:
        return Alone(*entry.alone)
    if not entry.replacements or report is None or member not in report.original_bytes:
        return None
    return Alone(report.parameters.get(member, 0), report.original_bytes[member])  # before it was recorded


def bytes_before(manifest: Manifest) -> dict[str, int]:
    """Bytes of members of which modules were replaced, as they were before."""
    alone = {name: alone_of(manifest, name) for name in manifest.members}
    return {name: each.nbytes for name, each in alone.items() if each is not None}


def inputs_of(manifest: Manifest, member: str) -> Inputs:
    """A member's example inputs, drawn from their sketch.

    Raises:
        ArtifactError: where it is no sketch.
    """
    try:
        return draw(manifest.members[manifest.members[member].like or member].inputs)
    except ValueError as error:
        raise ArtifactError(
            f"The example inputs of member '{member}' must be a sketch, but {error}; copy the artifact again."
        ) from error


def hash_of(manifest: Manifest, member: str) -> str | None:
    """The content hash of a member's state dict as the artifact gives it back, where the manifest determines it.

    A member whose own files hold every tensor as it is has none of its own; if its outputs did not move, it is what was
    fitted.
    """
    report = manifest.report
    if manifest.members[member].hash is None and report is not None and report.errors.get(member) == 0:
        return report.hashes.get(member)
    return manifest.members[member].hash


def is_original(manifest: Manifest, member: str) -> bool:
    """Whether a member's weights are known to be those that its origin gave."""
    known = None if manifest.report is None else manifest.report.hashes.get(member)
    return known is not None and known == hash_of(manifest, member)


def read_member(folder: Path, manifest: Manifest, member: str, module: nn.Module) -> Member:
    """A member as it is recorded, with the module that is given.

    Raises:
        ArtifactError: where its small files are missing or changed.
    """
    files = read_small_files(folder, manifest, member)
    replaced = tuple(Replaced(each) for each in replacements_of(manifest, member))
    origin, inputs = origin_of(manifest, member), inputs_of(manifest, member)
    return Member(member, module, inputs, origin, files, replaced=replaced, alone=alone_of(manifest, member))


def small_files(manifest: Manifest, member: str) -> dict[str, str]:
    """A member's small files: where each lies in the artifact, by its own relative path."""
    prefix = f"{manifest.folder_of(member)}/"
    own = {
        path.removeprefix(prefix): path
        for path in manifest.files
        if path.startswith(prefix) and not TENSOR_FILE.fullmatch(path) and not INDEX_FILE.fullmatch(path)
        if path != f"{prefix}{EXTRA_STATE}"
    }
    borrowed = manifest.members[member].borrowed
    own.update({file: f"{manifest.folder_of(lender)}/{file}" for file, lender in borrowed.items()})
    return dict(sorted(own.items()))


def read_small_files(folder: Path, manifest: Manifest, member: str) -> dict[str, bytes]:
    """A member's small files, each with the recorded hash.

    Raises:
        ArtifactError: naming every file that is missing or is not the one recorded.
    """
    found: dict[str, bytes] = {}
    bad: list[str] = []
    for file, path in small_files(manifest, member).items():
        try:
            found[file] = read_regular(folder / path, LARGEST_SMALL)
        except UnreadableError as error:
            bad.append(f"{path} {error}" if os.path.lexists(folder / path) else f"{path} is missing")
            continue
        if hashlib.sha256(found[file]).hexdigest() != manifest.files[path].sha256:
            bad.append(f"{path} is not the file that was recorded")
    raise_damaged(folder, bad)
    return found


def read_extra_state(folder: Path, manifest: Manifest, members: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Extra state of the members that have any, by key of the state dict.

    Raises:
        ArtifactError: naming every file that is missing, is not the one recorded, or is no such document.
    """
    found: dict[str, dict[str, Any]] = {}
    bad: list[str] = []
    for name in members:
        path = f"{manifest.folder_of(name)}/{EXTRA_STATE}"
        if path not in manifest.files:
            continue
        try:
            content = read_regular(folder / path, LARGEST_SMALL)
            if hashlib.sha256(content).hexdigest() != manifest.files[path].sha256:
                bad.append(f"{path} is not the file that was recorded")
            else:
                found[name] = from_document(parse_json(content))
        except (UnreadableError, ValueError) as error:
            bad.append(f"{path} {error}" if os.path.lexists(folder / path) else f"{path} is missing")
    raise_damaged(folder, bad)
    return found


def check_fit(stored: Stored, member: str, module: nn.Module) -> None:
    """Compare the names and shapes that are stored for a member with its architecture.

    Raises:
        ArtifactError: naming all missing, unexpected and misshapen tensors.
    """
    if found := misfits(stored_shapes(stored, member), shapes_of(module)):
        raise ArtifactError(
            f"The tensors stored for member '{member}' must be those of {type(module).__name__}, but "
            f"there are {found}; copy the artifact again, or install the library versions "
            "in its manifest."
        )


def check_came_back(stored: Stored, found: Stored, member: str) -> None:
    """Check that a member's tensors were read with the names and shapes that they were written with.

    Raises:
        ArtifactError: where any differs.
    """
    if bad := misfits(stored_shapes(stored, member), stored_shapes(found, member)):
        raise ArtifactError(f"tensors of member '{member}' came back as others: {bad}")


def stored_shapes(stored: Stored, member: str) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors that are stored for a member, by every name of theirs."""
    shapes = {name: each.shape for name, each in stored.plain(member).items()}
    ties = {**stored.ties.get(member, {}), **{p.site.name: p.site.owners for p in stored.plan.of(member)}}
    shapes.update({p.site.name: p.site.shape for p in stored.plan.of(member)})
    shapes.update({name: shapes[first] for first, names in ties.items() if first in shapes for name in names})
    return shapes


def stored_dtypes(stored: Stored, member: str) -> set[torch.dtype]:
    """Dtypes of all tensors that are stored for a member."""
    sites = {torch_dtype(p.site.dtype) for p in stored.plan.of(member)}
    return {each.dtype for each in stored.plain(member).values()} | sites


def misfits(stored: Mapping[str, tuple[int, ...]], own: Mapping[str, tuple[int, ...]]) -> str:
    """What is missing, unexpected or of another shape among stored tensors, as text; nothing where all fits."""
    missing, unexpected = [n for n in own if n not in stored], [n for n in stored if n not in own]
    other = [f"{n} {stored[n]} for {own[n]}" for n in own if n in stored and stored[n] != own[n]]
    return "; ".join(
        f"{len(names)} {what}: {shorten(shown_text(name) for name in names)}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", other))
        if names
    )


def raise_damaged(folder: Path, bad: Sequence[str]) -> None:
    """Raise one error for everything that is wrong with an artifact's files, if anything is."""
    if bad:
        raise ArtifactError(
            f"The artifact {folder} is damaged: {shorten(bad, 10, '; ')}; copy it again, or write it anew."
        )
