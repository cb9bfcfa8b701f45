"""Where tensors lie in files that are mapped into memory, and views of such files that nobody else can write to.

Libraries that load safetensors map the files: a tensor's memory is then a piece of a file, and takes no memory of its
own until somebody writes to it. Which piece of which file it is says the system's table of mappings, whoever made the
tensor, so a tensor that is as its file has it need not be copied to be kept: it can be read again.
"""

from __future__ import annotations

import math
import mmap
import os
import re
import sys
from bisect import bisect_right
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from surgery.errors import LoadError

_RANGE = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S+) ([0-9a-f]+) \S+ (\d+) +(/.*)?")


@dataclass(frozen=True)
class MappedFile:
    """A file as it is while tensors of it are in use.

    Attributes:
        path: of the file.
        nbytes: of the file.
        changed: when it was changed last, in nanoseconds.
    """

    path: Path
    nbytes: int
    changed: int

    @classmethod
    def of(cls, path: Path) -> MappedFile:
        """The file as it is now."""
        found = path.stat()
        return cls(path, found.st_size, found.st_mtime_ns)

    def check(self) -> None:
        """See that the file is still the one that tensors were loaded from.

        Raises:
            LoadError: where it is gone, shorter, or was written to.
        """
        try:
            now = MappedFile.of(self.path)
        except OSError as error:
            now, found = None, f"is gone ({error.strerror})"
        else:
            found = f"was written to: it had {self.nbytes:,} bytes and has {now.nbytes:,}"
        if now != self:
            raise LoadError(
                f"{self.path} must stay as it is while its weights are read, but {found}; run this again once nothing "
                "writes to it"
            )


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in a file.

    Attributes:
        file: that it lies in.
        begin: where its bytes begin there.
    """

    file: MappedFile
    begin: int


@dataclass(frozen=True)
class _Mapping:
    start: int
    stop: int
    offset: int
    path: str
    untouched: bool


def places_of(tensors: Iterable[Tensor]) -> dict[int, Place]:
    """Where tensors lie in mapped files, by `id`, of those that do and are as the file has them.

    Contiguous tensors of the CPU alone; none on systems without `/proc`. A mapping that was written to, so that the
    system copied pages of it, counts as no file.

    Args:
        tensors: any.
    """
    found: dict[int, Place] = {}
    plain = [t for t in tensors if t.device.type == "cpu" and t.layout == torch.strided and t.numel()]
    addresses = {tensor.data_ptr() for tensor in plain}
    mappings = _mappings(addresses) if addresses and sys.platform == "linux" else []
    starts, files = [each.start for each in mappings], dict[str, MappedFile]()
    for tensor in plain:
        at = bisect_right(starts, tensor.data_ptr()) - 1
        if at < 0 or not tensor.is_contiguous():
            continue
        mapping = mappings[at]
        begin = mapping.offset + tensor.data_ptr() - mapping.start
        if mapping.untouched and tensor.data_ptr() + tensor.nbytes <= mapping.stop:
            try:
                file = files.setdefault(mapping.path, MappedFile.of(Path(mapping.path)))
            except OSError:  # removed or replaced since: what is mapped is all there is
                continue
            if begin + tensor.nbytes <= file.nbytes:
                found[id(tensor)] = Place(file, begin)
    return found


def files_of(tensors: Iterable[Tensor]) -> tuple[MappedFile, ...]:
    """The files that tensors are mapped from, as they are now.

    Args:
        tensors: any.
    """
    return tuple(dict.fromkeys(place.file for place in places_of(tensors).values()))


def _mappings(addresses: Collection[int]) -> list[_Mapping]:
    """The private mappings of files in this process that some addresses lie in, in their order.

    Which of them were written to makes the system look at every page of every mapping, so it is asked only where there
    are any.
    """
    with open("/proc/self/maps") as table:
        ranges = [one for line in table if (one := _file_mapped_at(line))]
    starts, wanted = [each[0] for each in ranges], set[int]()
    for address in addresses:
        at = bisect_right(starts, address) - 1
        if at >= 0 and address < ranges[at][1]:
            wanted.add(starts[at])
    if not wanted:
        return []
    found: list[_Mapping] = []
    current: tuple[int, int, int, str] | None = None
    with open("/proc/self/smaps") as table:
        for line in table:
            if _RANGE.match(line):
                current = _file_mapped_at(line)
            elif current is not None and current[0] in wanted and line.startswith("Anonymous:"):
                found.append(_Mapping(*current, untouched=int(line.split()[1]) == 0))
    return [each for each in found if os.path.exists(each.path)]


def _file_mapped_at(line: str) -> tuple[int, int, int, str] | None:
    """Start, stop, offset and file of a private mapping, from a line of the system's table; None of another one."""
    if "/" not in line or not (match := _RANGE.match(line)):
        return None
    start, stop, rights, offset, inode, path = match.groups()
    of_file = path and inode != "0" and rights.endswith("p")
    return (int(start, 16), int(stop, 16), int(offset, 16), path) if of_file else None


class Reader:
    """Gives tensors of files as views that nobody else can write to: they take no memory until they are read.

    Each file is mapped once, privately.

    Args:
        files: that tensors will be read from.
    """

    def __init__(self, files: Iterable[MappedFile]):
        self.maps: Mapping[MappedFile, mmap.mmap] = {}
        for file in dict.fromkeys(files):
            file.check()
            with file.path.open("rb") as opened:
                self.maps[file] = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)

    def read(self, place: Place, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor of a file, whose storage is its own bytes alone.

        Raises:
            LoadError: where the file changed.
        """
        place.file.check()
        flat = torch.frombuffer(
            self.maps[place.file], dtype=dtype, count=math.prod(shape), offset=place.begin
        )
        return flat.view(shape)
