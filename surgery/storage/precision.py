"""Precision: how a tensor is stored, in its own dtype, in bfloat16, or as 2 to 12-bit integers with a scale per group.

Integers of b bits are symmetric: `value = (code - 2^(b-1)) * scale`, one bfloat16 scale for each group of
neighbouring values along a row (first axis kept apart). The scale's sign and size are searched so that the squared
error is least; given codes q, the best scale is the projection <x, q> / <q, q>. Codes are packed without a gap as
bit planes of 8, 4, 2 and 1 bits.

Every function is pure; `decode(encode(x, p))` is the tensor that a model with that precision runs with.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from surgery.util.memory import compact, empty_large

LARGEST = 1e18  # magnitude from which squares overflow float32: such values, and NaN, have no projection and no scale
CHUNK = 1 << 20  # values handled at once while encoding: bounds the memory of the scale search
PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,), 10: (8, 2), 12: (8, 4)}
# By bits: the smallest scale tried, as a fraction of the one that clips nothing, and the number of steps down to it.
SEARCH = {2: (0.4, 9), 3: (0.65, 9), 4: (0.8, 9), 5: (0.85, 7), 6: (0.92, 7), 7: (0.95, 5), 8: (0.97, 5)}

DECODE_CHUNK = 1 << 18  # values decoded at once: what is between codes and values stays in the cache
# By bits of a plane: a word that holds as many bytes as a byte holds values, and shifts and masks that spread them.
_SPREAD = {
    4: (torch.int16, ((4, 0x0F0F),)),
    2: (torch.int32, ((12, 0x000F000F), (6, 0x03030303))),
    1: (torch.int64, ((28, 0x0000000F0000000F), (14, 0x0003000300030003), (7, 0x0101010101010101))),
}


@dataclass(frozen=True)
class Precision:
    """A way of storing a tensor: `bits` 0 is the tensor's own dtype, 16 is bfloat16, 2 to 8, 10 and 12 are grouped
    integers.

    Example:
        >>> str(Precision(4, 64)), Precision.parse("bfloat16")
        ('int4/64', Precision(bits=16, group=0))
    """

    bits: int = 0
    group: int = 0

    def __str__(self) -> str:
        return {0: "native", 16: "bfloat16"}.get(self.bits) or f"int{self.bits}/{self.group}"

    @classmethod
    def parse(cls, text: str) -> Precision:
        """Read what `str` wrote.

        Raises:
            ValueError: where the text names no precision.
        """
        if text in ("native", "bfloat16"):
            return cls(0 if text == "native" else 16)
        bits, _, group = text.removeprefix("int").partition("/")
        if not text.startswith("int") or int(bits) not in PLANES or int(group) < 1:
            raise ValueError(
                f"'{text}' is not a precision: native, bfloat16 or intB/GROUP with B of 2 to 8, 10 or 12"
            )
        return cls(int(bits), int(group))


NATIVE = Precision()
BFLOAT16 = Precision(16)


@dataclass(frozen=True)
class Encoded:
    """A stored tensor: its precision, what it decodes to, and the tensors that hold it."""

    precision: Precision
    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: Mapping[str, Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.numel() * part.element_size() for part in self.parts.values())


def is_tame(tensor: Tensor) -> bool:
    """Whether a tensor is of numbers that can be rounded and summed: real, finite and below `LARGEST`.

    Masks of -inf, sentinels such as 1e30, integers and float8 codes are not.

    Example:
        >>> is_tame(torch.ones(3)), is_tame(torch.tensor([0.0, -torch.inf])), is_tame(torch.arange(3))
        (True, False, False)
    """
    if not tensor.is_floating_point() or tensor.element_size() == 1:
        return False
    if not tensor.numel() or tensor.device.type == "meta":
        return True
    low, high = tensor.detach().aminmax()  # NaN where any value is
    return bool((low > -LARGEST) & (high < LARGEST))


def encode(tensor: Tensor, precision: Precision) -> Encoded:
    """Store `tensor` with `precision`; one that is not tame (see `is_tame`) is always kept as it is."""
    shape, dtype = tuple(tensor.shape), tensor.dtype
    tensor = tensor.detach()
    if precision.bits == 0 or tensor.numel() == 0 or not is_tame(tensor):
        return Encoded(NATIVE, shape, dtype, {"": tensor})
    if precision.bits == 16:
        return Encoded(precision, shape, dtype, {"bf16": tensor.bfloat16()})
    codes, scales = [], []
    for rows in _grouped(tensor, precision.group).split(max(1, CHUNK // _width(shape, precision.group))):
        code, scale = _quantise(rows.float(), precision.bits)
        codes.append(code)
        scales.append(scale)
    planes = _pack(torch.cat(codes).reshape(-1), precision.bits)
    return Encoded(precision, shape, dtype, {**planes, "scale": torch.cat(scales).reshape(-1)})


def decode(encoded: Encoded) -> Tensor:
    """The tensor that `encoded` stands for, in its dtype and shape, in a storage that holds nothing else."""
    parts, bits = encoded.parts, encoded.precision.bits
    if bits == 0:
        return compact(parts[""])
    if bits == 16:
        return compact(parts["bf16"].to(encoded.dtype))
    width = _width(encoded.shape, encoded.precision.group)
    scale = parts["scale"].float().unsqueeze(1)
    values = empty_large((scale.shape[0], width), encoded.dtype, scale.device)
    step = max(DECODE_CHUNK // (8 * width), 1) * 8  # groups: of all planes, each chunk is whole bytes
    for start in range(0, len(values), step):
        out = values[start : start + step]
        chunk = {f"q{p}": parts[f"q{p}"][start * width * p // 8 :] for p in PLANES[bits]}
        codes = _unpack(chunk, bits, out.numel()).sub(1 << (bits - 1))
        signed = (
            codes.view(torch.int8) if bits <= 8 else codes
        )  # unsigned bytes wrap around to the signed ones
        if encoded.dtype == torch.float32:  # the usual case, without a copy in between
            out.copy_(signed.view(-1, width)).mul_(scale[start : start + step])
            continue
        real = signed.view(-1, width).to(torch.float32).mul_(scale[start : start + step])
        out.copy_(real.clamp_(-65504.0, 65504.0) if encoded.dtype == torch.float16 else real)
    first, rest = _matrix(encoded.shape)
    # A single row stays contiguous without its padding: it is a view that only a copy makes shorter.
    return compact(values.view(first, -1)[:, :rest]).contiguous().view(encoded.shape)


def part_layout(
    shape: tuple[int, ...], dtype: torch.dtype, precision: Precision
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of every part that `encode` makes of such a tensor, without encoding it.

    Example:
        >>> part_layout((3, 8), torch.float32, Precision(6, 4))
        {'q4': (torch.uint8, (12,)), 'q2': (torch.uint8, (6,)), 'scale': (torch.bfloat16, (6,))}
    """
    numel = math.prod(shape)
    if not dtype.is_floating_point or precision.bits == 0 or numel == 0:
        return {"": (dtype, shape)}
    if precision.bits == 16:
        return {"bf16": (torch.bfloat16, shape)}
    first, rest = _matrix(shape)
    width = _width(shape, precision.group)
    groups = first * -(-rest // width)
    planes = {f"q{p}": (torch.uint8, (-(-groups * width * p // 8),)) for p in PLANES[precision.bits]}
    return {**planes, "scale": (torch.bfloat16, (groups,))}


def stored_bytes(shape: tuple[int, ...], dtype: torch.dtype, precision: Precision) -> int:
    """Bytes that `encode` of such a tensor takes, without encoding it."""
    layout = part_layout(shape, dtype, precision).values()
    return sum(math.prod(size) * kind.itemsize for kind, size in layout)


def take_rows(encoded: Encoded, rows: Tensor) -> Encoded:
    """The stored form of `decode(encoded)[rows]`, without encoding anew: groups never reach over a row.

    Args:
        encoded: of a tensor of at least two axes, or of any number where it is not held as integers.
        rows: int64 `[R]`, numbers along the first axis.

    Raises:
        ValueError: for a vector held as integers, which is one row.
    """
    shape, bits = (len(rows), *encoded.shape[1:]), encoded.precision.bits
    if bits in (0, 16):
        return Encoded(
            encoded.precision, shape, encoded.dtype, {name: p[rows] for name, p in encoded.parts.items()}
        )
    if len(encoded.shape) < 2:
        raise ValueError(
            f"a vector of {math.prod(encoded.shape)} held as {encoded.precision} has no rows to take"
        )
    scale = encoded.parts["scale"]
    groups = scale.numel() // encoded.shape[0]
    width = _width(encoded.shape, encoded.precision.group)
    codes = _unpack(encoded.parts, bits, scale.numel() * width).view(encoded.shape[0], -1)[rows]
    parts = {**_pack(codes.reshape(-1), bits), "scale": scale.view(-1, groups)[rows].reshape(-1)}
    return Encoded(encoded.precision, shape, encoded.dtype, parts)


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns under which a tensor is grouped: a vector is one row."""
    return (1, shape[0]) if len(shape) == 1 else (shape[0], math.prod(shape[1:])) if shape else (1, 1)


def _width(shape: tuple[int, ...], group: int) -> int:
    return min(group, _matrix(shape)[1])


def _grouped(tensor: Tensor, group: int) -> Tensor:
    """`tensor` as `[groups, width]`, rows padded with zeros to whole groups."""
    first, rest = _matrix(tuple(tensor.shape))
    width = min(group, rest)
    rows = tensor.reshape(first, rest)
    if rest % width:
        rows = torch.nn.functional.pad(rows, (0, -rest % width))
    return rows.reshape(-1, width)


def _quantise(groups: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes (`[G, width]`, uint8 or int16) and bfloat16 scales `[G]` of least squared error among the candidates."""
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    largest = groups.gather(1, groups.abs().argmax(1, keepdim=True))
    groups = groups * _inverse(largest)  # to at most 1, so that no square overflows; the largest value is +1
    best_gain, best = torch.full_like(largest, -1.0), torch.zeros_like(largest)
    smallest, steps = SEARCH.get(bits, (1.0, 1))  # finer codes lose next to nothing at their full range
    for end in (low, high) if bits in SEARCH else (low,):
        for step in range(steps):
            shrink = 1.0 - (1.0 - smallest) * step / max(steps - 1, 1)
            q = (
                (groups * (end / shrink)).round_().clamp_(low, high)
            )  # which end takes the largest decides the sign
            xq, qq = (groups * q).sum(1, keepdim=True), (q * q).sum(1, keepdim=True)
            gain = xq * xq * _inverse(qq)  # |x|^2 minus the error left by the projection
            better = gain > best_gain
            best_gain = torch.where(better, gain, best_gain)
            best = torch.where(better, xq * _inverse(qq), best)
    scale = (best * largest).to(torch.bfloat16)
    q = (groups * (largest * _inverse(scale.float()))).round_().clamp_(low, high)
    return (q - low).to(torch.uint8 if bits <= 8 else torch.int16), scale.squeeze(1)


def _inverse(x: Tensor) -> Tensor:
    """1/x, and 0 where x is 0 or so small that 1/x is infinite."""
    inverse = x.reciprocal()
    return torch.where(inverse.isfinite(), inverse, torch.zeros_like(inverse))


def _pack(codes: Tensor, bits: int) -> dict[str, Tensor]:
    """Bit planes of a flat tensor of codes, lowest bits first, each packed to whole bytes."""
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


def _unpack(parts: Mapping[str, Tensor], bits: int, count: int) -> Tensor:
    """The inverse of `_pack`."""
    codes, shift = None, 0
    for plane in PLANES[bits]:
        values = _spread(parts[f"q{plane}"][: -(-count * plane // 8)], plane)[:count]
        values = values if bits <= 8 else values.to(torch.int16)
        values = values << shift if shift else values
        codes = values if codes is None else codes | values
        shift += plane
    assert codes is not None
    return codes


def _spread(packed: Tensor, plane: int) -> Tensor:
    """Each value of `plane` bits in a byte of its own, the lowest first.

    The bytes are spread inside wider integers, halving the distance each time: a few passes over whole words,
    where a shift for every value would go byte by byte. Words are little-endian, as wherever torch runs.
    """
    if plane == 8:
        return packed
    word, steps = _SPREAD[plane]
    words = packed.to(word, memory_format=torch.contiguous_format)
    for distance, mask in steps:
        words.bitwise_or_(words << distance).bitwise_and_(mask)
    return words.view(torch.uint8)
