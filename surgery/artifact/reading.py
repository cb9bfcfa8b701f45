"""Reading: the tensors of an artifact, checked against its manifest.

Sizes and headers are checked on every load, because that costs next to nothing; hashes of whole files are
left to `surgery.artifact.verify`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from surgery.anatomy.plan import Plan
from surgery.artifact.claims import wrong_claims
from surgery.artifact.layout import Form, encoded_forms, plan_of
from surgery.artifact.manifest import EncodedGroup, Manifest
from surgery.artifact.recorded import (
    DICTIONARY,
    TENSOR_FILE,
    TOGETHER,
    WEIGHTS,
    raise_damaged,
    read_extra_state,
    small_files,
)
from surgery.artifact.tensorfiles import read_header, read_tensors
from surgery.core.registry import find_method
from surgery.core.tensor_method import TensorMethod
from surgery.disk.files import sha256_of
from surgery.disk.untrusted import UnreadableError, regular_size, shown_text
from surgery.errors import ArtifactError, PlanError, UndecodableError
from surgery.settings.methods import missing_method
from surgery.settings.problems import problems_of
from surgery.storage.codecs import ANY_LENGTH, Encoded, encode_native, part_layout
from surgery.storage.keys import PartKey, PlainKey, StorageKey, piece_name
from surgery.storage.stored import Stored
from surgery.storage.trim import restrict


def _check_methods(folder: Path, manifest: Manifest, plan: Plan) -> None:
    """Find what cannot generate banks as they are recorded, before a tensor is read.

    Raises:
        MissingMethodError: where a method is not here, or its package cannot be imported.
        ArtifactError: where a method generates no tensors, or has no such settings.
    """
    bad = []
    for bank in plan.banks:
        try:
            method = find_method(bank.method)
        except PlanError:
            needs, package = f"Bank {shown_text(bank.key)} of {folder}", manifest.banks[bank.key].package
            raise missing_method(needs, bank.method, package, "generates its blocks") from None
        if not isinstance(method, TensorMethod):
            bad.append(f"bank {bank.key} is of method {bank.method}, which generates no tensors")
            continue
        kind = method.recorded or method.settings
        try:
            kind.model_validate(dict(bank.settings))
        except ValidationError as error:
            bad += [f"bank {bank.key}: {each}" for each in problems_of(error, kind, "settings")]
    raise_damaged(folder, bad)


def _checked_plan(folder: Path, manifest: Manifest) -> Plan:
    plan = plan_of(manifest)
    _check_methods(folder, manifest, plan)
    return plan


def read_stored(folder: Path, manifest: Manifest, members: Sequence[str]) -> Stored:
    """The stored form of some members, mapped from the disk.

    Raises:
        ArtifactError: naming every file that is missing, has another size, lies in its header, or holds other
            tensors than the manifest says.
    """
    stored = map_stored(folder, manifest, members)
    with decoded_from(folder, manifest):
        check_banks(folder, stored, manifest)
    return stored if list(members) == list(manifest.members) else restrict(stored, members)


@contextmanager
def decoded_from(folder: Path, manifest: Manifest) -> Iterator[None]:
    """Inside, what does not decode is an error that names the files that are not as they were written.

    Raises:
        ArtifactError: naming them, where files explain it.
    """
    try:
        yield
    except UndecodableError as error:
        wrong = wrong_hashes(folder, _restricted(manifest, tensor_files(manifest, manifest.members)))
        if not wrong:
            raise
        try:
            raise_damaged(folder, [f"{path} {what}" for path, what in wrong.items()])
        except ArtifactError as damaged:
            raise damaged from error


def _restricted(manifest: Manifest, paths: Collection[str]) -> Manifest:
    """A manifest that lists some of its files alone."""
    files = {path: entry for path, entry in manifest.files.items() if path in paths}
    return manifest.model_copy(update={"files": files})


def check_banks(folder: Path, stored: Stored, manifest: Manifest | None = None) -> None:
    """Look at the values of all parts of banks.

    Args:
        folder: of the artifact.
        stored: what it holds.
        manifest: of its files; without one these are no artifact's.

    Raises:
        ArtifactError: naming what no bank can be made of, and the files to be put back.
    """
    for bank in stored.plan.banks:
        faults = find_method(bank.method, TensorMethod).wrong_parts(bank, stored.parts(bank.key))
        raise_wrong_parts(folder, manifest, faults)


def raise_wrong_parts(folder: Path, manifest: Manifest | None, faults: Sequence[str]) -> None:
    """Raise one error for parts of which no bank can be made, if there are any.

    Args:
        folder: of the artifact.
        manifest: of its files, of which those are named that are not as they were written.
        faults: as `TensorMethod.wrong_parts` returns them.
    """
    if faults and manifest is not None:
        paths = _tensor_files(manifest, ())[DICTIONARY]
        wrong = wrong_hashes(folder, _restricted(manifest, paths))
        faults = [*(f"{path} {what}" for path, what in wrong.items()), *faults]
    raise_damaged(folder, faults)


def map_stored(folder: Path, manifest: Manifest, members: Sequence[str]) -> Stored:
    """`read_stored` of some members with all that others have in the same files, no value looked at."""
    wanted = _tensor_files(manifest, members)
    raise_damaged(
        folder, _wrong_files(folder, manifest, [path for paths in wanted.values() for path in paths])
    )
    plan = _checked_plan(folder, manifest)  # before a tensor is read
    held: dict[str, dict[str, Tensor]] = {}
    bad: list[str] = []
    for stem, paths in wanted.items():
        held[stem] = {}
        for path in paths:
            found = read_tensors(folder / path)
            twice = sorted(held[stem].keys() & found.keys())
            bad += [f"{path} holds {shown_text(name)}, which another file holds too" for name in twice]
            held[stem].update(found)
    where = {stem: f"{stem} ({', '.join(paths) or 'no file'})" for stem, paths in wanted.items()}
    extra = read_extra_state(folder, manifest, members)
    return assemble(folder, manifest, members, held, where, extra, bad, plan)


def assemble(
    folder: Path,
    manifest: Manifest,
    members: Sequence[str],
    held: Mapping[str, dict[str, Tensor]],
    where: Mapping[str, str],
    extra: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
    wrong: Iterable[str] = (),
    plan: Plan | None = None,
) -> Stored:
    """What files hold as the stored form that a manifest describes, no value looked at.

    Args:
        folder: of the files, for errors.
        manifest: of them.
        members: whose tensors they must hold.
        held: tensors by name in their file, by stem: `dictionary` and `members/NAME/weights`.
        where: what errors call each stem.
        extra: per member, extra state.
        wrong: what is known to be wrong already, in words.
        plan: of the manifest, where it is known already.

    Raises:
        ArtifactError: for all that does not fit together.
    """
    plan = plan or _checked_plan(folder, manifest)
    tensors: dict[StorageKey, Encoded] = {}
    bad = list(wrong)
    for stem, own in held.items():
        if stem == DICTIONARY:
            bad += _of_no_bank(manifest, own)
        if stem == TOGETHER:
            bad += _of_no_member(manifest, own)
        for make, groups, mine in _sections(manifest, stem, own):
            forms = encoded_forms(groups, f"{make('')} in {folder}")
            named, faults = _assemble(mine, forms, where[stem])
            tensors.update({make(name): encoded for name, encoded in named.items()})
            bad += faults
    raise_damaged(folder, bad)
    aliases = {
        PlainKey(name, each): key for name in manifest.members for each, key in manifest.same_of(name).items()
    }
    ties = {name: entry.ties for name, entry in manifest.members.items() if entry.ties}
    stored = Stored(plan, tensors, aliases, ties, extra)
    if lost := [key for name in members for key in manifest.same_of(name).values() if key not in tensors]:
        raise_damaged(folder, [f"{key} is stored for several, but no file holds it" for key in lost])
    raise_damaged(folder, wrong_claims(stored))
    raise_damaged(folder, _wrong_ties(stored, members))
    return stored


def wrong_hashes(folder: Path, manifest: Manifest, hashed: Collection[str] | None = None) -> dict[str, str]:
    """Every listed file that is missing, has another size or another hash, with what is wrong.

    Args:
        folder: of the files.
        manifest: that lists them.
        hashed: paths whose hashes are compared; all by default.
    """
    wrong: dict[str, str] = {}
    for path, entry in manifest.files.items():
        file = folder / path
        if not os.path.lexists(file):
            wrong[path] = "is missing"
            continue
        try:
            if (size := regular_size(file)) != entry.bytes:
                wrong[path] = f"must have {entry.bytes:,} bytes, but has {size:,}"
            elif (hashed is None or path in hashed) and (found := sha256_of(file)) != entry.sha256:
                wrong[path] = f"must have the SHA-256 {entry.sha256[:12]}…, but has {found[:12]}…"
        except UnreadableError as error:
            wrong[path] = str(error)
    return wrong


def check_in_place(folder: Path, manifest: Manifest, members: Sequence[str] | None = None) -> None:
    """Look at an artifact that is about to be written anew in its place.

    The files of members that stay, and of those that lend them something, must be there in their sizes, and those that
    hold tensors of several members, or lend some to members that stay when they go, as they were written: their tensors
    are copied into new files, and what is wrong with them would pass for right afterwards.

    Args:
        folder: of the artifact.
        manifest: of it.
        members: that stay; all by default.

    Raises:
        ArtifactError: naming every file that is not.
    """
    kept = list(manifest.members) if members is None else members
    stems = _tensor_files(manifest, kept)
    own = {f"{manifest.folder_of(name)}/" for name in kept}
    copied = {
        path for stem, paths in stems.items() if f"{stem.rpartition('/')[0]}/" not in own for path in paths
    }
    needed = tensor_files(manifest, kept)
    needed |= {path for name in kept for path in small_files(manifest, name).values()}
    needed |= {path for path in manifest.files if any(path.startswith(each) for each in own)}
    wrong = wrong_hashes(folder, _restricted(manifest, needed), copied)
    raise_damaged(folder, [f"{path} {what}" for path, what in wrong.items()])


def check_hashes(folder: Path, manifest: Manifest, members: Sequence[str]) -> None:
    """Compare the files that hold the tensors of some members with what was recorded when they were written.

    Raises:
        ArtifactError: naming every file of another content, also where two of one size were exchanged.
    """
    check_files(folder, manifest, tensor_files(manifest, members))


def check_files(folder: Path, manifest: Manifest, paths: Collection[str]) -> None:
    """Compare files of an artifact with what was recorded when they were written.

    Raises:
        ArtifactError: naming every one of another content.
    """
    wrong = wrong_hashes(folder, _restricted(manifest, paths))
    raise_damaged(folder, [f"{path} {what}" for path, what in wrong.items()])


def tensor_files(manifest: Manifest, members: Iterable[str]) -> set[str]:
    """Paths of the files that hold tensors for some members."""
    return {path for paths in _tensor_files(manifest, members).values() for path in paths}


def _tensor_files(manifest: Manifest, members: Iterable[str]) -> dict[str, list[str]]:
    """Files by stem: of the dictionary, the members, and those that hold tensors for them."""
    lenders = {key.member for name in members for key in manifest.same_of(name).values()}
    wanted = {*members, *lenders}
    stems = [DICTIONARY] if manifest.banks else []
    stems += [TOGETHER] if not wanted.isdisjoint(_together(manifest)) else []
    stems += [
        f"{manifest.folder_of(name)}/{WEIGHTS}"
        for name in manifest.members
        if name in wanted and name not in _together(manifest)
    ]
    found = {
        stem: [
            path
            for path in manifest.files
            if TENSOR_FILE.fullmatch(path)
            and re.fullmatch(rf"{re.escape(stem)}(-\d+-of-\d+)?\.safetensors", path)
        ]
        for stem in stems
    }
    return found


def _together(manifest: Manifest) -> set[str]:
    """Members that have what they have of their own in one file."""
    if f"{TOGETHER}.safetensors" not in manifest.files:
        return set()
    own = {path.rpartition("/")[0] for path in manifest.files if TENSOR_FILE.fullmatch(path)}
    return {name for name in manifest.members if manifest.folder_of(name) not in own}


def _sections(
    manifest: Manifest, stem: str, held: dict[str, Tensor]
) -> Iterator[tuple[Callable[[str], StorageKey], Iterable[EncodedGroup], dict[str, Tensor]]]:
    """What files hold, by whose it is: how keys are made of names, what is encoded, and tensors by name."""
    if stem == DICTIONARY:
        parts: dict[str, dict[str, Tensor]] = {key: {} for key in manifest.banks}
        for key, tensor in ((PartKey.of_file(name), tensor) for name, tensor in held.items()):
            if key is not None and key.bank in parts:
                parts[key.bank][key.part] = tensor
        for bank, entry in manifest.banks.items():
            yield partial(PartKey, bank), entry.encoded, parts[bank]
    elif stem == TOGETHER:
        own: dict[str, dict[str, Tensor]] = {}
        for name, tensor in held.items():
            folder, _, rest = name.partition("/")
            own.setdefault(f"members/{folder}", {})[rest] = tensor
        for name in _together(manifest):
            yield (
                partial(PlainKey, name),
                manifest.members[name].encoded,
                own.get(manifest.folder_of(name), {}),
            )
    else:
        name = next(name for name in manifest.members if stem == f"{manifest.folder_of(name)}/{WEIGHTS}")
        yield partial(PlainKey, name), manifest.members[name].encoded, held


def _of_no_bank(manifest: Manifest, held: Iterable[str]) -> list[str]:
    """Tensors in files of the dictionary that are parts of no bank."""
    keys = {name: PartKey.of_file(name) for name in held}
    lost = [name for name, key in keys.items() if key is None or key.bank not in manifest.banks]
    return [f"{DICTIONARY} holds {shown_text(name)}, which is a part of no bank" for name in sorted(lost)]


def _of_no_member(manifest: Manifest, held: Iterable[str]) -> list[str]:
    """Tensors in the file of several members that are of none of them."""
    folders = {manifest.folder_of(name) for name in _together(manifest)}
    lost = [name for name in held if f"members/{name.partition('/')[0]}" not in folders]
    return [f"{TOGETHER} holds {shown_text(name)}, which is of no member" for name in sorted(lost)]


def _wrong_files(folder: Path, manifest: Manifest, paths: Iterable[str]) -> list[str]:
    bad = []
    for path in paths:
        entry, file = manifest.files[path], folder / path
        if not os.path.lexists(file):
            bad.append(f"{path} is missing")
            continue
        try:
            size = regular_size(file)
        except UnreadableError as error:
            bad.append(f"{path} {error}")
            continue
        if size != entry.bytes:
            bad.append(f"{path} must have {entry.bytes:,} bytes, but has {size:,}")
        elif read_header(file).digest != entry.header:
            bad.append(f"{path} must hold the tensors that the manifest says, but its header is another one")
    return bad


def _assemble(
    parts: dict[str, Tensor], forms: Mapping[str, Form], where: str
) -> tuple[dict[str, Encoded], list[str]]:
    """Named tensors from the tensors of a file: those in `forms` from their parts, others as they are."""
    named: dict[str, Encoded] = {}
    bad: list[str] = []
    rest = dict(parts)
    for name, (precision, dtype, shape) in forms.items():
        held: dict[str, Tensor] = {}
        layout = part_layout(shape, dtype, precision)
        for part, (kind, size) in layout.items():
            tensor = rest.pop(piece_name(name, part), None)
            if tensor is None or tensor.dtype != kind or not _fits(tuple(tensor.shape), size):
                found = "there is none" if tensor is None else f"it is {tensor.dtype} {tuple(tensor.shape)}"
                bad.append(f"{where} must hold {piece_name(name, part)} as {kind} {size}, but {found}")
            else:
                held[part] = tensor
        if len(held) == len(layout) and (fault := precision.codec.fault(held)):
            bad.append(f"{where} holds {name} with {fault}")
        named[name] = Encoded(precision, shape, dtype, held)
    named.update({name: encode_native(t) for name, t in rest.items()})
    return named, bad


def _fits(shape: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """Whether a part has the shape that its codec expects."""
    return len(shape) == len(expected) and all(
        e in (ANY_LENGTH, n) for n, e in zip(shape, expected, strict=True)
    )


def _wrong_ties(stored: Stored, members: Iterable[str]) -> list[str]:
    """Tied names whose first owner is stored nowhere."""
    held = {*stored.tensors, *stored.aliases}
    placed = {(p.site.member, p.site.name) for p in stored.plan.placements}
    return [
        f"{name} must hold {shown_text(first)}, to which others are tied, but holds none"
        for name in members
        for first in stored.ties.get(name, {})
        if PlainKey(name, first) not in held and (name, first) not in placed
    ]
