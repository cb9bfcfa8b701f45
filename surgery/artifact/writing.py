"""Writing: what is stored of a joint model, as the files of an artifact."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType
from typing import Any

from surgery.artifact.card import PICTURE, make_card
from surgery.artifact.foldernames import folder_names
from surgery.artifact.layout import encoded_entries, parts_of, plan_entries
from surgery.artifact.manifest import (
    APART,
    NAME,
    RECORDS,
    VERSION,
    FileEntry,
    Manifest,
    MemberEntry,
    OriginEntry,
    ReplacementEntry,
    is_safe,
    manifest_bytes,
    read_manifest,
    records_apart,
    records_bytes,
)
from surgery.artifact.picture import draw_sharing
from surgery.artifact.reading import read_stored
from surgery.artifact.recorded import (
    DICTIONARY,
    TOGETHER,
    WEIGHTS,
    bytes_before,
    check_came_back,
    inputs_of,
    origin_of,
    read_small_files,
)
from surgery.artifact.shares import count_shares
from surgery.artifact.sketch import sketch
from surgery.artifact.tensorfiles import read_header
from surgery.disk.files import files_below, sha256_of
from surgery.disk.folders import new_folder
from surgery.disk.mapped import MappedFile
from surgery.disk.places import Places, into_artifact
from surgery.errors import ArtifactError, OutputError
from surgery.fitting.report import FitReport
from surgery.inputs.probes import followed
from surgery.members.extra_state import NAME as EXTRA_STATE
from surgery.members.extra_state import to_document
from surgery.members.member import Alone, Member, Origin, content_hash
from surgery.members.replacement import Replacement
from surgery.safetensors.dtypes import check_dtypes
from surgery.safetensors.gathered import pays, write_gathered
from surgery.safetensors.writing import aligned_file_bytes, write_shards
from surgery.settings.recipe import Recipe
from surgery.storage.codecs import Encoded
from surgery.storage.keys import PartKey, StorageKey
from surgery.storage.states import lazy_state_of
from surgery.storage.stored import Stored
from surgery.storage.trim import on_cpu, trim
from surgery.training.report.report import TrainReport
from surgery.version import __version__

ALLOWANCE = 64 * 1024  # bytes that an artifact may be larger than its members' own files
_BORROW = 1024  # bytes from which a small file that two members share is stored once
_LITTLE, _MANY = 4096, 8  # bytes of a member's own tensors up to which so many members have them in one file
_LIBRARIES = ("torch", "transformers", "timm")


def write(
    stored: Stored,
    members: Sequence[Member],
    report: FitReport | None,
    out: str | Path,
    overwrite: bool,
    recipe: Recipe | None,
    max_shard_size: int | str = "5GB",
    extras: Mapping[str, bytes] = MappingProxyType({}),
    training: TrainReport | None = None,
    hashes: Mapping[str, str] = MappingProxyType({}),
    sources: Sequence[MappedFile] = (),
) -> Path:
    """Write what is stored of some members; `save` says what the arguments are.

    Further arguments:
        hashes: content hashes of members' state dicts, as far as these are known.
        sources: files that weights are mapped from, which have to stay as they are until all is written.
    """
    stored = trim(on_cpu(stored))
    check_folder_names(member.name for member in members)
    check_dtypes({_shown(key): each.dtype for key, each in stored.tensors.items()})
    places = into_artifact(out)
    members = [replace(each, origin=placed(each.origin, places)) for each in members]
    document = None if recipe is None else places.recipe(recipe.document())
    extra = {name: to_document(values, name) for name, values in stored.extra.items()}
    own, borrowed = _share_files(members)
    folders = folder_names(member.name for member in members)
    small = {
        f"members/{folders[name]}/{relative}": content
        for name, files in own.items()
        for relative, content in files.items()
    }
    small |= {f"members/{folders[name]}/{EXTRA_STATE}": content for name, content in extra.items()}
    small |= {} if document is None else {"recipe.yaml": recipe_bytes(document)}
    small |= extras
    room = stored.nbytes + sum(map(len, small.values())) + ALLOWANCE
    with new_folder(out, overwrite=overwrite, need=room, record=False) as folder:
        hashes_of: dict[Path, str] = {}
        for stem, tensors in by_file(stored, folders).items():
            _check_sources(sources)
            hashes_of |= write_stem(folder / stem, tensors, max_shard_size)
        for relative, content in small.items():
            put_file(folder / relative, content)
        described = [describe_member(member, stored, hashes.get(member.name)) for member in members]
        manifest = make_manifest(stored, described, report, document, borrowed, folders)
        beside = sum(map(len, extras.values()))
        if training is not None:
            manifest = manifest.model_copy(update={"training": training})
            beside += len(json.dumps(training.to_json()))
        write_front(folder, manifest, stored, beside, entries_of(folder, hashes_of))
        _check_readable(folder, stored, out)
        _check_sources(sources)
    return Path(out).expanduser().resolve()


def _check_sources(sources: Sequence[MappedFile]) -> None:
    for file in sources:
        file.check()


def _check_readable(folder: Path, stored: Stored, out: str | Path) -> None:
    """Run the checks of a load on what was written, before it takes its place: headers, shapes, scales and banks.

    Raises:
        OutputError: naming what a load would refuse.
    """
    try:
        manifest = read_manifest(folder)
        found = read_stored(folder, manifest, list(manifest.members))
        for name in manifest.members:
            origin_of(manifest, name)
            inputs_of(manifest, name)
            read_small_files(folder, manifest, name)
            check_came_back(stored, found, name)
    except ArtifactError as error:
        reason = str(error).replace(str(folder), str(out))
        reason = reason.removeprefix(f"The artifact {out} is damaged: ").partition("; copy it again")[0]
        raise OutputError(
            f"What is written must load again, but {out} would not: {reason}; undo what made these values, such as "
            "training that diverged, and save again."
        ) from error


def placed(origin: Origin, places: Places) -> Origin:
    """An origin whose reference is relative to the artifact; that of a live module is no reference."""
    return (
        origin if origin.kind == "module" else replace(origin, reference=places.reference(origin.reference))
    )


def write_front(
    folder: Path,
    manifest: Manifest,
    stored: Stored,
    beside: int,
    known: Mapping[str, FileEntry] = MappingProxyType({}),
) -> None:
    """Write card, picture and manifest; the picture is left out where the members are so small that it would
    make the artifact too large, `beside` bytes of what is no part of the models not counted.

    Args:
        folder: that holds everything else.
        manifest: as `make_manifest` returns it.
        stored: what the folder holds.
        beside: bytes that are not counted.
        known: entries of files that are known already, by path.
    """
    shares = count_shares(stored, bytes_before(manifest))
    written = {path: known.get(path) or _file_entry(folder / path) for path in files_below(folder)}
    before = sum(entry.bytes or 0 for entry in manifest.members.values())
    manifest = _without_known_bytes(manifest, written)
    picture = draw_sharing(shares)
    for drawn in (picture, None):
        front = {"README.md": make_card(manifest, shares, picture=drawn is not None).encode()}
        front |= {PICTURE: drawn} if drawn is not None else {}
        files = dict(
            sorted({**written, **{name: _entry(content) for name, content in front.items()}}.items())
        )
        records = None
        document = manifest.document()
        if records_apart(document, sum(entry.bytes for entry in files.values())):
            records = records_bytes(document)
            files = dict(sorted({**files, RECORDS: _entry(records)}.items()))
            document = {name: each for name, each in document.items() if name not in APART}
        document["files"] = {
            path: entry.model_dump(mode="json", exclude_defaults=True) for path, entry in files.items()
        }
        content = manifest_bytes(document)
        total = sum(entry.bytes for entry in files.values()) + len(content)
        if total - beside <= before + ALLOWANCE:
            break
    front |= {RECORDS: records} if records is not None else {}
    for name, each in {**front, NAME: content}.items():
        put_file(folder / name, each)


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


def _without_known_bytes(manifest: Manifest, written: Mapping[str, FileEntry]) -> Manifest:
    """Members' bytes before they were joined are left out where their files here have as many."""
    now = {manifest.folder_of(name): 0 for name in manifest.members}
    for path, entry in written.items():
        folder = "/".join(path.split("/")[:2])
        if folder in now:
            now[folder] += entry.bytes
    members = {
        name: entry.model_copy(update={"bytes": None})
        if now[manifest.folder_of(name)] == entry.bytes
        else entry
        for name, entry in manifest.members.items()
    }
    return manifest.model_copy(update={"members": members})


def by_file(stored: Stored, folders: Mapping[str, str]) -> dict[str, dict[str, Encoded]]:
    """Stored tensors by the file, without its ending, and by their names in it.

    Members that have little of their own have it in one file, where there are many of them.
    """
    own: dict[str, int] = {}
    for key, encoded in stored.tensors.items():
        if not isinstance(key, PartKey):
            own[key.member] = own.get(key.member, 0) + encoded.nbytes
    small = {member for member, nbytes in own.items() if nbytes <= _LITTLE}
    together = small if len(small) >= _MANY else set()
    files: dict[str, dict[str, Encoded]] = {}
    for key, encoded in stored.tensors.items():
        if isinstance(key, PartKey):
            files.setdefault(DICTIONARY, {})[key.in_file] = encoded
        elif key.member in together:
            files.setdefault(TOGETHER, {})[f"{folders[key.member]}/{key.in_file}"] = encoded
        else:
            files.setdefault(f"members/{folders[key.member]}/{WEIGHTS}", {})[key.in_file] = encoded
    return files


def write_stem(
    path: Path, tensors: Mapping[str, Encoded], max_shard_size: int | str = "5GB"
) -> dict[Path, str]:
    """Write stored tensors by name as the file or the shards of a path without its ending.

    Returns:
        the SHA-256 of each.
    """
    parts = parts_of(tensors)
    if not pays(parts):
        return write_shards(path.parent, path.name, parts, max_shard_size, hashed=True)
    file, digest = path.with_name(f"{path.name}.safetensors"), hashlib.sha256()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_gathered(file, parts, digest)
    return {file: digest.hexdigest()}


def _shown(key: StorageKey) -> str:
    return key.in_file if isinstance(key, PartKey) else f"{key.member}/{key.name}"


def _share_files(members: Sequence[Member]) -> tuple[dict[str, dict[str, bytes]], dict[str, dict[str, str]]]:
    """Small files by member, and those that an earlier member has too, with that member's name."""
    for member in members:
        check_small_files(member)
    sizes = {
        member.name: {path: (_entry(content).sha256, len(content)) for path, content in member.files.items()}
        for member in members
    }
    borrowed = lend_files(sizes)
    own = {
        member.name: kept
        for member in members
        if (kept := {k: v for k, v in member.files.items() if k not in borrowed.get(member.name, {})})
    }
    return own, borrowed


def check_small_files(member: Member) -> None:
    """Whether a member's small files can lie in its folder.

    Raises:
        OutputError: naming one that cannot.
    """
    for relative in sorted(member.files):
        if not is_safe(relative) or _is_taken(Path(relative)):
            raise OutputError(
                f"A member's file must lie inside its folder under a name of its own, but '{relative}' "
                f"of member '{member.name}' does not; rename it."
            )


def lend_files(files: Mapping[str, Mapping[str, tuple[str, int]]]) -> dict[str, dict[str, str]]:
    """Small files that an earlier member has too, with that member's name.

    Args:
        files: by member, hash and bytes of each of its small files by path.
    """
    borrowed: dict[str, dict[str, str]] = {}
    first: dict[tuple[str, str], str] = {}
    for name, own in files.items():
        for relative, (digest, size) in sorted(own.items()):
            lender = first.setdefault((relative, digest), name)
            if lender != name and size >= _BORROW:
                borrowed.setdefault(name, {})[relative] = lender
    return borrowed


def _is_taken(path: Path) -> bool:
    """Whether a member's small file has the name of what an artifact holds beside it."""
    return path.name.startswith(f"{WEIGHTS}.") or path.as_posix() == EXTRA_STATE


def check_folder_names(names: Iterable[str]) -> None:
    """Whether folders can be called like members.

    Raises:
        OutputError: naming those that cannot.
    """
    if bad := [
        name for name in names if not is_safe(f"members/{name}") or "/" in name or name in (".", "..")
    ]:
        raise OutputError(
            f"A member's name must be fit for a folder, but {', '.join(bad)} is not; rename it."
        )


def recipe_bytes(recipe: Mapping[str, Any]) -> bytes:
    """A recipe's document as YAML."""
    import yaml

    plain = json.loads(json.dumps(recipe, default=str))
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True).encode()


def _versions() -> dict[str, str]:
    found = {"surgery": __version__}
    for library in _LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found


def entries_of(folder: Path, hashes: Mapping[Path, str]) -> dict[str, FileEntry]:
    """What a manifest says of files of a folder whose hashes are known, by their path in it."""
    return {path.relative_to(folder).as_posix(): _file_entry(path, digest) for path, digest in hashes.items()}


def _file_entry(path: Path, digest: str | None = None) -> FileEntry:
    """What a manifest says of a file, whose hash may be known."""
    header = read_header(path).digest if path.suffix == ".safetensors" else None
    return FileEntry(bytes=path.stat().st_size, sha256=digest or sha256_of(path), header=header)


def _entry(content: bytes) -> FileEntry:
    return FileEntry(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


def put_file(path: Path, content: bytes) -> None:
    """Write a file of a folder that is still being written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
