"""Files: hashes, what lies below a folder, files written whole, and errors of the system as sentences."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from surgery.disk.untrusted import open_regular
from surgery.errors import LoadError, OutputError

PART = 1 << 20  # bytes of a file that are copied at once


def sha256_of(path: Path) -> str:
    """SHA-256 of a regular file's bytes, in hexadecimal.

    Raises:
        UnreadableError: where there is no regular file.
    """
    with open_regular(path) as file:
        readable: Any = file  # typing has no name for what `file_digest` takes
        return hashlib.file_digest(readable, "sha256").hexdigest()


def copy_hashed(source: Path, target: Path) -> str:
    """Copy a file's bytes; returns their SHA-256, in hexadecimal."""
    digest = hashlib.sha256()
    with source.open("rb") as read, target.open("wb") as write:
        while part := read.read(PART):
            digest.update(part)
            write.write(part)
    return digest.hexdigest()


def files_below(folder: Path) -> list[str]:
    """Relative POSIX paths of everything below `folder` that is not itself a folder, sorted."""
    found = [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
    return sorted(path.relative_to(folder).as_posix() for path in found)


def bytes_below(folder: Path) -> int:
    """Bytes of all files below `folder`, as their lengths say."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def put(path: Path, content: bytes) -> None:
    """Write one file, whole or not at all; what has its name is replaced, a link itself and not where it leads.

    Raises:
        OutputError: where it cannot be written.
    """
    beside = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        if isinstance(error, OSError):
            raise OutputError(failure(path, error)) from error
        raise


def share(paths: Iterable[Path], folder: Path) -> None:
    """Give files the permissions of one that is made in the usual way: libraries write some for their owner alone.

    Args:
        paths: files; folders, links, and files that lie in another folder as well keep theirs.
        folder: in which a file can be made to see what is usual.
    """
    if os.name == "nt":
        return
    probe = folder / f".mode.{secrets.token_hex(6)}"
    probe.touch()
    usual = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for path in [*paths]:
        found = path.lstat()
        if stat.S_ISREG(found.st_mode) and found.st_nlink == 1 and found.st_mode & 0o666 != usual:
            path.chmod(usual | found.st_mode & 0o111)


def error_number(error: BaseException) -> int | None:
    """The operating system's error number behind an exception of Python's or safetensors' own, else None."""
    if isinstance(error, OSError):
        return error.errno or 0
    if type(error).__name__ == "SafetensorError" and (found := re.search(r"os error (\d+)", str(error))):
        return int(found.group(1))
    return None


def failure(target: Path, error: BaseException, need: int = 0) -> str:
    """A sentence for an error of the system while `target` was written; `need` is its size in bytes, where known."""
    code = error_number(error) or 0
    if code in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
        place = next(folder for folder in target.parents if folder.exists())
        amount = f"{need:,} bytes" if need else "more room"
        return (
            f"Writing {target} needs {amount}, but the disk is full ({shutil.disk_usage(place).free:,} bytes "
            "free); free some space or choose a folder on another disk."
        )
    if code in (errno.EROFS, errno.EACCES, errno.EPERM):
        return (
            f"The place for {target} must be writable, but the system says '{os.strerror(code)}'; choose "
            "another folder or change its permissions."
        )
    return f"{target} could not be written: {' '.join(str(error).split())}; choose another folder."


def write_files(files: Mapping[str, bytes], directory: Path, keep: Iterable[str] = ()) -> None:
    """Write `files` below `directory`, apart from the paths in `keep`, which the saver wrote itself."""
    left = set(keep)
    for relative, content in files.items():
        target = directory / relative
        if not target.resolve().is_relative_to(directory.resolve()):
            raise LoadError(f"a member's file must lie inside its folder; '{relative}' leads out of it")
        if relative not in left:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
