"""What methods leave of a family, as one file: packed integers, signs, masks and factors, and how they add up.

A `Leaf` is a tensor as it is stored; its `value` is the tensor that it stands for. A `Package` holds leaves that all
members use and leaves of each member; a member's tensor is their sum. The file is a compressed index, then the arrays
without gaps, so that no method pays for many small tensors.
"""

from __future__ import annotations

import bz2
import json
import lzma
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

TASK = "@task"  # after a tensor's name: what a mask picks from
MORE = "@more"  # after a tensor's name: what is added to the shared tensor
_TRITS = 3 ** np.arange(5)  # five digits of base three in a byte


class Leaf(Protocol):
    """A tensor as it is stored."""

    def value(self) -> Tensor:
        """The tensor."""
        ...

    def fields(self) -> tuple[Any, ...]:
        """Its kind and what JSON holds of it."""
        ...

    def arrays(self) -> tuple[np.ndarray, ...]:
        """Its bytes, each an array of uint8."""
        ...


def pack(codes: np.ndarray, levels: int) -> np.ndarray:
    """Codes in [0, levels) as bytes: b bits each for 2**b levels, five in a byte for three.

    Example:
        >>> codes = np.array([2, 0, 1, 1, 2, 2], np.uint8)
        >>> [unpack(pack(codes, levels), levels, 6).tolist() == codes.tolist() for levels in (3, 4, 8)]
        [True, True, True]
    """
    flat = codes.astype(np.uint8, copy=False).ravel()
    if levels == 3:
        padded = np.pad(flat, (0, -len(flat) % 5)).reshape(-1, 5)
        return (padded @ _TRITS).astype(np.uint8)
    bits = (levels - 1).bit_length()
    if bits == 8:
        return flat
    return np.packbits((flat[:, None] >> np.arange(bits, dtype=np.uint8)) & 1)


def unpack(packed: np.ndarray, levels: int, count: int) -> np.ndarray:
    """The first `count` codes."""
    if levels == 3:
        return ((packed[:, None] // _TRITS) % 3).astype(np.uint8).ravel()[:count]
    bits = (levels - 1).bit_length()
    if bits == 8:
        return packed[:count]
    planes = np.unpackbits(packed, count=count * bits).reshape(count, bits)
    return planes @ (1 << np.arange(bits)).astype(np.uint8)


def squeeze(codes: np.ndarray, levels: int) -> tuple[str, np.ndarray]:
    """Codes by the shortest of three lossless coders, for those of which most are equal."""
    plain, flat = pack(codes, levels), codes.astype(np.uint8).tobytes()
    coded = {"raw": plain.tobytes(), "bz2": bz2.compress(flat), "lzma": lzma.compress(plain.tobytes())}
    name = min(coded, key=lambda name: len(coded[name]))
    return name, np.frombuffer(coded[name], np.uint8)


def _unsqueeze(name: str, data: np.ndarray, levels: int, count: int) -> np.ndarray:
    if name == "bz2":
        return np.frombuffer(bz2.decompress(data.tobytes()), np.uint8)
    plain = data if name == "raw" else np.frombuffer(lzma.decompress(data.tobytes()), np.uint8)
    return unpack(plain, levels, count)


def _half(tensor: Tensor) -> np.ndarray:
    return tensor.to(torch.bfloat16).contiguous().view(torch.uint8).numpy().ravel()


def _from_half(data: np.ndarray) -> Tensor:
    return torch.from_numpy(data.copy()).view(torch.bfloat16).float()


@dataclass(frozen=True)
class Plain:
    """A tensor in bfloat16, or, where it is of integers, as it is."""

    tensor: Tensor

    def value(self) -> Tensor:
        if not self.tensor.is_floating_point():
            return self.tensor
        return self.tensor.to(torch.bfloat16).float()

    def fields(self) -> tuple[Any, ...]:
        kind = "half" if self.tensor.is_floating_point() else str(self.tensor.dtype).partition(".")[2]
        return kind, list(self.tensor.shape)

    def arrays(self) -> tuple[np.ndarray, ...]:
        if self.tensor.is_floating_point():
            return (_half(self.tensor),)
        return (np.frombuffer(self.tensor.numpy().tobytes(), np.uint8),)


@dataclass(frozen=True)
class Grid:
    """Integers with a scale, and perhaps a zero, for each group of a row: `(code - zero) * scale`.

    Attributes:
        codes: `[rows, width]` uint8 in [0, levels).
        scale: `[rows, groups]`, or `[1, 1]` for one of the whole tensor; stored in bfloat16.
        levels: 3 or a power of two.
        group: elements of a row that have one scale.
        shape: of the tensor; its first axis is that of `codes`, or its elements are.
        zero: like `scale`, stored in bfloat16; the middle of the levels where it is None.
        sparse: whether codes are worth a lossless coder.
    """

    codes: Tensor
    scale: Tensor
    levels: int
    group: int
    shape: tuple[int, ...]
    zero: Tensor | None = None
    sparse: bool = False

    def value(self) -> Tensor:
        middle = (self.levels - 1) / 2 if self.levels < 4 else self.levels / 2
        scale = self.scale.to(torch.bfloat16).float()
        codes = self.codes.float()
        if self.scale.numel() > 1:
            scale = spread(scale, self.group, codes.shape[1])
        if self.zero is None:
            return ((codes - middle) * scale).reshape(self.shape)
        zero = self.zero.to(torch.bfloat16).float()
        if self.zero.numel() > 1:
            zero = spread(zero, self.group, codes.shape[1])
        return ((codes - zero) * scale).reshape(self.shape)

    def fields(self) -> tuple[Any, ...]:
        sizes = [list(self.codes.shape), list(self.scale.shape)]
        return "grid", self.levels, self.group, list(self.shape), sizes, self.zero is not None, self.sparse

    def arrays(self) -> tuple[np.ndarray, ...]:
        codes = self.codes.numpy()
        if self.sparse:
            name, data = squeeze(codes, self.levels)
            first = (np.frombuffer(name.ljust(4).encode(), np.uint8), data)
        else:
            first = (pack(codes, self.levels),)
        return (*first, _half(self.scale), *(() if self.zero is None else (_half(self.zero),)))


def spread(by_group: Tensor, group: int, width: int) -> Tensor:
    """`[rows, groups]` to `[rows, width]`."""
    return by_group.repeat_interleave(group, 1)[:, :width]


@dataclass(frozen=True)
class Product:
    """A matrix as `left.T @ right`: both factors have a row, and scales along it, for each direction."""

    left: Grid
    right: Grid
    shape: tuple[int, ...]

    def value(self) -> Tensor:
        return (self.left.value().T @ self.right.value()).reshape(self.shape)

    def fields(self) -> tuple[Any, ...]:
        return "product", list(self.shape), self.left.fields(), self.right.fields()

    def arrays(self) -> tuple[np.ndarray, ...]:
        return (*self.left.arrays(), *self.right.arrays())


@dataclass(frozen=True)
class Mask:
    """Which elements of the shared task vector are a member's own."""

    keep: Tensor

    def value(self) -> Tensor:
        return self.keep.float()

    def fields(self) -> tuple[Any, ...]:
        return "mask", list(self.keep.shape)

    def arrays(self) -> tuple[np.ndarray, ...]:
        name, data = squeeze(self.keep.to(torch.uint8).numpy(), 2)
        return np.frombuffer(name.ljust(4).encode(), np.uint8), data


def _read(fields: Sequence[Any], take: Callable[[], np.ndarray]) -> Leaf:
    """A leaf from its fields and arrays."""
    kind, *rest = fields
    if kind == "half":
        return Plain(_from_half(take()).reshape(rest[0]))
    if kind == "mask":
        name = take().tobytes().decode().strip()
        return Mask(
            torch.from_numpy(_unsqueeze(name, take(), 2, math.prod(rest[0])).copy()).bool().reshape(rest[0])
        )
    if kind == "product":
        shape, left, right = rest
        parts = _read(left, take), _read(right, take)
        assert isinstance(parts[0], Grid) and isinstance(parts[1], Grid)
        return Product(parts[0], parts[1], tuple(shape))
    if kind == "grid":
        levels, group, shape, (size, scales), has_zero, sparse = rest
        count = math.prod(size)
        if sparse:
            name = take().tobytes().decode().strip()
            codes = _unsqueeze(name, take(), levels, count)
        else:
            codes = unpack(take(), levels, count)
        scale = _from_half(take()).reshape(scales)
        zero = _from_half(take()).reshape(scales) if has_zero else None
        return Grid(
            torch.from_numpy(codes.copy()).reshape(size), scale, levels, group, tuple(shape), zero, sparse
        )
    return Plain(torch.from_numpy(take().copy()).view(getattr(torch, kind)).reshape(rest[0]))


@dataclass(frozen=True)
class Package:
    """All that a method keeps of a family.

    Attributes:
        shared: by tensor, what all members use.
        private: by member and tensor; added to what is shared, or a `Mask` over the tensor's shared task vector.
        detail: the setting, in words.
    """

    shared: Mapping[str, Leaf]
    private: Mapping[str, Mapping[str, Leaf]]
    detail: str = ""

    def states(self) -> dict[str, dict[str, Tensor]]:
        """The weights of every member."""
        common = {name: leaf.value() for name, leaf in self.shared.items()}
        for name in [name for name in common if name.endswith(MORE)]:
            common[name.removesuffix(MORE)] = common[name.removesuffix(MORE)] + common.pop(name)
        made = {}
        for member, leaves in self.private.items():
            state = {name: value for name, value in common.items() if not name.endswith(TASK)}
            for name, leaf in leaves.items():
                own = leaf.value()
                if isinstance(leaf, Mask):
                    own = own * common[name + TASK]
                state[name] = state[name] + own if name in state else own
            made[member] = state
        return made

    @property
    def marginal(self) -> float:
        """Bytes that belong to one member alone, on average."""
        return sum(_bytes(leaves.values()) for leaves in self.private.values()) / max(len(self.private), 1)

    def write(self, path: Path) -> int:
        """Write one file; its bytes."""
        names = sorted({*self.shared, *(name for leaves in self.private.values() for name in leaves)})
        number = {name: n for n, name in enumerate(names)}
        groups = {"": self.shared, **self.private}
        arrays = [
            array for leaves in groups.values() for name in sorted(leaves) for array in leaves[name].arrays()
        ]
        index = {
            "names": names,
            "leaves": {
                group: [[number[name], *leaves[name].fields()] for name in sorted(leaves)]
                for group, leaves in groups.items()
            },
            "sizes": [array.nbytes for array in arrays],
        }
        head = zlib.compress(json.dumps(index, separators=(",", ":")).encode(), 9)
        with path.open("wb") as stream:
            stream.write(len(head).to_bytes(8, "little"))
            stream.write(head)
            for array in arrays:
                stream.write(array.tobytes())
        return path.stat().st_size


def read(path: Path) -> Package:
    """The package in a file."""
    with path.open("rb") as stream:
        index = json.loads(zlib.decompress(stream.read(int.from_bytes(stream.read(8), "little"))))
        data = np.frombuffer(stream.read(), np.uint8)
    pieces: Iterator[np.ndarray] = iter(np.split(data, np.cumsum(index["sizes"])[:-1]))
    groups = {
        group: {index["names"][number]: _read(fields, lambda: next(pieces)) for number, *fields in leaves}
        for group, leaves in index["leaves"].items()
    }
    return Package(groups.pop(""), groups)


def _bytes(leaves: Iterator[Leaf] | Any) -> int:
    return sum(array.nbytes for leaf in leaves for array in leaf.arrays())


def leaf_bytes(leaf: Leaf) -> int:
    """Bytes of a leaf's arrays."""
    return _bytes([leaf])
