"""Encoding and decoding with any registered codec: what the rest of the package calls.

Every function is pure; `decode(encode(x, p))` is the tensor that a model with that precision runs with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from surgery.handles.handle import Handle
from surgery.storage.codecs.codec import ANY_LENGTH, CODECS, NATIVE, Encoded, Layout, Precision, Statistics
from surgery.storage.codecs.huffman import Huffman

LARGEST = 1e18  # magnitude from which squares overflow float32: such values, and NaN, have no projection and no scale


def is_tame(tensor: Tensor) -> bool:
    """Whether a tensor is of elements that can be rounded and summed: real, finite and below `LARGEST`.

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


def always_native(shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether every tensor of this shape and dtype is stored natively: without axes, empty, or of no floating dtype."""
    return not shape or not math.prod(shape) or not dtype.is_floating_point


def stored_precision(tensor: Tensor, precision: Precision) -> Precision:
    """The precision that `encode` stores a tensor with where it is asked for `precision`."""
    if precision.is_native or always_native(tuple(tensor.shape), tensor.dtype) or not is_tame(tensor):
        return NATIVE
    return precision


@dataclass(frozen=True)
class Encoding:
    """A tensor in a precision, encoded when it is asked for.

    Attributes:
        precision: of the tensor.
        encode: encodes it; gives the same `Encoded` each time.
    """

    precision: Precision
    encode: Callable[[], Encoded]


def encode(tensor: Tensor, precision: Precision, statistics: Statistics | None = None) -> Encoded:
    """Store a tensor.

    Args:
        tensor: any; one that has no axes, is empty or is not tame (see `is_tame`) is always stored natively.
        precision: how to store it.
        statistics: of its inputs, for codecs that make use of them.
    """
    precision, tensor = stored_precision(tensor, precision), tensor.detach()
    parts = precision.codec.encode(tensor, precision.settings, statistics)
    return Encoded(precision, tuple(tensor.shape), tensor.dtype, parts)


def encode_together(
    tensors: Sequence[Tensor], precisions: Sequence[Precision], statistics: Statistics | None
) -> list[Encoded]:
    """Store rows whose inputs are the same: about what `encode` makes of each, in the time of one.

    Args:
        tensors: `[R, n]` of one n.
        precisions: of each.
        statistics: of the inputs of all.
    """
    tensors = [each.detach() for each in tensors]
    stored = [stored_precision(*each) for each in zip(tensors, precisions, strict=True)]
    found: dict[int, Mapping[str, Tensor]] = {}
    for name in dict.fromkeys(each.name for each in stored):
        own = [number for number, each in enumerate(stored) if each.name == name]
        settings = [stored[number].settings for number in own]
        parts = CODECS[name].encode_together([tensors[number] for number in own], settings, statistics)
        found.update(zip(own, parts, strict=True))
    return [
        Encoded(precision, tuple(tensor.shape), tensor.dtype, found[number])
        for number, (precision, tensor) in enumerate(zip(stored, tensors, strict=True))
    ]


def rounded(tensor: Tensor, precision: Precision) -> Tensor:
    """What `decode(encode(tensor, precision))` is of a tensor that is known to be tame: its values are not looked at.

    Args:
        tensor: that has axes and is not empty.
        precision: any but the native one.
    """
    tensor = tensor.detach()
    parts = precision.codec.encode(tensor, precision.settings)
    return decode(Encoded(precision, tuple(tensor.shape), tensor.dtype, parts))


def encode_native(tensor: Tensor) -> Encoded:
    """A tensor stored as it is."""
    return Encoded(NATIVE, tuple(tensor.shape), tensor.dtype, {"": tensor.detach()})


def decode(encoded: Encoded) -> Tensor:
    """The tensor that `encoded` stands for, in its dtype and shape, in a storage that holds nothing else."""
    return encoded.precision.codec.decode(encoded)


def decoder(encoded: Encoded) -> Callable[[], Tensor]:
    """What gives `decode(encoded)` again and again.

    Example:
        >>> decoder(encode(torch.ones(2, 64), Precision.parse("int4/64")))().shape
        torch.Size([2, 64])
    """
    return encoded.precision.codec.decoder(encoded)


class Decoded(Handle):
    """A tensor that is decoded from its stored form when it is asked for.

    Example:
        >>> Decoded(encode(torch.ones(2, 64), Precision.parse("int4/64"))).nbytes
        512
    """

    def __init__(self, encoded: Encoded, decode: Callable[[Encoded], Tensor] = decode):
        self.encoded, self._decode = encoded, decode
        self.shape, self.dtype = encoded.shape, encoded.dtype
        self.device = next((part.device for part in encoded.parts.values()), torch.device("cpu"))

    def read(self) -> Tensor:
        """What the stored form stands for."""
        return self._decode(self.encoded)


def part_layout(shape: tuple[int, ...], dtype: torch.dtype, precision: Precision) -> Layout:
    """Dtype and shape of every part that `encode` makes of such a tensor, without encoding it.

    Example:
        >>> part_layout((3, 8), torch.float32, Precision.parse("int6/4"))
        {'q4': (torch.uint8, (12,)), 'q2': (torch.uint8, (6,)), 'scale': (torch.bfloat16, (6,))}
    """
    if always_native(shape, dtype):
        precision = NATIVE
    return precision.codec.layout(shape, dtype, precision.settings)


def stored_bytes(shape: tuple[int, ...], dtype: torch.dtype, precision: Precision) -> int:
    """Bytes that `encode` of such a tensor takes, without encoding it."""
    layout = part_layout(shape, dtype, precision).values()
    if any(ANY_LENGTH in size for _, size in layout):
        raise ValueError(f"how many bytes {precision} takes depends on the values")
    return sum(math.prod(size) * kind.itemsize for kind, size in layout)


@lru_cache(4096)  # a fit asks for those of few shapes very often
def expected_bytes(shape: tuple[int, ...], dtype: torch.dtype, precision: Precision) -> int:
    """Bytes that such a tensor takes when it is written, Huffman-coded where that pays: about, as it is not there."""
    if always_native(shape, dtype):
        precision = NATIVE
    if precision.codec.has_streams(precision.settings):
        precision = Precision(Huffman.name, precision)
    return precision.codec.expected_bytes(shape, dtype, precision.settings)


def as_dtype(encoded: Encoded, dtype: torch.dtype) -> Encoded | None:
    """The same parts as the stored form of a tensor of another dtype; None where they would be other parts.

    Example:
        >>> one = encode(torch.ones(2, 2), Precision("bfloat16"))
        >>> decode(as_dtype(one, torch.float64)).dtype, as_dtype(encode_native(torch.ones(2)), torch.float64)
        (torch.float64, None)
    """
    if encoded.dtype == dtype:
        return encoded
    now, then = (part_layout(encoded.shape, each, encoded.precision) for each in (encoded.dtype, dtype))
    return replace(encoded, dtype=dtype) if now == then else None


def take_rows(encoded: Encoded, rows: Tensor) -> Encoded:
    """The stored form of `decode(encoded)[rows]`, without encoding anew.

    Args:
        encoded: of a tensor of at least two axes, or of a vector whose codec can take single values of it.
        rows: int64 `[R]`, indices along the first axis.

    Raises:
        ValueError: for a vector that its codec stores as one row.
    """
    codec = encoded.precision.codec
    parts, precision = codec.take_rows(encoded, rows), Precision(codec.name, codec.of_rows(encoded, rows))
    return replace(encoded, precision=precision, shape=(len(rows), *encoded.shape[1:]), parts=parts)


def ladder(tensors: Sequence[Tensor]) -> tuple[Precision, ...]:
    """Precisions that a fit tries for tensors that it stores alike: native, then what each codec offers.

    Example:
        >>> [str(precision) for precision in ladder([torch.ones(20)])]
        ['native', 'bfloat16', 'int12/64', 'int8/64']
    """
    return tuple(Precision(name, each) for name, codec in CODECS.items() for each in codec.ladder(tensors))


def stack_rows(parts: Sequence[Encoded]) -> Encoded:
    """The stored form of the rows of several tensors, one after the other, without encoding anew.

    Args:
        parts: at least one, of tensors of at least two axes that differ in the first alone, and of one precision where
            that can hold them: one that is stored natively makes all of them so.

    Example:
        >>> one, two = (encode(torch.ones(n, 64), Precision.parse("int4/64")) for n in (1, 2))
        >>> stack_rows([one, two]).shape
        (3, 64)
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    if any(each.precision != first.precision for each in parts):
        return encode_native(torch.cat([decode(each) for each in parts]))
    stacked = first.precision.codec.stack_rows(parts)
    return replace(first, shape=(sum(each.shape[0] for each in parts), *first.shape[1:]), parts=stacked)
