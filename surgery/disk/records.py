"""Records which files of a folder this tool wrote; nothing else is deleted or replaced.

Two kinds of record are read. The manifest of an artifact lists its files with their hashes. Every other folder that
this tool writes into, a run's, an export, the demo's, one of pictures, holds `.surgery-files`, one line a file as
`sha256sum` writes them, with `-` in place of the hash of a file that changes while a run goes on. A file that was
changed since it was recorded belongs to whoever changed it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from surgery.disk.files import failure, files_below, put, sha256_of
from surgery.disk.untrusted import DOCUMENT_BYTES, UnreadableError, is_regular, parse_json, read_regular
from surgery.errors import OutputError, shorten

RECORD, MANIFEST = ".surgery-files", "manifest.json"
_CHANGING = "-"  # in place of a hash


def owned_files(folder: Path) -> set[str]:
    """Relative POSIX paths of the files below `folder` that this tool wrote and nobody changed since, its records too.

    Tensor files of an artifact are taken by name, because they are large and have no use outside it; a damaged one can
    so be replaced.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as place:
        ...     _ = write_owned(Path(place), "a.png", b"a")
        ...     _ = (Path(place) / "mine.txt").write_text("mine")
        ...     sorted(owned_files(Path(place)))
        ['.surgery-files', 'a.png']
    """
    owned: set[str] = set()
    for record in sorted(folder.rglob(RECORD)):
        place = record.parent.relative_to(folder).as_posix()
        below = "" if place == "." else f"{place}/"
        listed = read_record(record.parent)
        owned |= {f"{below}{name}" for name, digest in listed.items() if _is(record.parent / name, digest)}
        owned.add(f"{below}{RECORD}")
    listed = _read_manifest(folder)
    owned |= {name for name, digest in listed.items() if _is(folder / name, digest)}
    return owned | ({MANIFEST} if listed else set())


def unowned_files(folder: Path, owned: set[str] | None = None) -> list[str]:
    """What `folder` holds that this tool did not write: files, and empty folders with a slash behind, sorted.

    Args:
        folder: any.
        owned: what `owned_files` says of it, where that is known; it takes reading all files.
    """
    owned = owned_files(folder) if owned is None else owned
    lost = _emptied(folder)
    empty = [
        path
        for path in folder.rglob("*")
        if path.is_dir() and not path.is_symlink() and not any(path.iterdir()) and path not in lost
    ]
    found = [name for name in files_below(folder) if name not in owned]
    return sorted([*found, *(f"{path.relative_to(folder).as_posix()}/" for path in empty)])


def check_owned(folder: Path) -> None:
    """Whether all that `folder` holds was written by this tool, so that it may be replaced.

    Raises:
        OutputError: naming what was not.
    """
    if others := unowned_files(folder):
        raise OutputError(
            f"Only what was written here before may be replaced, but {folder} also holds "
            f"{shorten(others, 5)}, which no record says, or which were changed since; move these away or "
            "choose another folder."
        )


def check_free(folder: Path, names: tuple[str, ...]) -> None:
    """Whether files of these names could be written into `folder` without replacing one of somebody else's.

    Raises:
        OutputError: naming those that are in the way.
    """
    present = [name for name in names if (folder / name).exists() or (folder / name).is_symlink()]
    if taken := sorted(set(present) - owned_files(folder)) if present else []:
        raise OutputError(
            f"{folder} holds {', '.join(taken)}, which this run would replace and no record says that it may; move "
            "these away or choose another folder."
        )


def note(folder: Path, *names: str, digest: str = _CHANGING) -> None:
    """Record that this tool writes files of these names into `folder`; to be called before they are written."""
    new = [name for name in names if read_record(folder).get(name) != digest]
    if new:
        folder.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(folder / RECORD) and not is_regular(folder / RECORD):
            raise OutputError(
                f"{folder / RECORD} must be a regular file, but is something else; move it away."
            )
        with (folder / RECORD).open("a", encoding="utf-8") as file:
            file.write("".join(f"{digest}  {name}\n" for name in new))


def record_all(folder: Path) -> None:
    """Record every file below `folder`, as it is."""
    lines = [f"{_digest(folder / name)}  {name}\n" for name in files_below(folder) if "\n" not in name]
    (folder / RECORD).write_text("".join(lines), encoding="utf-8")


def write_owned(folder: Path, name: str, content: bytes) -> Path:
    """Write a file into a folder that may hold others, and record it; one that is as wanted is left alone.

    Returns:
        its path.

    Raises:
        OutputError: where a file of that name is somebody else's, or the folder cannot be written.
    """
    path = folder / name
    digest = hashlib.sha256(content).hexdigest()
    if path.is_file() and not path.is_symlink() and sha256_of(path) == digest:
        return path
    try:
        check_free(folder, (name,))
        note(folder, name, digest=digest)
    except OSError as error:
        raise OutputError(failure(path, error)) from error
    put(path, content)
    return path


def remove_owned(folder: Path) -> list[str]:
    """Delete what this tool wrote into `folder`, and the folder where nothing else is in it.

    Returns:
        what is left, relative to the folder.
    """
    if not folder.is_dir() or folder.is_symlink():
        return []
    for place in _emptied(folder):
        place.rmdir()
    last = {RECORD, MANIFEST}  # so that a removal that was killed can be finished
    for name in sorted(owned_files(folder), key=lambda name: (Path(name).name in last, name)):
        (folder / name).unlink(missing_ok=True)
        for parent in (folder / name).relative_to(folder).parents:
            if any((folder / parent).iterdir()):
                break
            (folder / parent).rmdir()
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
    return unowned_files(folder) if folder.is_dir() else []


def _emptied(folder: Path) -> set[Path]:
    """Empty folders of the artifact in `folder` whose files were lost."""
    parents = {folder / parent for name in artifact_files(folder) for parent in Path(name).parents}
    return {path for path in parents if path.is_dir() and not path.is_symlink() and not any(path.iterdir())}


def read_record(folder: Path) -> dict[str, str]:
    """Names and hashes in the record of a folder, the last line of a name in force; nothing where there is none."""
    try:
        lines = read_regular(folder / RECORD, DOCUMENT_BYTES).decode().splitlines()
    except (UnreadableError, UnicodeDecodeError):
        return {}
    pairs = (line.partition("  ") for line in lines)
    return {name: digest for digest, _, name in pairs if _stays_inside(name)}


def wrong_files(folder: Path) -> dict[str, str] | None:
    """Files that are not as they were written, by path with the reason; None where no record says how they were."""
    listed = read_record(folder)
    wrong = [name for name, digest in sorted(listed.items()) if not _is(folder / name, digest)]
    return {name: _reason(folder / name) for name in wrong} if listed else None


def _reason(path: Path) -> str:
    """Why a file is not the one that was recorded."""
    if not os.path.lexists(path):
        return "is missing"
    try:
        _digest(path)
    except UnreadableError as error:
        return str(error)
    return "is not what was written: its SHA-256 is another one"


def artifact_files(folder: Path) -> set[str]:
    """The files that the manifest in `folder` lists, changed since or not; nothing where there is no manifest."""
    return set(_read_manifest(folder))


def _read_manifest(folder: Path) -> Mapping[str, str]:
    """Hashes by name of the files of the artifact in `folder`, tensors without; nothing where it is no artifact."""
    try:
        found: Any = parse_json(read_regular(folder / MANIFEST, DOCUMENT_BYTES))
        files = found["files"].items() if found["format"] == "surgery" else ()
        return {
            name: _CHANGING if name.endswith(".safetensors") else str(entry["sha256"])
            for name, entry in files
            if _stays_inside(name)
        }
    except (UnreadableError, KeyError, TypeError, AttributeError):
        return {}


def _stays_inside(name: str) -> bool:
    return bool(name) and not Path(name).is_absolute() and ".." not in Path(name).parts


def _is(path: Path, digest: str) -> bool:
    """Whether a file is there, can be read, and is the one that was recorded."""
    if not path.is_symlink() and not path.is_file():
        return False
    try:
        return digest == _CHANGING or _digest(path) == digest
    except UnreadableError:
        return False


def _digest(path: Path) -> str:
    """Of a link where it leads, of a file its content."""
    return hashlib.sha256(os.readlink(path).encode()).hexdigest() if path.is_symlink() else sha256_of(path)
