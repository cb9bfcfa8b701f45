"""Gathered tensors: many small ones as one tensor of bytes, with their names deflated in the header of its file.

A safetensors header takes some 80 bytes for each tensor. Of what a small member has of its own that is as much as the
tensors. A file of one tensor of bytes, `data`, takes that once; what lies in it, name, dtype and shape of each, one
behind the other, is said by a note in its header, so that a digest of the header covers it.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surgery.disk.untrusted import UnreadableError, parse_json, shown
from surgery.safetensors.dtypes import file_dtypes, known_dtypes
from surgery.safetensors.header import are_counts
from surgery.safetensors.writing import in_order, write_aligned

DATA, NOTE = "data", "gathered"  # the one tensor, and the note in the header
ENTRY = 80  # bytes of a tensor's entry in a header, about
SHARE = 200  # names are deflated where they would take more than this part of a file
MOST = 1 << 24  # bytes of such a file: what is read from it is copied, not mapped
LEAST = 24  # tensors of a file from which that is done
INDEX_BYTES = 1 << 26  # of an inflated note


def pays(tensors: Mapping[str, Tensor]) -> bool:
    """Whether names would take much of a file of these tensors.

    Example:
        >>> small = {f"layer.{n}.bias": torch.zeros(8) for n in range(30)}
        >>> pays(small), pays({name: torch.zeros(8192) for name in small})
        (True, False)
    """
    return names_weigh(len(tensors), sum(t.nbytes for t in tensors.values()))


def names_weigh(count: int, nbytes: int, *, alone: bool = True) -> bool:
    """Whether the names of so many tensors would take much of a file of so many bytes.

    Args:
        count: of tensors.
        nbytes: of all of them.
        alone: whether a file has no others.
    """
    return (count >= LEAST or not alone) and nbytes <= min(SHARE * ENTRY * count, MOST)


def write_gathered(path: Path, tensors: Mapping[str, Tensor], digest: Any = None) -> None:
    """Write a file of gathered tensors.

    Args:
        path: of the file.
        tensors: by name, of dtypes that the format knows.
        digest: of `hashlib`, which is given what is written.
    """
    names, order = known_dtypes(), in_order([(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()])
    index = json.dumps(
        [[name, names[dtype], list(shape)] for name, dtype, shape in order],
        separators=(",", ":"),
        ensure_ascii=False,
    )
    note = base64.b85encode(zlib.compress(index.encode(), 9)).decode("ascii")
    parts = [tensors[name].detach().cpu().resolve_conj().resolve_neg() for name, *_ in order]
    data = torch.cat([part.contiguous().reshape(-1).view(torch.uint8) for part in parts if part.numel()])
    write_aligned(path, {DATA: data}, {NOTE: note}, digest)


def spread(data: Tensor, note: str) -> dict[str, Tensor]:
    """The tensors that a file of gathered ones holds, on its memory.

    Args:
        data: uint8 `[bytes]`.
        note: of the file's header.

    Raises:
        UnreadableError: where the note is none, or does not describe the data.
    """
    found: dict[str, Tensor] = {}
    at = 0
    for entry in _entries(note):
        name, dtype, shape = _entry(entry)
        end = at + dtype.itemsize * math.prod(shape)
        if name in found or end > len(data):
            raise UnreadableError(f"must hold each gathered tensor once and whole, but not {shown(name)}")
        piece = data[at:end]
        if dtype != torch.uint8:
            piece = (piece if piece.data_ptr() % dtype.itemsize == 0 else piece.clone()).view(dtype)
        found[name], at = piece.view(shape), end
    if at != len(data):
        raise UnreadableError(f"must say what all of its {len(data):,} bytes are, but says it of {at:,}")
    return found


def _entries(note: str) -> list[Any]:
    """What a note says, of each tensor."""
    inflate = zlib.decompressobj()
    try:
        raw = inflate.decompress(base64.b85decode(note), INDEX_BYTES)
    except (ValueError, binascii.Error, zlib.error) as error:
        raise UnreadableError(
            f"must have a deflated list of its tensors in its header, but {error}"
        ) from None
    if not inflate.eof or inflate.unused_data:
        raise UnreadableError(f"must have a whole list of its tensors of at most {INDEX_BYTES:,} bytes")
    found = parse_json(raw)
    if not isinstance(found, list):
        raise UnreadableError(f"must have a list of its tensors in its header, but has {shown(found)}")
    return found


def _entry(entry: Any) -> tuple[str, torch.dtype, tuple[int, ...]]:
    """Name, dtype and shape of a tensor."""
    if isinstance(entry, list) and len(entry) == 3 and isinstance(entry[0], str) and are_counts(entry[2]):
        dtype = file_dtypes().get(entry[1]) if isinstance(entry[1], str) else None
        if dtype is not None:
            return entry[0], dtype, tuple(entry[2])
    raise UnreadableError(
        f"must give every gathered tensor a name, a dtype and a shape, but says {shown(entry)}"
    )
