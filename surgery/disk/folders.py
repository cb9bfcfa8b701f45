"""Writes folders that appear whole or not at all, and refuses bad targets before slow work.

A folder is written in a hidden place beside its target, on the same file system, flushed to the disk and moved into
place in one step, so that a crash leaves the old folder or the new one and never a mixture.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from surgery.disk.claims import NEW, OLD, claim, discard, place_of
from surgery.disk.files import error_number, failure, share
from surgery.disk.records import check_owned, record_all
from surgery.errors import OutputError

_SPARE = 1 << 16  # bytes of room demanded beyond what the files need, for folders and journals
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # from Linux's fcntl.h and fs.h


@contextmanager
def new_folder(
    target: str | Path, *, overwrite: bool = False, need: int = 0, record: bool = True
) -> Iterator[Path]:
    """Write a folder that replaces `target` when the block ends, and leaves no trace where the block raises.

    Args:
        target: where the folder shall be; missing parents are made.
        overwrite: whether an existing folder may be replaced. One that holds anything that this tool did not write
            there, by its own records, is never replaced.
        need: bytes that will be written; a disk without room for them is refused early.
        record: whether the new folder gets a record of its files; an artifact's manifest is one already.

    Yields:
        the folder to write into.

    Raises:
        OutputError: where the target exists, holds other files, cannot be written, is written by another process, or
            the disk is full.

    Example:
        >>> import tempfile
        >>> from surgery.disk.files import files_below
        >>> with tempfile.TemporaryDirectory() as place:
        ...     with new_folder(f"{place}/out") as folder:
        ...         _ = (folder / "a.txt").write_text("a")
        ...     files_below(Path(place))
        ['out/.surgery-files', 'out/a.txt']
    """
    check_target(target, overwrite=overwrite)
    with claim(target) as final:
        temporary = place_of(final) / f"{NEW}{secrets.token_hex(6)}"
        try:
            _check_room(final, need)
            temporary.mkdir()
            yield temporary
            if record:
                record_all(temporary)
            if final.exists():
                check_owned(final)
            share(temporary.rglob("*"), temporary)
            _flush(temporary)
            _move_into_place(temporary, final)
        except BaseException as error:
            with contextlib.suppress(OSError):
                discard(temporary)
            if error_number(error) is not None:
                raise OutputError(failure(final, error, need)) from error
            raise
        _discard_old(temporary, final)


def check_target(target: str | Path, *, overwrite: bool = False, inputs: Iterable[Path] = ()) -> None:
    """Whether a folder could be written at `target`; nothing is written.

    Args:
        target: the folder.
        overwrite: whether an existing one may be replaced.
        inputs: files and folders that are read, and must not be replaced or written into.

    Raises:
        OutputError: it exists and may not be replaced, no folder can be made there, or it is one of the inputs, holds
            one or lies in one.
    """
    target = Path(target).expanduser().absolute()
    try:
        _check_apart(target, inputs)
        _check_place(target, overwrite)
    except (OSError, ValueError) as error:  # a name that is too long, a folder that may not be looked into
        raise OutputError(failure(target, error)) from error


def _check_place(target: Path, overwrite: bool) -> None:
    """Raise where no folder can be written at `target`."""
    if target.is_symlink():
        raise OutputError(
            f"`out` must be a folder, but {target} is a link to {os.readlink(target)}; give the folder itself."
        )
    if target.exists() and not target.is_dir():
        raise OutputError(f"`out` must be a folder, but {target} is a file; choose another name.")
    if os.path.ismount(target):
        raise OutputError(
            f"`out` must be a folder that can be moved into place in one step, but {target} is a mount point; "
            f"choose a folder in it, such as {target / 'joint'}."
        )
    if target.is_dir() and any(target.iterdir()):
        if not overwrite:
            raise OutputError(
                f"`out` must be new or empty, but {target} exists and holds files; choose another "
                "folder, or pass `overwrite=True`."
            )
        check_owned(target)
    parent = next(each for each in target.parents if each.exists() or each.is_symlink())
    if not parent.is_dir():
        raise OutputError(f"`out` must lie in a folder, but {parent} is a file; choose another name.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(
            f"The folder that {target} goes into must be writable, but {parent} is not; choose another."
        )


def _check_apart(target: Path, inputs: Iterable[Path]) -> None:
    """Raise where writing `target` would replace an input, or write into one."""
    full = target.resolve()
    for path in inputs:
        source = path.expanduser().resolve()
        inside = source.is_dir() and full.is_relative_to(source)
        if inside or source.is_relative_to(full):
            how = "is" if full == source else "lies in" if inside else "holds"
            raise OutputError(
                f"`out` must be apart from what is read, but {target} {how} {path}, which is an input; choose "
                "another folder."
            )


def _check_room(final: Path, need: int) -> None:
    free = shutil.disk_usage(final.parent).free
    if need and free < need + _SPARE:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


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
    """Put `temporary` where `final` is; the old folder, where there is one, takes the place of `temporary`."""
    if not final.exists() or not any(final.iterdir()):
        if final.exists() and os.name == "nt":
            final.rmdir()
        temporary.rename(final)
    elif not _exchange(temporary, final):
        old = temporary.with_name(temporary.name.replace(NEW, OLD, 1))
        final.rename(old)
        try:
            temporary.rename(final)
        except BaseException:
            old.rename(final)
            raise
        old.rename(temporary)
    if os.name != "nt":
        handle = os.open(final.parent, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _discard_old(old: Path, final: Path) -> None:
    """Remove the folder that was replaced; what somebody put into it at the last moment is kept."""
    if not old.exists():
        return
    discard(old)
    if old.exists():
        kept = final.with_name(f"{final.name}.{old.name.removeprefix(NEW)}")
        old.rename(kept)
        raise OutputError(
            f"{final} was replaced, but files that this tool did not write had come into it meanwhile; they are in "
            f"{kept}."
        )


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step, where the system can: there is no moment at which a name is missing."""
    try:
        swap = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    return swap(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0
