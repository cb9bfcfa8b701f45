"""Folders that appear whole or not at all, hashes of files, and file errors as sentences.

A folder is written under a hidden name beside its target, on the same file system, flushed to the disk and
moved into place in one step, so that a crash leaves the old folder or the new one and never a mixture.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from surgery.errors import OutputError

_SPARE = 1 << 16  # bytes of room demanded beyond what the files need, for folders and journals
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # from Linux's fcntl.h and fs.h


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_below(folder: Path) -> list[str]:
    """Relative POSIX paths of everything below `folder` that is not itself a folder, sorted."""
    found = [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
    return sorted(path.relative_to(folder).as_posix() for path in found)


@contextmanager
def new_folder(
    target: str | Path,
    *,
    overwrite: bool = False,
    need: int = 0,
    owned: Callable[[Path], set[str]] = lambda _: set(),
    replace_same_names: bool = False,
) -> Iterator[Path]:
    """Write a folder that replaces `target` when the block ends, and leaves no trace where the block raises.

    Args:
        target: where the folder shall be; missing parents are made.
        overwrite: whether an existing folder may be replaced. One that holds files that are neither `owned`
            nor, with `replace_same_names`, written again under the same name is never replaced.
        need: bytes that will be written, to be told early that a disk is too full.
        owned: gives the relative paths in an existing folder that may be deleted.
        replace_same_names: whether a file in the way may be replaced by a new one of its name.

    Yields:
        the folder to write into.

    Raises:
        OutputError: where the target exists, holds other files, cannot be written, or the disk is full.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as place:
        ...     with new_folder(f"{place}/out") as folder:
        ...         _ = (folder / "a.txt").write_text("a")
        ...     files_below(Path(place))
        ['out/a.txt']
    """
    final = Path(target).expanduser().resolve()
    check_target(final, overwrite=overwrite)
    made: list[Path] = []
    temporary = final.parent / f".{final.name}.{secrets.token_hex(6)}"
    try:
        made = _make_parents(final.parent)
        _check_room(final, need)
        temporary.mkdir()
        yield temporary
        if final.exists():
            _check_strangers(
                final, owned(final) | (set(files_below(temporary)) if replace_same_names else set())
            )
        _flush(temporary)
        _move_into_place(temporary, final)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        for parent in reversed(made):
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()
        if (code := error_number(error)) is not None:
            raise OutputError(_sentence(final, code, error, need)) from error
        raise


def error_number(error: BaseException) -> int | None:
    """The operating system's error number behind an exception of Python's or safetensors' own, else None."""
    if isinstance(error, OSError):
        return error.errno or 0
    if type(error).__name__ == "SafetensorError" and (found := re.search(r"os error (\d+)", str(error))):
        return int(found.group(1))
    return None


def check_target(target: Path, *, overwrite: bool = False) -> None:
    """Whether a folder could be written at `target`; nothing is written.

    Raises:
        OutputError: it exists and may not be replaced, or no folder can be made there.
    """
    target = target.expanduser().absolute()
    if target.exists() and not target.is_dir():
        raise OutputError(f"The target must be a folder, but {target} is a file; choose another name.")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise OutputError(
            f"The target must be new or empty, but {target} exists and holds files; choose another "
            "folder, or pass --overwrite (in Python overwrite=True)."
        )
    parent = next(each for each in target.parents if each.exists())
    if not parent.is_dir():
        raise OutputError(f"The target must lie in a folder, but {parent} is a file; choose another name.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(
            f"The folder that {target} goes into must be writable, but {parent} is not; choose another."
        )


def _check_strangers(final: Path, allowed: set[str]) -> None:
    strangers = [name for name in files_below(final) if name not in allowed]
    if strangers:
        more = f" and {len(strangers) - 5} more" if len(strangers) > 5 else ""
        raise OutputError(
            f"Only what was written here before may be replaced, but {final} also holds "
            f"{', '.join(strangers[:5])}{more}; move these away or choose another folder."
        )


def _check_room(final: Path, need: int) -> None:
    free = shutil.disk_usage(final.parent).free
    if need and free < need + _SPARE:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _make_parents(parent: Path) -> list[Path]:
    """Make missing folders; returns those that were made, outermost first."""
    missing = [folder for folder in (parent, *parent.parents) if not folder.exists()][::-1]
    parent.mkdir(parents=True, exist_ok=True)
    return missing


def _flush(folder: Path) -> None:
    """Have every file and folder reach the disk before the move makes them visible."""
    for path in (*folder.rglob("*"), folder):
        if path.is_dir() and os.name == "nt":
            continue
        handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _move_into_place(temporary: Path, final: Path) -> None:
    """Put `temporary` where `final` is; the old folder goes away only once the new one is in place."""
    if not final.exists() or not any(final.iterdir()):
        if final.exists() and os.name == "nt":
            final.rmdir()
        temporary.rename(final)
    elif _exchange(temporary, final):
        shutil.rmtree(temporary, ignore_errors=True)
    else:
        old = final.with_name(f"{temporary.name}.old")
        final.rename(old)
        try:
            temporary.rename(final)
        except BaseException:
            old.rename(final)
            raise
        shutil.rmtree(old, ignore_errors=True)
    if os.name != "nt":
        handle = os.open(final.parent, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step, where the system can: there is no moment at which a name is missing."""
    try:
        swap = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    return swap(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0


def _sentence(final: Path, code: int, error: BaseException, need: int) -> str:
    if code in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
        place = next(folder for folder in final.parents if folder.exists())
        amount = f"{need:,} bytes" if need else "more room"
        return (
            f"Writing {final} needs {amount}, but the disk is full ({shutil.disk_usage(place).free:,} bytes "
            "free); free some space or choose a folder on another disk."
        )
    if code in (errno.EROFS, errno.EACCES, errno.EPERM):
        return (
            f"The place for {final} must be writable, but the system says '{os.strerror(code)}'; choose "
            "another folder or change its permissions."
        )
    return f"{final} could not be written: {' '.join(str(error).split())}; choose another folder."
