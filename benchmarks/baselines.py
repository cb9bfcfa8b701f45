"""What a fit is compared with: rounding, SVD of every matrix, and one basis for all matrices of one width.

Each takes a state dict and returns the weights that a model then has and the bytes that it takes: packed
integers without a gap, one bfloat16 scale for each group of 64, no file headers. Matrices are all tensors of
real numbers with two or more axes, embeddings included, as `[first axis, the rest]`; other tensors stay in
bfloat16 or as they are. Factors of a low rank are rounded too: that saves bytes for next to nothing.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

GROUP = 64
FACTOR_BITS = (16, 8, 6)  # of the factors of a low rank; the best one is kept at each size
Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Compressed:
    """Weights as a method leaves them, the bytes that they take, and how they came about."""

    weights: Weights
    nbytes: int
    detail: str


def round_to(tensor: Tensor, bits: int) -> Tensor:
    """Round to integers, the largest of each group of 64 to the largest integer; 16 bits is bfloat16."""
    if bits == 16:
        return tensor.bfloat16().to(tensor.dtype)
    rows = tensor.reshape(len(tensor), -1)
    width = min(GROUP, rows.shape[1])
    groups = torch.nn.functional.pad(rows, (0, -rows.shape[1] % width)).reshape(-1, width)
    top = (1 << (bits - 1)) - 1
    scale = (groups.abs().amax(1, keepdim=True) / top).bfloat16().to(tensor.dtype)
    codes = (groups / torch.where(scale > 0, scale, 1)).round().clamp(-top - 1, top)
    return (codes * scale).reshape(len(rows), -1)[:, : rows.shape[1]].reshape(tensor.shape)


def round_bytes(shape: tuple[int, int], bits: int) -> int:
    """Bytes of a rounded matrix with its scales."""
    return packed_bytes(shape, bits, GROUP, 0 if bits == 16 else 2)


def packed_bytes(shape: Sequence[int], bits: float, group: int, beside: int) -> int:
    """Bytes of a matrix `[out, in]` of so many bits an element, and `beside` bytes for each group of a row."""
    rows, width = shape
    groups = rows * math.ceil(width / min(group or width, width))
    return math.ceil(rows * width * bits / 8) + beside * groups


def is_matrix(tensor: Tensor) -> bool:
    """Whether a tensor is rounded or factored; vectors and integers are not."""
    return tensor.is_floating_point() and tensor.dim() > 1


def keep_rest(state: Weights, halved: bool) -> Compressed:
    """Everything that is no matrix, in bfloat16 or as it is."""
    rest = {name: t for name, t in state.items() if not is_matrix(t)}
    cast = {name: round_to(t, 16) if halved and t.is_floating_point() else t for name, t in rest.items()}
    nbytes = sum(
        t.numel() * (2 if halved and t.is_floating_point() else t.element_size()) for t in rest.values()
    )
    return Compressed(cast, nbytes, "rest in bfloat16" if halved else "rest as it is")


def rounding(state: Weights, bits: int, halved: bool) -> Compressed:
    """All matrices rounded to `bits` bits."""
    rest = keep_rest(state, halved)
    matrices = {name: t for name, t in state.items() if is_matrix(t)}
    nbytes = sum(round_bytes((len(t), t[0].numel()), bits) for t in matrices.values())
    rounded = {name: round_to(t, bits) for name, t in matrices.items()}
    return Compressed({**rest.weights, **rounded}, rest.nbytes + nbytes, f"int{bits}, {rest.detail}")


@dataclass
class LowRank:
    """Matrices as `left @ right` of any rank, from decompositions made once.

    Attributes:
        shapes: by factored matrix or stack of matrices.
        left: `[rows, k]` with most energy first.
        right: `[k, width]`.
        parts: names of the state dict's tensors in each stack, in order of their rows.
        plain: matrices that no rank makes smaller; rounded like the factors.
    """

    state: Weights
    left: dict[str, Tensor] = field(default_factory=dict)
    right: dict[str, Tensor] = field(default_factory=dict)
    parts: dict[str, list[str]] = field(default_factory=dict)
    plain: list[str] = field(default_factory=list)

    def add(self, names: list[str]) -> None:
        """Decompose the rows of some matrices of one width."""
        rows = torch.cat([self.state[name].reshape(len(self.state[name]), -1) for name in names])
        if min(rows.shape) < GROUP // 4:
            self.plain += names
            return
        gram, tall = (rows.T @ rows, True) if len(rows) > rows.shape[1] else (rows @ rows.T, False)
        vectors = torch.linalg.eigh(gram.double()).eigenvectors.flip(1).to(rows.dtype)
        key = names[0]
        self.left[key], self.right[key] = (rows @ vectors, vectors.T) if tall else (vectors, vectors.T @ rows)
        self.parts[key] = names

    def ranks(self, fraction: float) -> dict[str, int]:
        """A rank for each stack: this fraction of the rank at which factors are as large as the matrix."""
        sizes = {key: (len(self.left[key]), self.right[key].shape[1]) for key in self.left}
        return {key: max(1, int(fraction * m * n / (m + n))) for key, (m, n) in sizes.items()}

    def nbytes(self, fraction: float, bits: int) -> int:
        """Bytes of all factors and plain matrices, without the rest."""
        total = sum(round_bytes((len(t := self.state[name]), t[0].numel()), bits) for name in self.plain)
        for key, rank in self.ranks(fraction).items():
            m, n = len(self.left[key]), self.right[key].shape[1]
            total += round_bytes((m, rank), bits) + round_bytes((rank, n), bits)
        return total

    def weights(self, fraction: float, bits: int) -> dict[str, Tensor]:
        """What the matrices then are."""
        found = {name: round_to(self.state[name], bits) for name in self.plain}
        for key, rank in self.ranks(fraction).items():
            left, right = round_to(self.left[key][:, :rank], bits), round_to(self.right[key][:rank], bits)
            counts = [len(self.state[name]) for name in self.parts[key]]
            for name, part in zip(self.parts[key], (left @ right).split(counts), strict=True):
                found[name] = part.reshape(self.state[name].shape)
        return found

    def within(self, size: int, halved: bool) -> list[Compressed]:
        """The highest ranks that fit into `size` bytes, one result for each precision of factors."""
        rest = keep_rest(self.state, halved)
        found = []
        for bits in FACTOR_BITS:
            fraction = largest(lambda x, bits=bits: rest.nbytes + self.nbytes(x, bits) <= size)
            nbytes = rest.nbytes + self.nbytes(fraction, bits)
            if nbytes > size:
                continue
            kept = f"{fraction:.0%} of ranks, " + ("bfloat16" if bits == 16 else f"int{bits}")
            found.append(Compressed({**rest.weights, **self.weights(fraction, bits)}, nbytes, kept))
        return found


def per_matrix(state: Weights) -> LowRank:
    """SVD of every matrix by itself."""
    low = LowRank(state)
    for name, tensor in state.items():
        if is_matrix(tensor):
            low.add([name])
    return low


def one_basis(state: Weights) -> LowRank:
    """One basis for the rows of all matrices of one width, through all layers."""
    low, widths = LowRank(state), defaultdict(list)
    for name, tensor in state.items():
        if is_matrix(tensor):
            widths[tensor[0].numel()].append(name)
    for names in widths.values():
        low.add(names)
    return low


def largest(holds: Callable[[float], bool], steps: int = 20) -> float:
    """The largest fraction up to 1 for which a condition holds that is false above some value."""
    if holds(1.0):
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
