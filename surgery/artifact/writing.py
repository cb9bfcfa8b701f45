"""Writing: what is stored of a joint model, as the files of an artifact."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType
from typing import Any

from surgery.artifact.card import PICTURE, make_card
from surgery.artifact.foldernames import folder_names
from surgery.artifact.layout import encoded_entries, parts_of, plan_entries
from surgery.artifact.manifest import (
    NAME,
    VERSION,
    FileEntry,
    Manifest,
    MemberEntry,
    OriginEntry,
    ReplacementEntry,
    is_safe,
    manifest_bytes,
    read_manifest,
)
from surgery.artifact.picture import draw_sharing
from surgery.artifact.reading import read_stored
from surgery.artifact.recorded import (
    DICTIONARY,
    WEIGHTS,
    bytes_before,
    inputs_of,
    misfits,
    origin_of,
    read_small_files,
    stored_shapes,
)
from surgery.artifact.shares import count_shares
from surgery.artifact.sketch import sketch
from surgery.artifact.tensorfiles import read_header
from surgery.disk.aligned import aligned_file_bytes, check_dtypes, write_shards
from surgery.disk.files import files_below, sha256_of
from surgery.disk.folders import new_folder
from surgery.disk.places import Places, into_artifact
from surgery.errors import ArtifactError, OutputError
from surgery.fitting.report import FitReport
from surgery.inputs.probes import followed
from surgery.members.extra_state import NAME as EXTRA_STATE
from surgery.members.extra_state import to_document
from surgery.members.member import Member, Origin, content_hash
from surgery.members.replacement import Replacement
from surgery.settings.recipe import Recipe
from surgery.storage.codecs import Encoded
from surgery.storage.keys import PartKey, StorageKey
from surgery.storage.states import lazy_state_of
from surgery.storage.stored import Stored
from surgery.storage.trim import on_cpu, trim
from surgery.version import __version__

ALLOWANCE = 64 * 1024  # bytes that an artifact may be larger than its members' own files
_BORROW = 1024  # bytes from which a small file that two members share is stored once
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
) -> Path:
    """Write what is stored of some members; `save` says what the arguments are."""
    stored = trim(on_cpu(stored))
    _check_names(members)
    check_dtypes({_shown(key): each.dtype for key, each in stored.tensors.items()})
    places = into_artifact(out)
    members = [replace(each, origin=_placed(each.origin, places)) for each in members]
    document = None if recipe is None else places.recipe(recipe.document())
    extra = {name: to_document(values, name) for name, values in stored.extra.items()}
    own, borrowed = _share_files(members)
    folders = folder_names(member.name for member in members)
    room = (
        stored.nbytes
        + sum(len(content) for files in own.values() for content in files.values())
        + ALLOWANCE
        + sum(map(len, (*extras.values(), *extra.values())))
    )
    with new_folder(out, overwrite=overwrite, need=room, record=False) as folder:
        for stem, tensors in _by_file(stored, folders).items():
            write_shards((folder / stem).parent, Path(stem).name, parts_of(tensors), max_shard_size)
        for name, files in own.items():
            for relative, content in files.items():
                _put(folder / "members" / folders[name] / relative, content)
        for name, content in extra.items():
            _put(folder / "members" / folders[name] / EXTRA_STATE, content)
        if document is not None:
            _put(folder / "recipe.yaml", _recipe_bytes(document))
        for relative, content in extras.items():
            _put(folder / relative, content)
        manifest = _describe(stored, members, report, document, borrowed, folders)
        _write_front(folder, manifest, stored, sum(map(len, extras.values())))
        _check_readable(folder, stored, out)
    return Path(out).expanduser().resolve()


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
            if bad := misfits(stored_shapes(stored, name), stored_shapes(found, name)):
                raise ArtifactError(f"tensors of member '{name}' came back as others: {bad}")
    except ArtifactError as error:
        reason = str(error).replace(str(folder), str(out))
        reason = reason.removeprefix(f"The artifact {out} is damaged: ").partition("; copy it again")[0]
        raise OutputError(
            f"What is written must load again, but {out} would not: {reason}; undo what made these values, such as "
            "training that diverged, and save again."
        ) from error


def _placed(origin: Origin, places: Places) -> Origin:
    """An origin whose reference is relative to the artifact; that of a live module is no reference."""
    return (
        origin if origin.kind == "module" else replace(origin, reference=places.reference(origin.reference))
    )


def _write_front(folder: Path, manifest: Manifest, stored: Stored, beside: int) -> None:
    """Write card, picture and manifest; the picture is left out where the members are so small that it would
    make the artifact too large, `beside` bytes of what is no part of the models not counted."""
    shares = count_shares(stored, bytes_before(manifest))
    written = {path: _file_entry(folder / path) for path in files_below(folder)}
    before = sum(entry.bytes or 0 for entry in manifest.members.values())
    manifest = _without_known_bytes(manifest, written)
    picture = draw_sharing(shares)
    for drawn in (picture, None):
        front = {"README.md": make_card(manifest, shares, picture=drawn is not None).encode()}
        front |= {PICTURE: drawn} if drawn is not None else {}
        files = dict(
            sorted({**written, **{name: _entry(content) for name, content in front.items()}}.items())
        )
        content = manifest_bytes(manifest.model_copy(update={"files": files}).document())
        total = sum(entry.bytes for entry in files.values()) + len(content)
        if total - beside <= before + ALLOWANCE:
            break
    for name, each in {**front, NAME: content}.items():
        _put(folder / name, each)


def _describe(
    stored: Stored,
    members: Sequence[Member],
    report: FitReport | None,
    recipe: Mapping[str, Any] | None,
    borrowed: Mapping[str, Mapping[str, str]],
    folders: Mapping[str, str],
) -> Manifest:
    """The manifest, still without files."""
    banks, views, placements = plan_entries(stored)
    entries: dict[str, MemberEntry] = {}
    first: dict[str, str] = {}  # members by what their origin and inputs are
    for member in members:
        origin = OriginEntry.model_construct(**asdict(member.origin))
        inputs = sketch(member.inputs, _followed(member))
        like = first.setdefault(json.dumps([origin.model_dump(), inputs]), member.name)
        described = {"origin": origin, "inputs": inputs} if like == member.name else {"like": like}
        entries[member.name] = MemberEntry.model_construct(
            **described,
            **_describe_tensors(stored, member, placements.get(member.name, [])),
            borrowed=dict(borrowed.get(member.name, {})),
            folder=None if folders[member.name] == member.name else folders[member.name],
            replacements=tuple(_replaced(each.replacement) for each in member.replaced),
            alone=member.alone and (member.alone.parameters, member.alone.nbytes),
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


def _describe_tensors(stored: Stored, member: Member, placements: Sequence[Any]) -> dict[str, Any]:
    """What a manifest says of one member's tensors."""
    state = lazy_state_of(stored, member.name)
    once = {id(each): (key, each.dtype, each.shape) for key, each in state.handles.items()}
    encoded = encoded_entries(stored.own(member.name))
    same = {key.name: str(at) for key, at in stored.aliases.items() if key.member == member.name}
    return {
        "hash": content_hash(state) if encoded or same or placements else None,
        "bytes": aligned_file_bytes(once.values()) + sum(map(len, member.files.values())),
        "ties": dict(stored.ties.get(member.name, {})),
        "encoded": encoded,
        "same": same,
        "placements": tuple(placements),
    }


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


def _by_file(stored: Stored, folders: Mapping[str, str]) -> dict[str, dict[str, Encoded]]:
    """Stored tensors by the file, without its ending, and by their names in it."""
    files: dict[str, dict[str, Encoded]] = {}
    for key, encoded in stored.tensors.items():
        stem = DICTIONARY if isinstance(key, PartKey) else f"members/{folders[key.member]}/{WEIGHTS}"
        files.setdefault(stem, {})[key.in_file] = encoded
    return files


def _shown(key: StorageKey) -> str:
    return key.in_file if isinstance(key, PartKey) else f"{key.member}/{key.name}"


def _share_files(members: Sequence[Member]) -> tuple[dict[str, dict[str, bytes]], dict[str, dict[str, str]]]:
    """Small files by member, and those that an earlier member has too, with that member's name."""
    own: dict[str, dict[str, bytes]] = {}
    borrowed: dict[str, dict[str, str]] = {}
    first: dict[tuple[str, bytes], str] = {}
    for member in members:
        for relative, content in sorted(member.files.items()):
            if not is_safe(relative) or _is_taken(Path(relative)):
                raise OutputError(
                    f"A member's file must lie inside its folder under a name of its own, but '{relative}' "
                    f"of member '{member.name}' does not; rename it."
                )
            lender = first.setdefault((relative, content), member.name)
            if lender != member.name and len(content) >= _BORROW:
                borrowed.setdefault(member.name, {})[relative] = lender
            else:
                own.setdefault(member.name, {})[relative] = content
    return own, borrowed


def _is_taken(path: Path) -> bool:
    """Whether a member's small file has the name of what an artifact holds beside it."""
    return path.name.startswith(f"{WEIGHTS}.") or path.as_posix() == EXTRA_STATE


def _check_names(members: Sequence[Member]) -> None:
    if bad := [
        member.name
        for member in members
        if not is_safe(f"members/{member.name}") or "/" in member.name or member.name in (".", "..")
    ]:
        raise OutputError(
            f"A member's name must be fit for a folder, but {', '.join(bad)} is not; rename it."
        )


def _recipe_bytes(recipe: Mapping[str, Any]) -> bytes:
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


def _file_entry(path: Path) -> FileEntry:
    header = read_header(path).digest if path.suffix == ".safetensors" else None
    return FileEntry(bytes=path.stat().st_size, sha256=sha256_of(path), header=header)


def _entry(content: bytes) -> FileEntry:
    return FileEntry(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


def _put(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
