"""Manifest: the JSON that says what an artifact holds, and all that can be checked without reading a tensor.

It is kept small, because an artifact is never larger than its members: defaults are left out, tensors in
their own dtype have no entry (the header of their file lists them), and what can be derived is not stored. What it says
of members and of what was measured is a gzipped file beside it, `records.json.gz`, where that would be more than a
hundredth of an artifact.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import zlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from surgery.artifact.exported import not_an_artifact
from surgery.artifact.sketch import check_sketch
from surgery.disk.places import out_of_artifact
from surgery.disk.records import MANIFEST
from surgery.disk.untrusted import (
    DOCUMENT_BYTES,
    UnreadableError,
    as_mapping,
    broken_rules,
    parse_json,
    read_regular,
    shown,
    shown_text,
)
from surgery.errors import ArtifactError, first_few
from surgery.fitting.report import Digest, FitReport
from surgery.settings.quantities import Context, Count, Integer, Positive
from surgery.storage.keys import PlainKey, parse_key
from surgery.training.report.report import TrainReport

NAME = MANIFEST
VERSION, READ = 2, (1, 2)  # that is written, and those that are read
RECORDS = "records.json.gz"
APART = ("members", "banks", "views", "report", "training")  # what lies there
_LARGE = 8192  # bytes of records from which they lie apart
_PART = 100  # and of which part of an artifact
MOST_REPLACEMENTS = 1 << 12  # of modules, in one member
LONGEST_PATH = 1024  # bytes of a path inside an artifact; each part has at most 255 in most file systems
_CHECKSUM = re.compile(r',\n "checksum": "([0-9a-f]{64})"\n}\n\Z')

MemberName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]*[A-Za-z0-9_-][A-Za-z0-9_.-]*$", max_length=200)]
PackageName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_]*$", max_length=200)]
EncodedGroup = tuple[str, str, tuple[Count, ...], tuple[str, ...]]
"""Precision, dtype, shape, and the names of all tensors stored so."""


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class FileEntry(_Entry):
    """A file's size and SHA-256, and for safetensors a digest of its header, checked on every load."""

    bytes: Count
    sha256: Digest
    header: str | None = None


class OriginEntry(_Entry):
    """`surgery.members.member.Origin`."""

    kind: str
    reference: str
    architecture: str
    revision: str | None = None
    options: dict[str, Any] = {}
    seed: Count | None = None


class ReplacementEntry(_Entry):
    """A module in whose place another stands: the method that replaced it, its path, and how it is done again.

    `package` says where the method comes from.
    """

    path: Annotated[str, Field(min_length=1, max_length=LONGEST_PATH)]
    method: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$", max_length=200)]
    settings: dict[str, Any] = {}
    package: PackageName = ""


class MemberEntry(_Entry):
    """One member.

    Attributes:
        origin: how to build its architecture again.
        inputs: its example inputs, in short (see `surgery.artifact.sketch`).
        like: an earlier member that has the same origin and inputs, in place of these.
        hash: content hash of its state dict as this artifact gives it back; left out where its own files hold
            every tensor as it is, so that their hashes say the same.
        bytes: of its own files, weights and small ones, before it was joined, where its files here differ from that;
            `surgery.core.sizes.bytes_alone` counts tensors, without headers and small files.
        ties: tied names by their first owner.
        encoded: tensors that are not stored in their own dtype.
        same: tensors that are stored once, under the storage key that is given.
        borrowed: small files that another member, given by name, has too.
        folder: of its files below `members`, where that is not its name; see `surgery.artifact.foldernames`.
        placements: name, number of its view, order and, where it does not follow the last site of its bank,
            start.
        replacements: of modules, in the order in which they are made.
        alone: parameters of the member, and bytes of its tensors, before modules of it were replaced.
    """

    origin: OriginEntry | None = None
    inputs: Annotated[Any, AfterValidator(check_sketch)] = None
    like: MemberName | None = None
    hash: Digest | None = None
    bytes: Count | None = None
    ties: dict[str, tuple[str, ...]] = {}
    encoded: tuple[EncodedGroup, ...] = ()
    same: dict[str, str] = {}
    placements: tuple[tuple[str, Count, Integer] | tuple[str, Count, Integer, Count], ...] = ()
    borrowed: dict[str, MemberName] = {}
    folder: MemberName | None = None
    replacements: Annotated[tuple[ReplacementEntry, ...], Field(max_length=MOST_REPLACEMENTS)] = ()
    alone: tuple[Count, Count] | None = None


class BankEntry(_Entry):
    """One bank of the dictionary.

    Attributes:
        block: m and n.
        context: c.
        dtype: of its members' tensors.
        locations: L.
        encoded: its parts that are not stored in their own dtype.
        stack: the stack of layers whose templates it holds one tensor of.
        method: whose bank it is; by default `templates` for one of a stack, and else `hypermodules`.
        settings: of that method.
        package: where the method comes from, if not from this package.
    """

    block: tuple[Positive, Positive]
    context: Context
    dtype: str
    locations: Count
    stack: str = ""
    method: str = ""
    settings: dict[str, Any] = {}
    encoded: tuple[EncodedGroup, ...] = ()
    package: PackageName = ""


class ViewEntry(_Entry):
    """A kind of site: its bank, the layer's kind, the tensor's shape, and its canonical view."""

    bank: str
    kind: str
    shape: tuple[Count, ...]
    pattern: str
    sizes: dict[str, Count] = {}


class Manifest(_Entry):
    """All of `manifest.json`, its fields in the order in which they are written; what is at its default is not."""

    format: Literal["surgery"]
    version: int
    versions: dict[str, str] = {}
    members: dict[MemberName, MemberEntry]
    seed: Annotated[int, Field(ge=0, le=(1 << 64) - 1)] | None = None
    banks: dict[str, BankEntry] = {}
    views: tuple[ViewEntry, ...] = ()
    report: FitReport | None = None
    training: TrainReport | None = None
    files: dict[str, FileEntry]
    checksum: Digest

    def document(self) -> dict[str, Any]:
        """What is written, without its checksum."""
        found = self.model_dump(mode="json", exclude_defaults=True, exclude={"checksum"})
        if self.report is not None:
            found["report"] = self.report.to_json()
        if self.training is not None:
            found["training"] = self.training.to_json()
        if self.views:  # few, and read by people: whole
            found["views"] = [view.model_dump(mode="json") for view in self.views]
        return found

    def folder_of(self, member: str) -> str:
        """Where a member's files lie."""
        entry = self.members.get(member)
        return f"members/{(entry and entry.folder) or member}"

    def same_of(self, member: str) -> dict[str, PlainKey]:
        """By name, the keys of a member's tensors that are stored once for several."""
        keys = {name: parse_key(text) for name, text in self.members[member].same.items()}
        return {name: key for name, key in keys.items() if isinstance(key, PlainKey)}


def manifest_bytes(manifest: dict[str, Any]) -> bytes:
    """A manifest without its checksum as the bytes of the file, checksum included."""
    body = _indent(manifest, depth=2).removesuffix("\n}")
    return f'{body},\n "checksum": "{hashlib.sha256(body.encode()).hexdigest()}"\n}}\n'.encode()


def records_apart(document: Mapping[str, Any], nbytes: int) -> bool:
    """Whether records lie in a file of their own.

    Args:
        document: of the manifest.
        nbytes: of the artifact's other files.
    """
    size = sum(len(_indent(document[name], depth=0)) for name in APART if name in document)
    return size > max(_LARGE, nbytes / _PART)


def records_bytes(document: Mapping[str, Any]) -> bytes:
    """The file of their own."""
    found = {name: document[name] for name in APART if name in document}
    return gzip.compress(_indent(found, depth=2).encode(), 9, mtime=0)


def _with_records(folder: Path, found: Mapping[str, Any]) -> Mapping[str, Any]:
    """A manifest's document with the records that lie beside it.

    Raises:
        UnreadableError: where they are not those that it lists.
    """
    files = found.get("files")
    entry = files.get(RECORDS) if isinstance(files, dict) and "members" not in found else None
    if entry is None:
        return found
    raw = read_regular(folder / RECORDS, DOCUMENT_BYTES)
    if not isinstance(entry, dict) or hashlib.sha256(raw).hexdigest() != entry.get("sha256"):
        raise UnreadableError("is not the file that was recorded")
    inflate = zlib.decompressobj(31)  # gzip's format
    try:
        text = inflate.decompress(raw, DOCUMENT_BYTES)
    except zlib.error as error:
        raise UnreadableError(f"must be gzipped, but {error}") from None
    if not inflate.eof:
        raise UnreadableError(f"must hold a document of at most {DOCUMENT_BYTES:,} bytes")
    records = as_mapping(parse_json(text))
    if more := sorted({*records} - {*APART}):
        raise UnreadableError(f"must hold {', '.join(APART)}, but holds {shown(more)}")
    return {**found, **records}


def read_manifest(folder: Path) -> Manifest:
    """Read and validate the manifest of an artifact.

    Raises:
        ArtifactError: where it is missing, is no JSON, is of another version, or breaks a rule; all broken
        rules
            are named.
    """
    path = folder / NAME
    if not os.path.lexists(path):
        raise ArtifactError(not_an_artifact(folder, NAME))
    try:
        text = read_regular(path, DOCUMENT_BYTES)
        found = as_mapping(parse_json(text))
    except UnreadableError as error:
        raise ArtifactError(f"{path} {error}; copy the artifact again.") from None
    version = found.get("version")
    if found.get("format") != "surgery" or version is None:
        raise ArtifactError(
            f"{path} must be the manifest of an artifact, but it does not say 'format: surgery' and its version; "
            "give a folder that surgery wrote."
        )
    if version not in READ:
        raise ArtifactError(
            f"{path} must be of version {' or '.join(map(str, READ))}, but is of version {shown(version)}; install "
            "the model-surgery that wrote it."
        )
    try:
        whole = _with_records(folder, found)
    except UnreadableError as error:
        raise ArtifactError(f"{folder / RECORDS} {error}; copy the artifact again.") from None
    try:
        manifest = Manifest.model_validate_json(text if whole is found else json.dumps(whole))
    except ValidationError as error:
        raise ArtifactError(_broken(path, broken_rules(error))) from None
    if broken := list(contradictions(manifest, folder)):
        raise ArtifactError(_broken(path, first_few(broken, 10)))
    return _placed(manifest, folder)


def _placed(manifest: Manifest, folder: Path) -> Manifest:
    """The same manifest; what its references name relative to the artifact is relative to the working directory."""
    places, members = out_of_artifact(folder), dict(manifest.members)
    for name, member in members.items():
        if member.origin is not None and member.origin.kind != "module":
            origin = member.origin.model_copy(update={"reference": places.reference(member.origin.reference)})
            members[name] = member.model_copy(update={"origin": origin})
    return manifest.model_copy(update={"members": members})


def checksum_holds(folder: Path) -> bool:
    """Whether the manifest's text is the one that was written."""
    try:
        text = read_regular(folder / NAME, DOCUMENT_BYTES).decode(errors="replace")
    except UnreadableError:
        return False
    match = _CHECKSUM.search(text)
    return match is not None and hashlib.sha256(text[: match.start()].encode()).hexdigest() == match.group(1)


def is_safe(relative: str) -> bool:
    """Whether a path stays below the folder that it is relative to, on every system.

    Example:
        >>> is_safe("members/a/config.json"), is_safe("../a"), is_safe("/a"), is_safe("C:a")
        (True, False, False, False)
    """
    parts = PurePosixPath(relative).parts
    return (
        bool(parts)
        and len(relative.encode(errors="replace")) <= LONGEST_PATH
        and not (set(relative) & {"\\", ":", "\0"})
        and ".." not in parts
        and not relative.startswith("/")
    )


def contradictions(manifest: Manifest, folder: Path) -> Iterator[str]:
    """Everything in a well-formed manifest that cannot be true."""
    root = folder.resolve()
    # The hub's cache keeps a repository's files in `blobs` and links to them from `snapshots/<commit>`.
    homes = (root, root.parent.parent / "blobs") if root.parent.name == "snapshots" else (root,)
    for name in manifest.files:
        if not is_safe(name):
            yield f"the path '{shown_text(name)}' must be relative, short, and stay inside the folder"
        elif not any((place := _resolved(folder / name)).is_relative_to(home) for home in homes):
            yield f"the path '{name}' is a link that leads out of the folder, to {place}"
    for number, view in enumerate(manifest.views):
        if view.bank not in manifest.banks:
            yield f"view {number} names the bank '{view.bank}', which does not exist"
    folders = [manifest.folder_of(name) for name in manifest.members]
    if several := sorted({each for each in folders if folders.count(each) > 1}):
        yield f"every member must have a folder of its own, but {shown_text(', '.join(several))} is of several"
    for name, member in manifest.members.items():
        described = manifest.members.get(member.like) if member.like else member
        if described is None or described.origin is None:
            yield f"{name}: its origin must be given, or that of the member that it is like"
        for text in member.same.values():
            if not _is_of_member(text, manifest.members):
                yield f"{name}: its tensors must be stored under the keys of members, not {shown(text)}"
        for placement in member.placements:
            if placement[1] >= len(manifest.views):
                yield f"{name}: {shown_text(placement[0])} has view {placement[1]} of {len(manifest.views)}"
        for file, lender in member.borrowed.items():
            if not is_safe(file) or f"{manifest.folder_of(lender)}/{file}" not in manifest.files:
                yield f"{name}: its file '{shown_text(file)}' is borrowed from '{lender}', which has none"


def _is_of_member(text: str, members: Collection[str]) -> bool:
    try:
        key = parse_key(text)
    except ValueError:
        return False
    return isinstance(key, PlainKey) and key.member in members


def _resolved(path: Path) -> Path:
    """Where a path leads; one that leads nowhere, as a link to itself, is left as it is: opening it says why."""
    try:
        return path.resolve()
    except (OSError, RuntimeError):  # which of them depends on the version of Python
        return path.parent.resolve() / path.name


def _broken(path: Path, broken: list[str]) -> str:
    return f"{path} must describe an artifact, but {'; '.join(broken)}; copy the artifact again."


def _indent(value: Any, depth: int, level: int = 1) -> str:
    """JSON with its outer `depth` levels of objects one entry a line, and the rest compact."""
    if depth == 0 or not isinstance(value, dict) or not value:
        return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    lines = (
        f"{' ' * level}{json.dumps(key, ensure_ascii=False)}: {_indent(each, depth - 1, level + 1)}"
        for key, each in value.items()
    )
    return "{\n" + ",\n".join(lines) + "\n" + " " * (level - 1) + "}"
