"""The header of a safetensors file, read and checked before the file is mapped or anything is allocated for it."""

from __future__ import annotations

import hashlib
import math
import os
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from surgery.disk.untrusted import (
    HEADER_BYTES,
    UnreadableError,
    as_mapping,
    open_regular,
    parse_json,
    shown,
    shown_text,
)

BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64, "C128": 128, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
"""Bits of an element, by the format's names of dtypes."""

MOST_AXES = 64  # what torch can hold


@dataclass(frozen=True)
class Header:
    """What the header of a safetensors file says.

    Attributes:
        tensors: dtype, in the format's words, and shape of each tensor by name.
        digest: of the header's bytes.
        metadata: texts by name.
        begins: where the bytes of each tensor begin in the file, by name.
    """

    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    digest: str
    metadata: Mapping[str, str] = field(default_factory=dict)
    begins: Mapping[str, int] = field(default_factory=dict)


def misnamed(path: Path) -> str:
    """What a file is whose name says another format than its first bytes, in words; empty where they agree.

    Args:
        path: of a regular file that could not be read by its name.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            first = file.read(9)
    except UnreadableError:
        return ""
    header = len(first) == 9 and first[8:] == b"{" and int.from_bytes(first[:8], "little") <= size - 8
    if header and path.suffix != ".safetensors":
        return f"is a safetensors file by what it holds: call it {path.stem}.safetensors"
    if path.suffix == ".safetensors" and first[:4] == b"PK\x03\x04":
        with suppress(zipfile.BadZipFile, OSError, ValueError), zipfile.ZipFile(path) as archive:
            arrays = any(name.endswith(".npy") for name in archive.namelist())
            writer, ending = ("numpy.savez", "npz") if arrays else ("torch.save", "pth")
            return f"is no safetensors file, but one that {writer} wrote: call it {path.stem}.{ending}"
    return ""


def parse_header(path: Path) -> Header:
    """Read and check the header of a safetensors file, without reading any tensor.

    Raises:
        UnreadableError: where it is no regular file, the header is none, a tensor's dtype is unknown, its shape does
            not take the bytes that it has, tensors overlap, or the file is shorter or longer than they say.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, HEADER_BYTES):
            raise UnreadableError(
                f"must begin with a header that fits into the file, but states {length:,} bytes of header in a file "
                f"of {size:,}"
            )
        raw = file.read(length)
    try:
        entries = dict(as_mapping(parse_json(raw)))
    except UnreadableError as error:
        raise UnreadableError(f"must begin with a safetensors header, but this {error}") from None
    metadata = entries.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise UnreadableError(f"must have texts as metadata, but has {shown(metadata)}")
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    ranges: list[tuple[int, int, str]] = []
    for name, entry in entries.items():
        dtype, shape, begin, end = _entry(name, entry)
        tensors[name] = dtype, shape
        ranges.append((begin, end, name))
    reach, last = 0, ""
    for begin, end, name in sorted(ranges):
        if begin < reach:
            raise UnreadableError(f"must have its tensors apart, but {shown(name)} overlaps {shown(last)}")
        reach, last = end, name
    if reach + length + 8 != size:
        raise UnreadableError(f"must have {reach + length + 8:,} bytes by its header, but has {size:,}")
    begins = {name: 8 + length + begin for begin, _, name in ranges}
    return Header(tensors, hashlib.sha256(raw).hexdigest()[:16], metadata, begins)


def _entry(name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    """Dtype, shape, and where the bytes of a tensor begin and end."""
    found = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = found.get("dtype"), found.get("shape"), found.get("data_offsets")
    if not (are_counts(shape) and are_counts(offsets) and len(offsets) == 2 and isinstance(dtype, str)):
        raise UnreadableError(
            f"must give every tensor dtype, shape and data_offsets, but says of {shown(name)} {shown(entry)}"
        )
    if dtype not in BITS:
        raise UnreadableError(
            f"must hold tensors of known dtypes, but {shown(name)} is of {shown_text(dtype, 40)}"
        )
    begin, end = offsets
    if (end - begin) * 8 != math.prod(shape) * BITS[dtype]:
        raise UnreadableError(
            f"must hold each tensor whole, but {shown(name)} of {dtype} {shown(shape)} has {end - begin:,} bytes"
        )
    return dtype, tuple(shape), begin, end


def are_counts(value: Any) -> TypeGuard[list[int]]:
    """Whether a value is a list of counts that can be a shape."""
    return (
        isinstance(value, list)
        and len(value) <= MOST_AXES
        and all(type(each) is int and 0 <= each < 1 << 53 for each in value)
    )
