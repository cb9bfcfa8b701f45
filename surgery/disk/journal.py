"""Journal: what a long run has made so far, in a folder, so that the same run begun again after a kill goes on there.

A journal belongs to a *subject*: what is run, on which files, by which versions. Each thing that was made is a file of
its tensors and a line, written when the file is whole; a last line that is not whole, and a file that is not what its
line says, count as not made. Tensors are mapped from these files, so what is in a journal takes no memory.

    subject.json   what is run
    lines.jsonl    for each thing its key, its value, and where its tensors lie in which file
    0.bin, ...     tensors, each at a multiple of 4,096 bytes
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surgery.disk.files import failure
from surgery.errors import LoadError, OutputError

SUBJECT, LINES, PAGE = "subject.json", "lines.jsonl", 4096
_FILE = re.compile(r"(\d+\.bin)?", re.ASCII)
AT_ONCE = 1 << 24  # bytes that are checked at a time

Made = tuple[Any, Mapping[str, Tensor]]
"""A value that JSON can say, and tensors by name."""

_current: ContextVar[Journal | None] = ContextVar("journal of the run that is going on", default=None)


@dataclass(frozen=True)
class _Line:
    key: str
    value: Any
    file: str
    nbytes: int
    check: int
    tensors: Mapping[str, tuple[str, tuple[int, ...], int]]


class Journal:
    """The journal in a folder, which one run at a time writes.

    Args:
        folder: made where it is not there.
        subject: what is run, in values of JSON; what a journal that is there is of must be equal.
        target: what the run writes, for errors.
        check: raises where what the run reads is not what it was; such a run has made nothing that may be kept.

    Attributes:
        found: how many things there were when it was opened.

    Raises:
        OutputError: where the folder has the journal of another subject, or cannot be written.
    """

    def __init__(
        self, folder: Path, subject: Mapping[str, Any], target: Path, check: Callable[[], None] = lambda: None
    ):
        self.folder, self.target, self._check_read = folder, target, check
        self._lines: dict[str, _Line] = {}
        subject = json.loads(json.dumps(subject))
        try:
            if (before := _subject_in(folder)) is None:
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
                (folder / LINES).touch()
                beside = folder / f"{SUBJECT}.new"
                beside.write_text(json.dumps(subject))
                beside.rename(folder / SUBJECT)
            elif before != subject:
                raise OutputError(_other(folder, target, before, subject))
            self._read()
        except OSError as error:
            raise OutputError(failure(target, error)) from error
        self.found = len(self._lines)
        held = [path.name for path in folder.glob("*.bin") if _FILE.fullmatch(path.name)]
        self._next = 1 + max((int(name.removesuffix(".bin")) for name in held), default=-1)

    def _read(self) -> None:
        """Take whole lines, and cut off what a kill left of the last one."""
        path, whole = self.folder / LINES, 0
        for text in path.read_bytes().splitlines(keepends=True):
            try:
                said = json.loads(text if text.endswith(b"\n") else b"")
                tensors = {
                    name: (kind, tuple(shape), at) for name, (kind, shape, at) in said["tensors"].items()
                }
                line = _Line(**{**said, "tensors": tensors})
                _check(line)
            except (ValueError, TypeError, KeyError, AttributeError):
                break
            self._lines[line.key], whole = line, whole + len(text)
        os.truncate(path, whole)

    def get(self, key: str) -> Made | None:
        """What was made under a key; None where nothing was, or it is not whole any more."""
        line = self._lines.get(key)
        if line is None:
            return None
        if not line.file:
            return line.value, {}
        path = self.folder / line.file
        try:
            if path.stat().st_size != line.nbytes or _checksum(path) != line.check:
                return None
        except OSError:
            return None
        return line.value, self._mapped(line)

    def keep(self, key: str, value: Any, tensors: Mapping[str, Tensor]) -> Made:
        """Write down what was made, and return it as it will be read: equal, tensors contiguous.

        Raises:
            OutputError: where the disk has no room; what was written before stays usable.
            LoadError: where a file changed that it may have been made from; likewise.
        """
        name = f"{self._next}.bin" if tensors else ""
        try:
            nbytes, check, where = self._write(self.folder / name, tensors) if tensors else (0, 0, {})
            self._check_read()
            line = _Line(key, value, name, nbytes, check, where)
            with (self.folder / LINES).open("ab") as file:
                file.write(json.dumps(vars(line)).encode() + b"\n")
        except (OSError, LoadError) as error:
            with contextlib.suppress(OSError):
                (self.folder / name).unlink() if name else None
            self._check_read()  # what is mapped from a file that was cut off cannot be written either
            if isinstance(error, LoadError):
                raise
            raise OutputError(failure(self.target, error)) from error
        self._next += 1
        self._lines[key] = line
        return value, self._mapped(line)

    def _write(self, path: Path, tensors: Mapping[str, Tensor]) -> tuple[int, int, dict[str, Any]]:
        """A file of tensors: its size, its checksum, and where each tensor lies."""
        end, check, where = 0, 0, {}
        with path.open("wb") as file:
            for name, tensor in tensors.items():
                gap = bytes(-end % PAGE)
                data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
                where[name] = (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), end + len(gap))
                for piece in (gap, data):
                    file.write(piece)
                    check = zlib.crc32(piece, check)
                end += len(gap) + len(data)
        return end, check, where

    def _mapped(self, line: _Line) -> dict[str, Tensor]:
        if not line.file or not line.nbytes:
            return {name: torch.empty(s, dtype=getattr(torch, k)) for name, (k, s, _) in line.tensors.items()}
        storage = torch.UntypedStorage.from_file(str(self.folder / line.file), False, line.nbytes)
        bytes_ = torch.empty(0, dtype=torch.uint8).set_(storage)  # pyright: ignore[reportArgumentType]
        found = {}
        for name, (kind, shape, at) in line.tensors.items():
            dtype = getattr(torch, kind)
            found[name] = bytes_[at : at + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
        return found

    def discard(self) -> None:
        """Remove it: the run has ended."""
        shutil.rmtree(self.folder, ignore_errors=True)


@contextmanager
def kept_in(journal: Journal | None) -> Iterator[None]:
    """Inside, `made_once` asks a journal first; None for none."""
    token = _current.set(journal)
    try:
        yield
    finally:
        _current.reset(token)


def made_once(key: str, make: Callable[[], Made], device: torch.device | None = None) -> Made:
    """What is in the journal of the run that is going on under a key; else what `make` returns, which is kept there.

    Args:
        key: of what is made: the same for the same thing each time that the run's subject is run, and for nothing else.
        make: makes it.
        device: where its tensors are wanted; a journal's lie on the CPU.

    Example:
        >>> made_once("answer", lambda: (42, {}))
        (42, {})
    """
    journal = _current.get()
    value, tensors = make() if journal is None else journal.get(key) or journal.keep(key, *make())
    return value, tensors if device is None else {name: tensor.to(device) for name, tensor in tensors.items()}


def keeps() -> bool:
    """Whether a run is going on that has a journal."""
    return _current.get() is not None


def _subject_in(folder: Path) -> Any:
    """What the journal in a folder is of; None where there is none."""
    try:
        return json.loads((folder / SUBJECT).read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


def _check(line: _Line) -> None:
    """Find what no run writes: another file than one of the journal's own, a tensor that does not lie in it.

    Raises:
        ValueError: where there is such a thing.
    """
    if not _FILE.fullmatch(line.file):
        raise ValueError(f"{line.file} is no file of a journal")
    for kind, shape, at in line.tensors.values():
        dtype = getattr(torch, kind)
        if not isinstance(dtype, torch.dtype) or min(at, *shape, 0) < 0:
            raise ValueError(f"a tensor of {kind} {shape} at {at}")
        if at + math.prod(shape) * dtype.itemsize > line.nbytes:
            raise ValueError(f"a tensor of {kind} {shape} at {at} of {line.nbytes} bytes")


def _checksum(path: Path) -> int:
    check = 0
    with path.open("rb") as file:
        while piece := file.read(AT_ONCE):
            check = zlib.crc32(piece, check)
    return check


def _other(folder: Path, target: Path, before: Any, now: Mapping[str, Any]) -> str:
    """A sentence for the journal of another subject: what is not the same."""
    before = before if isinstance(before, dict) else {}
    apart = [name for name in now if before.get(name) != now[name]]
    if apart == ["software"] and isinstance(begun := before.get("software"), dict):
        apart = [name for name, value in now["software"].items() if begun.get(name) != value]
    files = before.get("files", {}) if apart == ["files"] else {}
    which = [f"{path} was written to" for path, seen in files.items() if now["files"].get(path, seen) != seen]
    what = ", ".join(which) or f"another {' and '.join(apart)} was asked for"
    return (
        f"A run that will write {target} was interrupted, and goes on only as it was begun, but {what}: run "
        f"what was interrupted again, or delete {folder} to begin anew."
    )
