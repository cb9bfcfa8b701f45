"""Bit planes: codes of b bits packed without a gap, as planes of 8, 4, 2 and 1 bits of each code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,), 10: (8, 2), 12: (8, 4)}
"""Bits of each plane by the bits of a code, the lowest first."""

# A plane of halves: a word that holds as many bytes as a byte holds values, shifts and masks that spread them.
_SPREAD = {4: (torch.int16, ((4, 0x0F0F),))}
# Codes packed at once, whole bytes of every plane: what is between takes several times their memory.
AT_ONCE = 1 << 20
LOOKED_UP = 1 << 14  # bytes of halves below which a lookup takes less than several passes


def pack(codes: Tensor, bits: int) -> dict[str, Tensor]:
    """Bit planes of a flat tensor of codes, lowest bits first, each packed to whole bytes."""
    at_once = AT_ONCE if codes.device.type == "cpu" else max(1, codes.numel())
    pieces = [_pack(piece, bits) for piece in codes.split(at_once)]
    return {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}


def _pack(codes: Tensor, bits: int) -> dict[str, Tensor]:
    planes: dict[str, Tensor] = {}
    shift = 0
    for plane in PLANES[bits]:
        values, per_byte = ((codes >> shift) & ((1 << plane) - 1)).to(torch.uint8), 8 // plane
        values = torch.nn.functional.pad(values, (0, -values.numel() % per_byte)).view(-1, per_byte)
        packed = values[:, 0].clone()
        for slot in range(1, per_byte):
            packed |= values[:, slot] << (slot * plane)
        planes[f"q{plane}"] = packed
        shift += plane
    return planes


def together(codes: Tensor, bits: int) -> Tensor:
    """Codes of up to 7 bits, as many in a byte as fit, the first lowest."""
    each = 8 // bits
    codes = torch.nn.functional.pad(codes, (0, -codes.numel() % each)).view(-1, each)
    found = codes[:, 0].clone()
    for slot in range(1, each):
        found |= codes[:, slot] << (slot * bits)
    return found


def apart(found: Tensor, bits: int) -> Tensor:
    """The inverse of `together`, up to codes that fill up the last byte."""
    each = 8 // bits
    if each == 1:
        return found
    return torch.stack([(found >> (slot * bits)) & ((1 << bits) - 1) for slot in range(each)], 1).view(-1)


def unpack(parts: Mapping[str, Tensor], bits: int, count: int) -> Tensor:
    """The inverse of `pack`."""
    return joined(planes_of(parts, bits, count), bits, count)


def planes_of(parts: Mapping[str, Tensor], bits: int, count: int) -> list[tuple[Tensor, int]]:
    """The bytes of each plane that hold the first values, with the plane's bits."""
    return [(parts[f"q{plane}"][: -(-count * plane // 8)], plane) for plane in PLANES[bits]]


def joined(planes: Sequence[tuple[Tensor, int]], bits: int, count: int) -> Tensor:
    """Codes of planes; of whole bytes alone they are the plane itself."""
    codes, shift = None, 0
    for packed, plane in planes:
        values = _spread(packed, plane, shift if bits <= 8 else 0)
        values = values if values.shape[0] == count else values[:count]
        values = values if bits <= 8 else values.to(torch.int16).bitwise_left_shift_(shift)
        codes = values if codes is None else codes.bitwise_or_(values)
        shift += plane
    assert codes is not None
    return codes


def _spread(packed: Tensor, plane: int, shift: int = 0) -> Tensor:
    """Each value of `plane` bits in a byte of its own, the lowest first, `shift` bits higher.

    A table has for each byte the word of its values, so that this is one lookup. Many halves of bytes are spread faster
    inside wider integers: a few passes over whole words, where a shift for every value would go byte by byte. Words
    are little-endian, as wherever torch runs.
    """
    if plane == 8:
        return packed
    if plane < 4 or shift or packed.shape[0] < LOOKED_UP:
        table = _table(plane, shift, packed.device)
        return table.index_select(0, packed.to(torch.int32)).view(torch.uint8)
    word, steps = _SPREAD[plane]
    words = packed.to(word, memory_format=torch.contiguous_format)
    for distance, mask in steps:
        words.bitwise_or_(words << distance).bitwise_and_(mask)
    return words.view(torch.uint8)


@cache
def _table(plane: int, shift: int, device: torch.device) -> Tensor:
    """For each byte the values in it as the bytes of a word `[256]`."""
    slots = np.arange(8 // plane) * plane
    values = ((np.arange(256)[:, None] >> slots) & ((1 << plane) - 1)) << shift
    words = values.astype(np.uint8).view(f"<i{len(slots)}").reshape(-1)
    with torch.inference_mode(False):
        return torch.from_numpy(words).to(device)
