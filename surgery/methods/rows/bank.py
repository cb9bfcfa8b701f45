"""Rows: a bank whose blocks are sums of rows that are weighted by sparse codes.

All sharing of rows is `B[l] = sum_j coefficient[l, j] * rows[index[l, j]]` (MUiR Eq. 5 for hypermodules). The table of
rows has two regions:

    rows[k*c + j]   basis block j of hypermodule k,  k < K     shared: code of location l is the c rows of
    psi(l) rows[K*c + s]   single row s                               code of location l is one row and a
    factor

A single row is a hypermodule in collapsed form: one that fewer than c locations use costs less as the block
that it generates. The exact start keeps every distinct block as a single row with factor 1, so a joined
member is its original bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from surgery.anatomy.plan import BankPlan, Placement, torch_dtype
from surgery.core.bank import Bank, Parts, Trained
from surgery.core.dictionary import index_dtype
from surgery.core.kernel import DENSE_CODE, TransposedIndex, generate, transpose
from surgery.methods.rows.columns import Columns
from surgery.methods.rows.duplicates import distinct
from surgery.methods.rows.settling import count_parameters, settle_rows


class RowsBank(Bank):
    """Rows, alignment and contexts of all locations with one block shape.

    Attributes:
        block: (m, n).
        context: c, the number of basis blocks of a hypermodule.
        hypermodules: K.
        rows: parameter `[K*c + S, m*n]`.
        psi: int64 buffer `[L]`; below K a hypermodule, else single row `psi - K`.
        contexts: parameter `[L, c]`; a location on a single row uses column 0 as its factor, the rest is 0.
        origin: `[L, m*n]`, what every block was when the bank was opened for training, on the CPU wherever the bank is;
            None where it never was.
        columns: which columns of its rows and blocks this process holds.
    """

    form: ClassVar[str] = "rows"
    rows: nn.Parameter
    contexts: nn.Parameter
    psi: Tensor
    origin: Tensor | None
    columns: Columns = Columns()

    def __init__(
        self, block: tuple[int, int], rows: Tensor, psi: Tensor, contexts: Tensor, hypermodules: int
    ):
        super().__init__()
        self.block, self.context, self.hypermodules = block, contexts.shape[1], hypermodules
        if rows.shape[1] != block[0] * block[1] or psi.shape[0] != contexts.shape[0]:
            raise ValueError(
                f"rows {tuple(rows.shape)}, psi {tuple(psi.shape)}, contexts {tuple(contexts.shape)} "
                f"do not fit together for {block[0]}x{block[1]} blocks"
            )
        self.rows, self.contexts = nn.Parameter(rows), nn.Parameter(contexts)
        self.register_buffer("psi", psi.long())
        self.register_buffer("origin", None, persistent=False)
        self._code: tuple[Tensor, int, TransposedIndex] | None = None

    def plain(self, rows: Tensor, psi: Tensor, contexts: Tensor, hypermodules: int) -> RowsBank:
        """An ordinary bank of the same block shape with other rows and codes."""
        return RowsBank(self.block, rows, psi, contexts, hypermodules)

    def keep_origin(self, blocks: Tensor) -> None:
        """Remember what blocks were. They are asked for once, at the end, so they take no memory of a device."""
        self.origin = blocks.to("cpu", self.rows.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RowsBank:
        """Apply `fn` to all tensors but `origin`, which stays on the CPU: neither training nor generating reads it."""
        origin, self.origin = self.origin, None
        try:
            super()._apply(fn, recurse)
        finally:
            if origin is not None:
                self.keep_origin(origin)
        return self

    # -- what is where -------------------------------------------------------------------------------------

    @property
    def locations(self) -> int:
        """L, the number of locations."""
        return self.psi.shape[0]

    @property
    def singles(self) -> int:
        """S, the number of single rows."""
        return self.rows.shape[0] - self.hypermodules * self.context

    @property
    def shared(self) -> Tensor:
        """Which locations are on a hypermodule: `[L]`, boolean."""
        return self.psi < self.hypermodules

    @property
    def basis(self) -> Tensor:
        """The hypermodules' basis blocks: `[K, c, m*n]`, a view without gradients."""
        count = self.hypermodules * self.context
        return self.rows.detach()[:count].view(self.hypermodules, self.context, -1)

    @property
    def single_rows(self) -> Tensor:
        """The single rows: `[S, m*n]`, a view without gradients."""
        return self.rows.detach()[self.hypermodules * self.context :]

    def row_values(self, index: Tensor) -> Tensor:
        """Single rows by their numbers `[N]`, which the caller may keep: `[N, m*n]`."""
        return self.single_rows[index]

    @property
    def uses(self) -> Tensor:
        """How many locations each hypermodule, and after these each single row, has: `[K + S]`."""
        return torch.bincount(self.psi, minlength=self.hypermodules + self.singles)

    @property
    def coefficients(self) -> Tensor:
        """What locations multiply basis blocks with: `[L, c]`, differentiable."""
        return self.contexts

    @property
    def divisible(self) -> bool:
        """Sums over codes are taken block by block; one product of all of them is not."""
        return self.hypermodules != 1 or self.singles > 0

    @property
    def own_elements(self) -> int:
        """Trained parameters that are a location's own."""
        return self.context if self.contexts.requires_grad else 0

    def codes(self, start: int = 0, stop: int | None = None) -> tuple[Tensor, Tensor]:
        """`index [L', c]` and `coefficient [L', c]` of locations `start` to `stop`."""
        return codes(self.psi[start:stop], self.coefficients[start:stop], self.hypermodules)

    # -- generating ----------------------------------------------------------------------------------------

    def blocks(self, start: int = 0, stop: int | None = None, task: str | None = None) -> Tensor:
        """Generate the blocks `[L', m*n]` of locations `start` to `stop`; differentiable, never under autocast."""
        with torch.autocast(self.rows.device.type, enabled=False):
            if self.hypermodules == 1 and not self.singles:  # templates: every location draws on all rows
                return self.coefficients[start:stop] @ self.rows
            index, coefficient = self.codes(start, stop)
            if index.shape[0] * self.rows.shape[0] <= DENSE_CODE and index.shape[1] > 1:
                dense = coefficient.new_zeros(index.shape[0], self.rows.shape[0])
                return dense.scatter_add(1, index, coefficient) @ self.rows
            whole = len(index) == self.locations and self.rows.requires_grad and torch.is_grad_enabled()
            return generate(self.rows, index, coefficient, self._transposed(index) if whole else None)

    def _transposed(self, index: Tensor) -> TransposedIndex | None:
        """Users of every row, kept while the alignment stays as it is."""
        if index.device.type != "cpu":
            return None
        if self._code is None or self._code[0] is not self.psi or self._code[1] != self.psi._version:
            self._code = (self.psi, self.psi._version, transpose(index, len(self.rows)))
        return self._code[2]

    @torch.no_grad()
    def settled_blocks(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Blocks `[L', m*n]` for collapse: those that training did not move are the original ones, bit for bit.

        A block of an opened hypermodule is a sum of c products, so it equals its origin only up to the
        rounding of that sum; differences within the bound gamma_c * sum |z_j H_j| are rounding and are taken
        away.
        """
        if not self.hypermodules and self.origin is None:
            rows = self.rows.detach()[self.psi[start:stop]]
            return rows.mul_(self.contexts[start:stop, :1])  # no second copy of large banks
        return self._restored(self._sums(start, stop), start, stop)

    def _sums(self, start: int = 0, stop: int | None = None) -> Tensor:
        """What rows and codes generate: single rows as they are, up to their factor."""
        blocks = generate(self.rows, *self.codes(start, stop))
        psi, contexts = self.psi[start:stop], self.contexts[start:stop]
        single = psi >= self.hypermodules
        # One product, not a sum that starts from 0: a sum would turn -0.0 into 0.0.
        own = self.rows[psi[single] + self.hypermodules * (self.context - 1)]
        blocks[single] = own * contexts[single, :1]
        return blocks

    def _restored(self, blocks: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Blocks that differ from their origin by the rounding of their sum alone become their origin."""
        if self.origin is None:
            return blocks
        origin, (index, coefficient) = self.origin[start:stop].to(blocks.device), self.codes(start, stop)
        used, index = index.unique(return_inverse=True)  # a range draws on few of the rows
        size = generate(self.rows[used].abs(), index, coefficient.abs())
        bound = 4 * self.context * torch.finfo(size.dtype).eps * size
        return torch.where((blocks - origin).abs() <= bound, origin, blocks)

    @torch.no_grad()
    def portable_blocks(self, start: int, stop: int) -> Tensor:
        """Blocks whose sums are taken in the order of the basis blocks, one rounded operation at a time."""
        index, coefficient = self.codes(start, stop)
        blocks = coefficient[:, :1] * self.rows[index[:, 0]]
        for j in range(1, index.shape[1]):
            blocks = blocks + coefficient[:, j : j + 1] * self.rows[index[:, j]]
        return blocks

    def repeats(self) -> tuple[Tensor, Tensor] | None:
        """Where every block is a row as it is and several take one: the row of each location `[L]`, and the rows."""
        if self.hypermodules or self.singles == self.locations or bool((self.contexts[:, 0] != 1).any()):
            return None
        return self.psi, self.rows.detach()

    # -- training ------------------------------------------------------------------------------------------

    def trained(self) -> list[Trained]:
        """Rows, which decay, and contexts, which do not."""
        return [
            Trained("rows", tuple(p for p in (self.rows,) if p.requires_grad)),
            Trained("contexts", tuple(p for p in (self.contexts,) if p.requires_grad), decay=False),
        ]

    def state(self) -> Parts:
        """Rows, contexts and alignment."""
        return {"rows": self.rows.detach(), "contexts": self.contexts.detach(), "psi": self.psi}

    def misfits(self, state: Mapping[str, Tensor]) -> list[str]:
        """As of any bank; there may be another number of rows."""
        own = self.state()
        wrong = [f"has no {name}" for name in own if name not in state]
        for name, tensor in own.items():
            if name not in state:
                continue
            if state[name].dtype != tensor.dtype:
                wrong.append(f"must have {name} of {tensor.dtype}, found {state[name].dtype}")
            elif name != "rows" and state[name].shape != tensor.shape:
                wrong.append(f"must have {name} of {list(tensor.shape)}, found {list(state[name].shape)}")
        return wrong or self._wrong_rows(state["rows"], state["psi"])

    def _wrong_rows(self, rows: Tensor, psi: Tensor) -> list[str]:
        if rows.ndim != 2 or rows.shape[1] != self.rows.shape[1] or not len(rows):
            return [f"must have rows of {self.rows.shape[1]} elements, found {list(rows.shape)}"]
        count = len(rows) // self.context
        last = count + len(rows) - count * self.context - 1
        if len(psi) and (int(psi.min()) < 0 or int(psi.max()) > last):
            return [f"must align locations to 0 to {last}, found {int(psi.min())} to {int(psi.max())}"]
        return []

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take over a state in which `misfits` finds nothing wrong, with as many hypermodules as it has."""
        device, rows = self.rows.device, state["rows"]
        self.rows = nn.Parameter(rows.to(device, copy=True), requires_grad=self.rows.requires_grad)
        self.hypermodules = len(rows) // self.context
        self.contexts.copy_(state["contexts"])
        self.psi = state["psi"].to(device, copy=True)

    # -- storing -------------------------------------------------------------------------------------------

    def pack(self, plan: BankPlan, like: Collection[str] = ()) -> Parts:
        """Basis blocks `rows.<j> [K, m*n]`, single rows, `psi`, `contexts` and `factor`: see `methods.rows.parts`.

        Single rows are one tensor `single`, or each its own where `like`, the parts that it had before, says so.
        """
        k, contexts, shared = self.hypermodules, self.coefficients.detach(), self.shared
        parts: Parts = {}
        if k:
            parts.update({f"rows.{j}": self.basis[:, j].contiguous() for j in range(self.context)})
            parts["contexts"] = contexts[shared].contiguous()
        if self.singles:
            single = self.single_rows.to(torch_dtype(plan.dtype))
            if "single.0" in like:
                parts.update({f"single.{s}": single[s : s + 1] for s in range(len(single))})
            else:
                parts["single"] = single
            if bool((contexts[~shared, 0] != 1).any()):
                parts["factor"] = contexts[~shared, 0].contiguous()
        parts["psi"] = self.psi.to(index_dtype(k + self.singles))
        return parts

    def planned(self, plan: BankPlan) -> BankPlan:
        """The plan of the bank as it is: its c and its locations."""
        return replace(plan, context=self.context, locations=self.locations)

    def settle(self, plan: BankPlan, placements: Sequence[Placement]) -> tuple[RowsBank, list[Placement]]:
        """The part of the bank that sharing makes smaller; see `surgery.methods.rows.settling`."""
        return settle_rows(self, placements, torch_dtype(plan.dtype).itemsize)

    def location_parameters(self, placements: Sequence[Placement], first: bool = True) -> Tensor:
        """Parameters of rows and contexts; a hypermodule that at most c locations use counts as their blocks."""
        return count_parameters(self, placements)

    # -- memory --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def give_up(self, blocks: Callable[[], Iterable[tuple[int, Tensor]]]) -> Callable[[], None] | None:
        """Free the rows of an exact start, of which each is the block of some location."""
        if type(self) is not RowsBank or self.hypermodules or self.origin is not None or self.columns.partial:
            return None
        found = torch.zeros(len(self.rows), dtype=torch.bool, device=self.device)
        for start, mine in blocks():
            rows, same = self._taken(start, mine)
            if not torch.equal(bits(self.rows[rows]), bits(same)):
                return None
            found[rows] = True
        if not found.all():
            return None
        shape = self.rows.shape
        self.rows.data = self.rows.new_empty(0, shape[1])

        def take_back() -> None:
            table = self.rows.new_empty(shape)
            for start, mine in blocks():
                rows, same = self._taken(start, mine)
                table[rows] = same
            self.rows.data = table

        return take_back

    def _taken(self, start: int, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Rows that are the blocks of locations from `start` on as they are, and these blocks."""
        stop = start + len(blocks)
        whole = self.contexts[start:stop, 0] == 1
        return self.psi[start:stop][whole], blocks.to(self.device)[whole]

    # -- values that others give ---------------------------------------------------------------------------

    def refuses(self, locations: Tensor) -> str:
        """Why blocks cannot be overwritten: a block can where it has a row of its own, which then becomes the block."""
        if self.columns.partial:
            return "several processes hold parts of its blocks"
        psi = self.psi[locations]
        if self.context > 1 and bool((psi < self.hypermodules).any()):
            count = int((psi < self.hypermodules).sum())
            return f"{count:,} of {len(psi):,} blocks are sums of {self.context} basis blocks"
        if count := int((self.uses[psi] > 1).sum()):
            return f"{count:,} of {len(psi):,} blocks share rows with other places"
        return ""

    def write(self, locations: Tensor, blocks: Tensor) -> None:
        """Overwrite the blocks at locations that `refuses` has let pass."""
        index, _ = self.codes()
        self.rows[index[locations, 0]] = blocks
        contexts = self.contexts[locations]
        contexts[:, 0] = 1
        self.contexts[locations] = contexts
        if self.origin is not None:
            self.origin[locations.to("cpu")] = blocks.to("cpu", self.origin.dtype)


def rows_bank(bank: Bank) -> RowsBank:
    """A bank that is known to have rows and codes."""
    assert isinstance(bank, RowsBank)
    return bank


def exact_bank(blocks: Tensor, block: tuple[int, int], context: int = 1) -> RowsBank:
    """The lossless start: every distinct block is a single row; identical blocks share one.

    Blocks equal up to a factor share a row too where the factor gives every value back bit for bit.

    Args:
        blocks: `[L, m*n]`, float32 or float64; the bank takes it over where no two are equal.
        block: (m, n).
        context: c that later hypermodules will have.
    """
    return RowsBank(block, *distinct(blocks, context), hypermodules=0)


def bits(tensor: Tensor) -> Tensor:
    """Rows as integers: 0.0 is not -0.0, and NaN is itself."""
    return tensor.contiguous().view(torch.int64 if tensor.dtype == torch.float64 else torch.int32)


def codes(psi: Tensor, contexts: Tensor, hypermodules: int) -> tuple[Tensor, Tensor]:
    """The code of each location: `psi [L]`, `contexts [L, c]` -> `index [L, c]`, `coefficient [L, c]`. # Eq. (5)

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
    # Where no location is shared the mask below is the contexts themselves; it keeps stray gradients off the zeros.
    coefficient = torch.where(shared | (basis == 0), contexts, torch.zeros_like(contexts))
    return index, coefficient
