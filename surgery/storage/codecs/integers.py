"""The codec of grouped integers: 2 to 8, 10 or 12 bits for each value, and a scale for each group of values.

Integers of b bits are symmetric: `value = (code - 2^(b-1)) * scale`, one bfloat16 scale for each group of
neighbouring values along a row (first axis kept apart). Codes are packed without a gap as bit planes of 8, 4, 2 and 1
bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from surgery.storage.codecs.bfloat16 import joined_bytes, split_bytes
from surgery.storage.codecs.codec import Codec, Encoded, Layout, Precision, Statistics
from surgery.storage.codecs.feedback import Inputs, Rounded, feed_back
from surgery.storage.codecs.grids import IntegerGrid, at_once, grid_of
from surgery.storage.codecs.planes import PLANES, apart, joined, pack, planes_of, together, unpack
from surgery.storage.codecs.two_sided import Outputs, feed_back_both
from surgery.util.memory import compact, empty_large

CHUNK = 1 << 20  # values handled at once while encoding: bounds its memory
FED_BACK = 1 << 21  # likewise with error feedback, where each column takes calls of its own
BOTH_SIDES = 1 << 23  # values of a matrix whose rows, too, take errors back; they are worked on all at once
DECODE_CHUNK = 1 << 18  # values decoded at once: what is between codes and values stays in the cache

GROUP = 64  # values to one scale in a fit's ladder
MATRICES, VECTORS = (12, 10, 8, 7, 6, 5, 4, 3, 2), (12, 8)  # bits that a fit tries


@dataclass(frozen=True)
class Grouping:
    """Bits of each value, and how many neighbouring values have one scale."""

    bits: int
    group: int


def grouped(bits: int, group: int) -> Precision:
    """The precision of grouped integers.

    Args:
        bits: of each value: 2 to 8, 10 or 12.
        group: number of neighbouring values to one scale.

    Example:
        >>> str(grouped(4, 64))
        'int4/64'
    """
    return Precision(Integers.name, Grouping(bits, group))


class Integers(Codec[Grouping]):
    """Integers with a scale for each group of values along a row."""

    name = "int"
    form = "intB/GROUP with B of 2 to 8, 10 or 12"

    def encode(
        self, tensor: Tensor, settings: Grouping, statistics: Statistics | None = None
    ) -> Mapping[str, Tensor]:
        """Bit planes `q8`, `q4`, `q2`, `q1` of the codes, as many as the bits need, and `scale`."""
        width = _width(tuple(tensor.shape), settings.group)
        if fits(tensor, statistics):
            assert statistics is not None
            pairs = _with_feedback(tensor, statistics, width, settings.bits)
        else:
            pairs = [
                _quantise(rows.float(), settings.bits)
                for rows in _grouped(tensor, settings.group).split(max(1, at_once(CHUNK, tensor) // width))
            ]
        codes, scales = (torch.cat(each).reshape(-1) for each in zip(*pairs, strict=True))
        return {**pack(codes, settings.bits), "scale": scales}

    def encode_together(
        self, tensors: Sequence[Tensor], settings: Sequence[Grouping], statistics: Statistics | None
    ) -> list[Mapping[str, Tensor]]:
        """Rows of all widths in one pass over the columns, where errors are fed back."""
        alike = len({each.group for each in settings}) == 1
        if not alike or statistics is None or not all(fits(each, statistics) for each in tensors):
            return super().encode_together(tensors, settings, statistics)
        assert statistics.second_moment is not None
        width = _width(tuple(tensors[0].shape), settings[0].group)
        rows = torch.cat([_columns(each, width) for each in tensors])
        inputs = Inputs.of(_padded(statistics.second_moment, width))
        counts, bits = [len(each) for each in tensors], [each.bits for each in settings]
        widths = torch.cat(
            [torch.full((n, 1), own, device=rows.device) for n, own in zip(counts, bits, strict=True)]
        )

        def grid(groups: Tensor) -> IntegerGrid:
            each = [grid_of(part, own) for part, own in zip(groups.split(counts), bits, strict=True)]
            return IntegerGrid(
                torch.cat([one.largest for one in each]), torch.cat([one.scale for one in each]), widths
            )

        found = feed_back(rows, inputs, width, grid)
        scale = _scales(found, rows).view(len(rows), -1)
        return [
            {**pack(_stored(codes, own).reshape(-1), own), "scale": scales.reshape(-1)}
            for codes, scales, own in zip(found.codes.split(counts), scale.split(counts), bits, strict=True)
        ]

    def decode(self, encoded: Encoded) -> Tensor:
        """Codes times their group's scale."""
        parts, settings = encoded.parts, encoded.precision.settings

        def codes(start: int, stop: int) -> Tensor:  # chunks begin at whole bytes of all planes
            chunk = {f"q{p}": parts[f"q{p}"][start * p // 8 :] for p in PLANES[settings.bits]}
            return unpack(chunk, settings.bits, stop - start)

        return _decode(codes, parts["scale"], encoded.shape, encoded.dtype, settings)

    def decoder(self, encoded: Encoded) -> Callable[[], Tensor]:
        """As `decode`, which for a few values spends most of its time on views and on calls."""
        bits, shape = encoded.precision.settings.bits, encoded.shape
        width = _width(shape, encoded.precision.settings.group)
        scale = encoded.parts["scale"]
        count = scale.numel() * width
        few = count <= at_once(DECODE_CHUNK, scale)
        if encoded.dtype != torch.float32 or count != math.prod(shape) or not few:
            return super().decoder(encoded)
        planes, scale = planes_of(encoded.parts, bits, count), scale.view(-1, 1)
        half = float(1 << (bits - 1))

        def again() -> Tensor:
            codes = joined(planes, bits, count).view(-1, width)
            return codes.to(torch.float32).sub_(half).mul_(scale).view(shape)  # each exact but the last

        return again

    def layout(self, shape: tuple[int, ...], dtype: torch.dtype, settings: Grouping) -> Layout:
        """Whole bytes for each plane, and bfloat16 scales."""
        first, rest = _matrix(shape)
        width = _width(shape, settings.group)
        groups = first * -(-rest // width)
        planes = {f"q{p}": (torch.uint8, (-(-groups * width * p // 8),)) for p in PLANES[settings.bits]}
        return {**planes, "scale": (torch.bfloat16, (groups,))}

    def take_rows(self, encoded: Encoded, rows: Tensor) -> Mapping[str, Tensor]:
        """Bytes of rows as they are where rows are whole bytes; else codes unpacked and packed again."""
        if len(encoded.shape) < 2:
            raise ValueError(
                f"a vector of {math.prod(encoded.shape)} held as {encoded.precision} has no rows to take"
            )
        bits, scale = encoded.precision.settings.bits, encoded.parts["scale"]
        groups = scale.numel() // encoded.shape[0]
        width = _width(encoded.shape, encoded.precision.settings.group)
        taken = scale.view(-1, groups)[rows].reshape(-1)
        if all(groups * width * plane % 8 == 0 for plane in PLANES[bits]):
            planes = {f"q{plane}": encoded.parts[f"q{plane}"] for plane in PLANES[bits]}
            count = encoded.shape[0]
            return {
                **{q: each.view(count, -1)[rows].reshape(-1) for q, each in planes.items()},
                "scale": taken,
            }
        codes = unpack(encoded.parts, bits, scale.numel() * width).view(encoded.shape[0], -1)[rows]
        return {**pack(codes.reshape(-1), bits), "scale": taken}

    def stack_rows(self, encoded: Sequence[Encoded]) -> Mapping[str, Tensor]:
        """Bytes of rows as they are where each tensor is whole bytes; else codes unpacked and packed again."""
        if any(len(each.shape) < 2 for each in encoded):
            raise ValueError("vectors have no rows to stack")
        bits, width = (
            encoded[0].precision.settings.bits,
            _width(encoded[0].shape, encoded[0].precision.settings.group),
        )
        scale = torch.cat([each.parts["scale"] for each in encoded])
        counts = [each.parts["scale"].numel() * width for each in encoded]
        if all(count * plane % 8 == 0 for count in counts for plane in PLANES[bits]):
            names = [f"q{plane}" for plane in PLANES[bits]]
            return {**{q: torch.cat([each.parts[q] for each in encoded]) for q in names}, "scale": scale}
        codes = torch.cat(
            [unpack(each.parts, bits, count) for each, count in zip(encoded, counts, strict=True)]
        )
        return {**pack(codes, bits), "scale": scale}

    def has_streams(self, settings: Grouping) -> bool:
        """Codes near zero are the most frequent ones."""
        return True

    def streams(self, encoded: Encoded) -> list[Tensor]:
        """Codes, as many in a byte as fit; those of more than a byte by planes. Then both bytes of the scales."""
        bits, parts = encoded.precision.settings.bits, encoded.parts
        codes = [parts[f"q{plane}"] for plane in PLANES[bits]]
        if len(codes) > 1 and bits < 8:
            width = _width(encoded.shape, encoded.precision.settings.group)
            codes = [together(unpack(parts, bits, parts["scale"].numel() * width), bits)]
        return [*codes, *split_bytes(parts["scale"])]

    def stream_sizes(self, shape: tuple[int, ...], dtype: torch.dtype, settings: Grouping) -> list[int]:
        """Of codes or their planes, and a byte for each scale in both of the last."""
        (*planes, (_, (groups,))) = self.layout(shape, dtype, settings).values()
        codes = [size for _, (size,) in planes]
        if len(codes) > 1 and settings.bits < 8:
            codes = [-(-groups * _width(shape, settings.group) // (8 // settings.bits))]
        return [*codes, groups, groups]

    def from_streams(
        self, streams: Sequence[Tensor], shape: tuple[int, ...], dtype: torch.dtype, settings: Grouping
    ) -> Mapping[str, Tensor]:
        """Planes and scales."""
        *codes, low, high = streams
        if len(codes) == 1 and len(PLANES[settings.bits]) > 1:
            count = len(low) * _width(shape, settings.group)
            planes = pack(apart(codes[0], settings.bits)[:count], settings.bits)
        else:
            planes = {f"q{plane}": each for plane, each in zip(PLANES[settings.bits], codes, strict=True)}
        return {**planes, "scale": joined_bytes(low, high)}

    def decode_streams(
        self, streams: Sequence[Tensor], shape: tuple[int, ...], dtype: torch.dtype, settings: Grouping
    ) -> Tensor:
        """As `decode`, without planes in between."""
        *codes, low, high = streams
        each, scale = max(8 // settings.bits, 1), joined_bytes(low, high)
        if len(codes) > 1 or len(PLANES[settings.bits]) == 1:
            return super().decode_streams(streams, shape, dtype, settings)
        if fault := self.fault({"scale": scale}):
            raise ValueError(fault)

        def few(start: int, stop: int) -> Tensor:
            return apart(codes[0][start // each : -(-stop // each)], settings.bits)[: stop - start]

        return _decode(few, scale, shape, dtype, settings)

    def write(self, settings: Grouping) -> str:
        """Bits and group: `4/64`."""
        return f"{settings.bits}/{settings.group}"

    def read(self, text: str) -> Grouping:
        """The inverse of `write`."""
        bits, _, group = text.partition("/")
        if int(bits) not in PLANES or int(group) < 1:
            raise ValueError(f"'{text}' must be B/GROUP with B of 2 to 8, 10 or 12")
        return Grouping(int(bits), int(group))

    def ladder(self, tensors: Sequence[Tensor]) -> tuple[Grouping, ...]:
        """All widths for matrices; vectors take little room and are kept fine."""
        matrices = any(tensor.ndim > 1 and tensor.numel() >= GROUP for tensor in tensors)
        return tuple(Grouping(bits, GROUP) for bits in (MATRICES if matrices else VECTORS))

    def span(self, settings: Grouping) -> int:
        """A group."""
        return settings.group

    def fault(self, parts: Mapping[str, Tensor]) -> str:
        """Scales must be finite."""
        return "" if bool(parts["scale"].isfinite().all()) else "scales that are NaN or infinite"


def _decode(
    codes: Callable[[int, int], Tensor],
    scale: Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    settings: Grouping,
) -> Tensor:
    """Codes times their group's scale; `codes` gives some of them, the first and one past the last asked for."""
    bits, width = settings.bits, _width(shape, settings.group)
    scale = scale.float().unsqueeze(1)
    values = empty_large((scale.shape[0], width), dtype, scale.device)
    # Groups at a time: of all planes, each chunk is whole bytes.
    step = max(at_once(DECODE_CHUNK, scale) // (8 * width), 1) * 8
    for start in range(0, len(values), step):
        out = values[start : start + step]
        part = codes(start * width, start * width + out.numel()).sub(1 << (bits - 1))
        # Unsigned bytes wrap around to the signed ones.
        signed = part.view(torch.int8) if bits <= 8 else part
        if dtype == torch.float32:  # the usual case, without a copy in between
            out.copy_(signed.view(-1, width)).mul_(scale[start : start + step])
            continue
        real = signed.view(-1, width).to(torch.float32).mul_(scale[start : start + step])
        out.copy_(real.clamp_(-65504.0, 65504.0) if dtype == torch.float16 else real)
    first, rest = _matrix(shape)
    # A single row stays contiguous without its padding: it is a view that only a copy makes shorter.
    return compact(values.view(first, -1)[:, :rest]).contiguous().view(shape)


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


def fits(tensor: Tensor, statistics: Statistics | None) -> bool:
    """Whether statistics are of the inputs of a tensor's rows, flattened: of a linear map or a convolution."""
    columns = _matrix(tuple(tensor.shape))[1]
    moment = None if statistics is None else statistics.second_moment
    return moment is not None and tensor.ndim > 1 and moment.shape == (columns, columns)


def fits_outputs(tensor: Tensor, statistics: Statistics | None) -> bool:
    """Whether errors are fed back along rows as well: G is that of a tensor's rows, and says that they are coupled."""
    moment = None if statistics is None else statistics.outputs
    if moment is None or not fits(tensor, statistics) or tensor.numel() > BOTH_SIDES:
        return False
    return moment.shape == (len(tensor),) * 2 and not torch.equal(moment, moment.diagonal().diag())


def _with_feedback(tensor: Tensor, known: Statistics, width: int, bits: int) -> list[tuple[Tensor, Tensor]]:
    """Codes `[r * groups, width]` and scales `[r * groups]` of some rows after others, whose errors are fed back."""
    assert known.second_moment is not None
    rows, inputs = _columns(tensor, width), Inputs.of(_padded(known.second_moment, width))
    if fits_outputs(tensor, known):
        assert known.outputs is not None
        grids = partial(grid_of, bits=bits)
        codes, scale = feed_back_both(rows, inputs, Outputs.of(known.outputs), width, grids)
        return [(_stored(codes, bits).view(-1, width), scale.to(torch.bfloat16).reshape(-1))]
    parts = rows.split(max(1, at_once(FED_BACK, rows) // rows.shape[1]))
    return [_fed_back(part, inputs, width, bits) for part in parts]


def _fed_back(rows: Tensor, inputs: Inputs, width: int, bits: int) -> tuple[Tensor, Tensor]:
    """Codes `[R * groups, width]` and scales `[R * groups]` of rows whose errors are fed back."""
    found = feed_back(rows, inputs, width, lambda groups: grid_of(groups, bits))
    return _stored(found.codes, bits).view(-1, width), _scales(found, rows).reshape(-1)


def _scales(found: Rounded, rows: Tensor) -> Tensor:
    """Of each row and group, bfloat16 `[R, groups]`."""
    ones = torch.ones_like(rows[:, :1])
    return torch.cat([grid.values(ones) for grid in found.grids], 1).to(torch.bfloat16)


def _columns(tensor: Tensor, width: int) -> Tensor:
    """`tensor` as float32 `[rows, n]`, with zeros to whole groups."""
    return _grouped(tensor, width).view(len(tensor), -1).float()


def _padded(moment: Tensor, width: int) -> Tensor:
    """`moment` as float32, with zeros for the columns that fill up the last group."""
    more = -len(moment) % width
    return torch.nn.functional.pad(moment.float(), (0, more, 0, more))


def _quantise(groups: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes (`[G, width]`, uint8 or int16) and bfloat16 scales `[G]` of least squared error among the candidates."""
    grid = grid_of(groups, bits)
    return _stored(grid.codes(groups), bits), grid.scale.squeeze(1)


def _stored(codes: Tensor, bits: int) -> Tensor:
    """Codes as they are packed: from 0, uint8 or int16."""
    return (codes + (1 << (bits - 1))).to(torch.uint8 if bits <= 8 else torch.int16)


def grouping_of(encoded: Encoded) -> Grouping | None:
    """Bits and group of a tensor that is stored as integers of one width; None of any other.

    Example:
        >>> from surgery.storage.codecs import encode
        >>> grouping_of(encode(torch.ones(2, 8), grouped(4, 64)))
        Grouping(bits=4, group=8)
    """
    if encoded.precision.name != Integers.name:
        return None
    how: Grouping = encoded.precision.settings
    return Grouping(how.bits, _width(encoded.shape, how.group))


def codes_of(encoded: Encoded, bits: int) -> tuple[Tensor, Tensor]:
    """The integers and scales that hold a matrix: `value = (code - 2^(bits-1)) * scale`.

    Args:
        encoded: grouped integers of at most 8 bits, of a tensor of at least two axes.
        bits: of the codes, at least as many as it has.

    Returns:
        codes `[rows, groups * width]`, uint8, zeros that fill up the last group of a row included; scales
        `[rows, groups]`, bfloat16.
    """
    scale, rows, own = encoded.parts["scale"], encoded.shape[0], encoded.precision.settings.bits
    width = _width(encoded.shape, encoded.precision.settings.group)
    codes = unpack(encoded.parts, own, scale.numel() * width).view(rows, -1)
    return codes + ((1 << (bits - 1)) - (1 << (own - 1))), scale.view(rows, -1)


def in_bytes(encoded: Encoded) -> Encoded:
    """The same values with a byte for each code, where codes of fewer bits lie in planes.

    Args:
        encoded: grouped integers of at most 8 bits.

    Example:
        >>> from surgery.storage.codecs import encode
        >>> str(in_bytes(encode(torch.ones(2, 8), grouped(7, 64))).precision)
        'int8/64'
    """
    how: Grouping = encoded.precision.settings
    scale = encoded.parts["scale"]
    codes = unpack(encoded.parts, how.bits, scale.numel() * _width(encoded.shape, how.group))
    wide = codes + (128 - (1 << (how.bits - 1)))
    return replace(encoded, precision=grouped(8, how.group), parts={"q8": wide.contiguous(), "scale": scale})
