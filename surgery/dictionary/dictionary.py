"""Dictionary: rows and sparse codes, and the blocks of every location that they generate.

All sharing is `B[l] = sum_j coefficient[l, j] * rows[index[l, j]]` (MUiR Eq. 5 for hypermodules). A `Bank`
holds the rows for one block shape. Its table has two regions:

    rows[k*c + j]   basis block j of hypermodule k,  k < K     shared: code of location l is the c rows of
    psi(l) rows[K*c + s]   single row s                               code of location l is one row and a
    factor

A single row is a hypermodule in collapsed form: one that fewer than c locations use costs less as the block
that it generates. The exact start keeps every distinct block as a single row with factor 1, so a joined
member is its original bit for bit; `open_bank` turns single rows into trainable hypermodules of c basis
blocks.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from surgery.dictionary.contest import Contest
from surgery.dictionary.kernel import DENSE_CODE, TransposedIndex, generate, transpose
from surgery.geometry.columns import Columns
from surgery.settings.names import Mixing

_SAME_FINGERPRINT = 4  # different blocks of one fingerprint that `duplicates` tells apart


class Bank(nn.Module):
    """Rows, alignment and contexts of all locations with one block shape.

    Attributes:
        block: (m, n).
        context: c, the number of basis blocks of a hypermodule.
        hypermodules: K.
        rows: parameter `[K*c + S, m*n]`.
        psi: int64 buffer `[L]`; below K a hypermodule, else single row `psi - K`.
        contexts: parameter `[L, c]`; a location on a single row uses column 0 as its factor, the rest is 0.
        mixing: how `coefficients` follow from contexts: `linear`, as they are; `softmax`, of mixtures of templates.
        diagonals: parameter `[L, min(m, n)]`, added to the blocks' own diagonals, else None.
        contest: the alternatives that compete while training decides between them, else None.
        columns: which columns of its rows and blocks this process holds, where several share them, else None.
    """

    rows: nn.Parameter
    contexts: nn.Parameter
    psi: Tensor
    origin: Tensor | None
    contest: Contest | None
    diagonals: nn.Parameter | None

    def __init__(
        self, block: tuple[int, int], rows: Tensor, psi: Tensor, contexts: Tensor, hypermodules: int
    ):
        super().__init__()
        self.block, self.context, self.hypermodules = block, contexts.shape[1], hypermodules
        self.mixing: Mixing = "linear"
        self.columns: Columns | None = None
        if rows.shape[1] != block[0] * block[1] or psi.shape[0] != contexts.shape[0]:
            raise ValueError(
                f"rows {tuple(rows.shape)}, psi {tuple(psi.shape)}, contexts {tuple(contexts.shape)} "
                f"do not fit together for {block[0]}x{block[1]} blocks"
            )
        self.rows, self.contexts = nn.Parameter(rows), nn.Parameter(contexts)
        self.register_buffer("psi", psi.long())
        # What every block was when this bank was opened for training, `[L, m*n]`; None where it never was.
        self.register_buffer("origin", None, persistent=False)
        self.register_module("contest", None)
        self.register_parameter("diagonals", None)
        self._code: tuple[Tensor, int, TransposedIndex] | None = None

    @property
    def locations(self) -> int:
        """L."""
        return self.psi.shape[0]

    @property
    def singles(self) -> int:
        """S, the number of single rows."""
        return self.rows.shape[0] - self.hypermodules * self.context

    @property
    def width(self) -> int:
        """Numbers in a block, those among them that other processes hold: m*n."""
        return self.block[0] * self.block[1]

    @property
    def coefficients(self) -> Tensor:
        """What locations multiply basis blocks with: `[L, c]`, differentiable."""
        return self.contexts.softmax(1) if self.mixing == "softmax" else self.contexts

    def codes(self, start: int = 0, stop: int | None = None) -> tuple[Tensor, Tensor]:
        """`index [L', c]` and `coefficient [L', c]` of locations `start` to `stop`."""
        return codes(self.psi[start:stop], self.coefficients[start:stop], self.hypermodules)

    def blocks(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Generate the blocks `[L', m*n]` of locations `start` to `stop`; differentiable, never under autocast."""
        blocks = self._sums(start, stop)
        return blocks if self.diagonals is None else self._on_diagonals(blocks, self.diagonals[start:stop])

    def _sums(self, start: int, stop: int | None) -> Tensor:
        """What rows and codes alone generate."""
        with torch.autocast(self.rows.device.type, enabled=False):
            if self.contest is not None:
                return self.contest.blocks(self.rows, self.contexts, start, stop)
            if self.hypermodules == 1 and not self.singles:  # templates: every location draws on all rows
                return self.coefficients[start:stop] @ self.rows
            index, coefficient = self.codes(start, stop)
            if index.shape[0] * self.rows.shape[0] <= DENSE_CODE and index.shape[1] > 1:
                dense = coefficient.new_zeros(index.shape[0], self.rows.shape[0])
                return dense.scatter_add(1, index, coefficient) @ self.rows
            whole = len(index) == self.locations and self.rows.requires_grad and torch.is_grad_enabled()
            return generate(self.rows, index, coefficient, self._transposed(index) if whole else None)

    def add_diagonals(self) -> None:
        """Give every location a diagonal of its own, 0 at first."""
        size = (self.locations, min(self.block))
        self.diagonals = nn.Parameter(torch.zeros(size, dtype=self.rows.dtype, device=self.rows.device))

    def _on_diagonals(self, blocks: Tensor, diagonals: Tensor) -> Tensor:
        m, n = self.block
        places = torch.arange(min(m, n), device=blocks.device) * (n + 1)
        if self.columns is not None:
            own = (places >= self.columns.first) & (places < self.columns.first + self.columns.held)
            places, diagonals = places[own] - self.columns.first, diagonals[:, own]
        return blocks.index_add(1, places, diagonals)

    def _transposed(self, index: Tensor) -> TransposedIndex | None:
        """Users of every row, kept while the alignment stays as it is."""
        if index.device.type != "cpu":
            return None
        if self._code is None or self._code[0] is not self.psi or self._code[1] != self.psi._version:
            self._code = (self.psi, self.psi._version, transpose(index, len(self.rows)))
        return self._code[2]

    @torch.no_grad()
    def settled_blocks(self) -> Tensor:
        """All blocks `[L, m*n]` for collapse: those that training did not move are the original ones, bit for
        bit, and alternatives do not count.

        A block of an opened hypermodule is a sum of c products, so it equals its origin only up to the
        rounding of that sum; differences within the bound gamma_c * sum |z_j H_j| are rounding and are taken
        away.
        """
        if not self.hypermodules and self.diagonals is None and self.origin is None:
            return self.rows.detach()[self.psi].mul_(self.contexts[:, :1])  # no second copy of large banks
        blocks = generate(self.rows, *self.codes())
        single = self.psi >= self.hypermodules
        # One product, not a sum that starts from 0: a sum would turn -0.0 into 0.0.
        own = self.rows[self.psi[single] + self.hypermodules * (self.context - 1)]
        blocks[single] = own * self.contexts[single, :1]
        if self.diagonals is not None and self.diagonals.any():
            blocks = self._on_diagonals(blocks, self.diagonals)
        if self.origin is None:
            return blocks
        index, coefficient = self.codes()
        size = generate(self.rows.abs(), index, coefficient.abs())
        bound = 4 * self.context * torch.finfo(size.dtype).eps * size
        return torch.where((blocks - self.origin).abs() <= bound, self.origin, blocks)


def codes(psi: Tensor, contexts: Tensor, hypermodules: int) -> tuple[Tensor, Tensor]:
    """The code of each location: `psi [L]`, `contexts [L, c]` -> `index [L, c]`, `coefficient [L, c]`. # Eq.
    (5)

    Example:
        >>> codes(torch.tensor([1, 2]), torch.tensor([[.5, .5], [1., 0.]]), hypermodules=2)[0]
        tensor([[2, 3],
                [4, 4]])
    """
    c = contexts.shape[1]
    basis = torch.arange(c, device=psi.device)
    shared = (psi < hypermodules).unsqueeze(1)
    single = (psi + hypermodules * (c - 1)).unsqueeze(1)  # K*c + (psi - K)
    index = torch.where(shared, psi.unsqueeze(1) * c + basis, single)
    # Where no location is shared the mask below is the contexts themselves; it keeps stray gradients off the
    # zeros.
    coefficient = torch.where(shared | (basis == 0), contexts, torch.zeros_like(contexts))
    return index, coefficient


class Dictionary(nn.Module):
    """All banks of a joint model, by key (`"16x16-float32"`)."""

    def __init__(self, banks: dict[str, Bank] | None = None):
        super().__init__()
        self.banks = nn.ModuleDict(banks or {})

    def __getitem__(self, key: str) -> Bank:
        bank = self.banks[key]
        assert isinstance(bank, Bank)
        return bank

    def __iter__(self) -> Iterator[str]:
        return iter(self.banks)

    def keys(self) -> list[str]:
        """The banks' keys."""
        return list(self.banks.keys())


def master_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which rows are kept while they can be trained: float32, float64 for float64 members."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def exact_bank(blocks: Tensor, block: tuple[int, int], context: int = 1) -> Bank:
    """The lossless start: every distinct block is a single row; identical blocks share one.

    Blocks equal up to a factor share a row too where the factor gives every value back bit for bit.

    Args:
        blocks: `[L, m*n]`, float32 or float64; the bank takes it over where no two are equal.
        block: (m, n).
        context: c that later hypermodules will have.
    """
    representative, factor = duplicates(blocks)
    rows, psi = torch.unique(representative, return_inverse=True)
    contexts = blocks.new_zeros(len(blocks), context)
    contexts[:, 0] = factor
    kept = blocks if len(rows) == len(blocks) else blocks[rows]
    return Bank(block, kept, psi, contexts, hypermodules=0)


def duplicates(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """For each block the first one that it equals up to a factor, bit for bit, and that factor.

    Args:
        blocks: `[L, d]` floating point.

    Returns:
        `representative [L]` (own number where nothing equals it) and `factor [L]`, such that
        `factor[l] * blocks[representative[l]] == blocks[l]` exactly.
    """
    count = len(blocks)
    representative = torch.arange(count, device=blocks.device)
    factor = torch.ones(count, dtype=blocks.dtype, device=blocks.device)
    if not count:
        return representative, factor
    scale, fingerprint = _fingerprints(blocks)
    bucket = torch.unique(fingerprint, dim=0, return_inverse=True)[1]
    buckets = int(bucket.max()) + 1
    left = representative.clone()
    # Different blocks may share a coarse fingerprint; those that are not the first one's try the next.
    for _ in range(_SAME_FINGERPRINT):
        first = torch.full((buckets,), count, device=blocks.device)
        first.scatter_reduce_(0, bucket[left], left, "amin")
        leader = first[bucket[left]]
        ratio = torch.where(scale[leader] != 0, scale[left] / scale[leader], torch.zeros_like(scale[left]))
        both = ((scale[left] == 0) & (scale[leader] == 0)).squeeze(1)
        ratio = torch.where(both, torch.ones_like(ratio.squeeze(1)), ratio.squeeze(1))
        same = _equal_bits(blocks, leader, ratio, left)
        representative[left[same]], factor[left[same]] = leader[same], ratio[same]
        left = left[~same]
        if not len(left):
            break
    return representative, factor


def _equal_bits(blocks: Tensor, leader: Tensor, ratio: Tensor, blocks_of: Tensor) -> Tensor:
    """Whether `ratio * blocks[leader]` is `blocks[blocks_of]` bit for bit: `[N]`."""
    same = torch.empty(len(leader), dtype=torch.bool, device=blocks.device)
    bits = torch.int64 if blocks.dtype == torch.float64 else torch.int32
    for part in torch.arange(len(leader), device=blocks.device).split(1 << 14):
        product = blocks[leader[part]] * ratio[part].unsqueeze(1)
        found = blocks[blocks_of[part]]
        same[part] = (product.view(bits) == found.view(bits)).all(1)  # bits: 0.0 is not -0.0
    return same


def _fingerprints(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """The signed largest value of each block `[L, 1]`, and a coarse fingerprint of its direction `[L, f]`.

    So coarse that a factor's rounding rarely separates two blocks; piece by piece, as large banks have no room
    for a second copy.
    """
    probe = torch.linspace(0, blocks.shape[1] - 1, min(blocks.shape[1], 32), device=blocks.device).long()
    scales, fingerprints = [], []
    for part in blocks.split(1 << 14):
        scale = part.gather(1, part.abs().argmax(1, keepdim=True))
        direction = torch.where(scale != 0, part / scale, part)
        coarse = (direction[:, probe].float() * 1024).round_().to(torch.int32)
        total = (direction.sum(1, keepdim=True).float() * 64).round_().to(torch.int32)
        scales.append(scale)
        fingerprints.append(torch.cat([coarse, total], 1))
    return torch.cat(scales), torch.cat(fingerprints)
