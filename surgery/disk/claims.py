"""Lets one of several runs write to a target, and removes what a killed run left.

Beside a target `out` lies, as long as somebody writes it, the hidden folder `.out.surgery`: a lock, which says whose it
is, and the folder that is being written. The system gives a lock back when its process ends, however it ends, so that
nobody has to guess whether an owner still lives, on this host or on another that shares the disk. Where a file system
has no locks, the owner that is named counts: one of this host while its process lives, one of another host until
somebody deletes the hidden folder.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from surgery.disk.files import failure
from surgery.disk.records import MANIFEST, RECORD, remove_owned
from surgery.errors import OutputError

LOCK, NEW, OLD, ASIDE = "lock", "new-", "old-", "aside-"
_BUSY = (errno.EAGAIN, errno.EACCES, errno.EDEADLK)
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
_FAR = 1 << 40  # the byte that Windows locks: what is locked there cannot be read


@dataclass
class _Claim:
    """A target that this process holds: the lock's handle, how often it was claimed, and what was made for it."""

    handle: int
    made: list[Path]
    process: int
    times: int = 1


_held: dict[Path, _Claim] = {}
_guard = threading.Lock()


def place_of(target: Path) -> Path:
    """Where the new content of `target` is written until it is whole."""
    return target.with_name(f".{target.name}.surgery")


def work_place(target: str | Path) -> Path:
    """Where somebody who holds a target may have files of his own meanwhile: the hidden folder beside it."""
    return place_of(Path(target).expanduser().resolve())


@contextmanager
def claim(target: str | Path) -> Iterator[Path]:
    """Hold a target: nobody else writes it inside, and what killed runs left beside it is gone.

    Claims of one process may be nested.

    Args:
        target: the folder that will be written; missing parents are made, and removed again where they stay empty.

    Yields:
        the target's full path.

    Raises:
        OutputError: where another process holds it, with the process and its host, or nothing can be written there.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as place:
        ...     with claim(f"{place}/out") as target:
        ...         place_of(target).is_dir()
        ...     list(Path(place).iterdir())
        True
        []
    """
    final = Path(target).expanduser().resolve()
    with _guard:
        held = _held.get(final)
        if held is not None and held.process == os.getpid():
            held.times += 1
        else:
            _held[final] = _take(final)
    try:
        yield final
    finally:
        with _guard:
            _held[final].times -= 1
            if not _held[final].times:
                _give_back(final, _held.pop(final))


@contextmanager
def claim_of_first(target: str | Path | None) -> Iterator[None]:
    """`claim` where this is the first of several processes that work together; nothing without a target."""
    if target is None or os.environ.get("RANK", "0") != "0":
        yield
        return
    with claim(target):
        yield


def _take(final: Path) -> _Claim:
    made: list[Path] = []
    try:
        made = _make_parents(final.parent)
        handle = _lock(final)
    except BaseException as error:
        _remove_empty(made)
        if isinstance(error, OSError):
            raise OutputError(failure(final, error)) from error
        raise
    try:
        _clean(final)
    except OSError as error:
        _give_back(final, _Claim(handle, made, os.getpid()))
        raise OutputError(failure(final, error)) from error
    return _Claim(handle, made, os.getpid())


def _give_back(final: Path, held: _Claim) -> None:
    place = place_of(final)
    if os.name == "nt":
        os.close(held.handle)
    with contextlib.suppress(OSError):  # the lock goes first: another process may be waiting for the folder
        (place / LOCK).unlink()
        place.rmdir()
    if os.name != "nt":
        os.close(held.handle)
    _remove_empty(held.made)


def _lock(final: Path) -> int:
    """A handle that holds the lock; the lock's file may vanish between opening and locking it, as an owner ends."""
    place = place_of(final)
    while True:
        place.mkdir(exist_ok=True)
        try:
            handle = os.open(place / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:
            continue
        try:
            if not _lock_handle(handle, place / LOCK):
                raise OutputError(_busy(final, _owner(place / LOCK)))
            if os.name == "nt" or _same_file(handle, place / LOCK):
                _sign(handle)
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _lock_handle(handle: int, path: Path) -> bool:
    """Whether the lock was free and is now held."""
    try:
        if os.name == "nt":
            import msvcrt

            os.lseek(handle, _FAR, os.SEEK_SET)
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return not _lives(_owner(path))
        if error.errno not in _BUSY:
            raise
        return False
    return True


def _same_file(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _sign(handle: int) -> None:
    """Say in the lock whose it is."""
    since = datetime.now().astimezone().isoformat(timespec="seconds")
    owner = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}).encode()
    os.ftruncate(handle, 0)
    os.lseek(handle, 0, os.SEEK_SET)
    os.write(handle, owner)


def _owner(lock: Path) -> dict[str, Any]:
    try:
        found = json.loads(lock.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _lives(owner: dict[str, Any]) -> bool:
    """Whether the owner may still be there, where no lock says it."""
    if not owner or owner.get("host") != socket.gethostname():
        return bool(owner)
    import psutil

    return owner.get("pid") != os.getpid() and psutil.pid_exists(int(owner.get("pid", -1)))


def _busy(final: Path, owner: dict[str, Any]) -> str:
    who = f"process {owner['pid']} on {owner.get('host')}" if "pid" in owner else "another process"
    since = f" since {owner['since']}" if "since" in owner else ""
    return (
        f"A folder is written by one process at a time, but {who} has been writing {final}{since}; wait until it is "
        f"done, end it, or choose another folder. (Where no such process is left, delete {place_of(final)}.)"
    )


def _clean(final: Path) -> None:
    """Remove what a killed run left beside its target; an old folder that had no successor yet goes back."""
    place = place_of(final)
    for left in sorted(place.iterdir()):
        if left.name.startswith(OLD) and not final.exists():
            left.rename(final)
        elif left.name.startswith((NEW, OLD)):
            discard(left)
        elif left.name.startswith(ASIDE) and left.is_file():  # of a run that was killed meanwhile
            left.unlink()


def discard(folder: Path) -> None:
    """Remove a folder beside a target: one that was not finished whole, and of one that was what this tool wrote."""
    if (folder / MANIFEST).exists() or (folder / RECORD).exists():
        remove_owned(folder)
    else:
        shutil.rmtree(folder, ignore_errors=True)


def _make_parents(parent: Path) -> list[Path]:
    """Make missing folders; returns those that were made, outermost first."""
    missing = [folder for folder in (parent, *parent.parents) if not folder.exists()][::-1]
    parent.mkdir(parents=True, exist_ok=True)
    return missing


def _remove_empty(folders: list[Path]) -> None:
    for folder in reversed(folders):
        with contextlib.suppress(OSError):  # somebody may have put something into it
            folder.rmdir()
