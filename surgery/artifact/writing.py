"""Writing: what is stored of a joint model, as the files of an artifact."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from surgery.artifact.card import PICTURE, make_card
from surgery.artifact.describing import describe_member, make_manifest, placed
from surgery.artifact.foldernames import check_folder_names, folder_names
from surgery.artifact.layout import parts_of
from surgery.artifact.manifest import (
    APART,
    NAME,
    RECORDS,
    FileEntry,
    Manifest,
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
from surgery.artifact.smallfiles import share_files
from surgery.artifact.tensorfiles import read_header
from surgery.disk.files import files_below, sha256_of
from surgery.disk.folders import new_folder
from surgery.disk.mapped import MappedFile
from surgery.disk.places import into_artifact
from surgery.errors import ArtifactError, OutputError
from surgery.fitting.report import FitReport
from surgery.members.extra_state import NAME as EXTRA_STATE
from surgery.members.extra_state import to_document
from surgery.members.member import Member
from surgery.safetensors.dtypes import check_dtypes
from surgery.safetensors.gathered import pays, write_gathered
from surgery.safetensors.writing import write_shards
from surgery.settings.recipe import Recipe
from surgery.storage.codecs import Encoded
from surgery.storage.keys import PartKey, StorageKey
from surgery.storage.stored import Stored
from surgery.storage.trim import on_cpu, trim
from surgery.training.report.report import TrainReport

ALLOWANCE = 64 * 1024  # bytes that an artifact may be larger than its members' own files
_LITTLE, _MANY = 4096, 8  # bytes of a member's own tensors up to which so many members have them in one file


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
    own, borrowed = share_files(members)
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


def recipe_bytes(recipe: Mapping[str, Any]) -> bytes:
    """A recipe's document as YAML."""
    import yaml

    plain = json.loads(json.dumps(recipe, default=str))
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True).encode()


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
