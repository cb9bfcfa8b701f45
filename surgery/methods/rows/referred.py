"""Rows of an exact start that stay where they are: in the files that the members' weights are mapped from.

Joining large models has no room for a copy of their weights, and most of what is done with a joint model that was just
joined, planning, fitting and saving, asks for weights one after another. Here blocks are cut from the files when they
are asked for. Rows, alignment and factors become tensors in memory, and the bank an ordinary one, as soon as anybody
asks for its parameters: an optimizer, a backward pass, a move to a device.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from surgery.anatomy.plan import BankPlan, Placement
from surgery.core.bank import Bank, Parts
from surgery.methods.rows.bank import RowsBank, bits
from surgery.methods.rows.duplicates import duplicates_among
from surgery.methods.rows.sources import SiteBlocks
from surgery.util.stamps import Stamp

_MADE = ("rows", "contexts", "psi")
_REGISTRIES = ("_parameters", "_buffers", "_modules")


class ReferredRows(RowsBank):
    """The exact start of sites whose weights lie in files.

    Args:
        block: (m, n).
        source: blocks of all sites.

    Attributes:
        made: whether rows, alignment and factors are tensors in memory.
    """

    def __init__(self, block: tuple[int, int], source: SiteBlocks):
        nn.Module.__init__(self)
        self.block, self.context, self.hypermodules = block, 1, 0
        self.register_buffer("origin", None, persistent=False)
        self._code = None
        self._source, self.made = source, False
        found = duplicates_among(source)
        source.forget()
        self._first: Tensor | None = (
            None  # the location of each single row; each location's own where no two share one
        )
        self._codes: tuple[Tensor, Tensor] | None = None
        if found is not None:
            self._first, psi = torch.unique(found[0], return_inverse=True)
            self._codes = psi, found[1].unsqueeze(1)
        self._as_made: tuple[Stamp, Stamp] = (), ()

    # -- what is where, without making it ------------------------------------------------------------------

    @property
    def locations(self) -> int:
        """L, the number of locations."""
        return super().locations if self.made else len(self._source)

    @property
    def singles(self) -> int:
        """S, the number of single rows."""
        if self.made:
            return super().singles
        return len(self._source) if self._first is None else len(self._first)

    @property
    def device(self) -> torch.device:
        """The device of rows and codes; files are read into the CPU's memory."""
        return super().device if self.made else torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the blocks that it generates."""
        return super().dtype if self.made else self._source.dtype

    @property
    def learns(self) -> bool:
        """Whether anything of it is trained."""
        return super().learns if self.made else True

    def versions(self) -> Stamp:
        """Versions of rows and codes; always the same while these are what the files hold."""
        same = not self.made or super().versions() == self._as_made[0]
        return (id(self._source),) if same else super().versions()

    def stamp(self) -> Stamp:
        """As `versions`, with a few values."""
        return (id(self._source),) if self._untouched() else super().stamp()

    def _untouched(self) -> bool:
        return not self.made or super().stamp() == self._as_made[1]

    # -- reading files -------------------------------------------------------------------------------------

    def held(self, p: Placement) -> Tensor | None:
        """A site's weight as its file has it."""
        return None if self.made else self._source.weight(p)

    def lent(self) -> Iterator[tuple[Placement, Tensor]]:
        """The weights of all sites, mapped once more for somebody who may write to them."""
        return iter(()) if self.made else self._source.lent()

    def blocks(self, start: int = 0, stop: int | None = None, task: str | None = None) -> Tensor:
        """Generate the blocks `[L', m*n]` of locations `start` to `stop`; differentiable."""
        if self.made or torch.is_grad_enabled():
            return super().blocks(start, stop, task)
        return self._source.range(*slice(start, stop).indices(self.locations)[:2])

    def settled_blocks(self, start: int = 0, stop: int | None = None) -> Tensor:
        """The original blocks `[L', m*n]`."""
        if self.made:
            return super().settled_blocks(start, stop)
        return self._source.range(*slice(start, stop).indices(self.locations)[:2])

    def portable_blocks(self, start: int, stop: int) -> Tensor:
        """The original blocks, which are sums of one term."""
        return super().portable_blocks(start, stop) if self.made else self._source.range(start, stop)

    def row_values(self, index: Tensor) -> Tensor:
        """Single rows by their numbers `[N]`, which the caller may keep."""
        if self.made:
            return super().row_values(index)
        return self._source.take(index if self._first is None else self._first[index])

    def settle(self, plan: BankPlan, placements: Sequence[Placement]) -> tuple[RowsBank, list[Placement]]:
        """Nothing is worth generating where no two blocks share a row."""
        if not self.made and self._first is None:
            return self, []
        return super().settle(plan, placements)

    def repeats(self) -> tuple[Tensor, Tensor] | None:
        """None where no two locations take one row."""
        return None if not self.made and self._first is None else super().repeats()

    # -- becoming an ordinary bank -------------------------------------------------------------------------

    def make(self) -> None:
        """Read all rows into memory, in which they can be trained."""
        if self.made:
            return
        self.made = True
        with torch.inference_mode(False), torch.no_grad():
            psi, contexts = self._known_codes()
            self.rows = nn.Parameter(self._all_rows())
            self.contexts = nn.Parameter(contexts.clone())
            self.register_buffer("psi", psi.clone())
        self._as_made = super().versions(), super().stamp()

    def _known_codes(self) -> tuple[Tensor, Tensor]:
        """Alignment `[L]` and factors `[L, 1]`."""
        if self._codes is None:
            count, dtype = len(self._source), self._source.dtype
            self._codes = torch.arange(count), torch.ones(count, 1, dtype=dtype)
        return self._codes

    def _all_rows(self) -> Tensor:
        """All single rows `[S, m*n]`, read site by site."""
        if self._first is not None:
            rows = self._source.take(self._first)
            self._source.forget()
            return rows
        rows = torch.empty(len(self._source), self.width, dtype=self._source.dtype)
        for start, part in self._source.pieces():
            rows[start : start + len(part)] = part
        return rows

    def __getattr__(self, name: str) -> Any:
        if name in _MADE and not self.__dict__.get("made", True):
            if name != "rows":
                return self._known_codes()[name == "contexts"]
            self.make()
        return super().__getattr__(name)

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        """`nn.Module.named_modules` once rows and codes are in memory, since parameters are found through it."""
        self.make()
        return super().named_modules(*args, **kwargs)

    def state(self) -> Parts:
        """Rows, contexts and alignment."""
        self.make()
        return super().state()

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take over a state in which `misfits` finds nothing wrong."""
        self.make()
        super().restore(state)

    def write(self, locations: Tensor, blocks: Tensor) -> None:
        """Overwrite the blocks at locations that `refuses` has let pass."""
        self.make()
        super().write(locations, blocks)

    def pack(self, plan: BankPlan, like: Collection[str] = ()) -> Parts:
        """The parts that an artifact stores."""
        self.make()
        return super().pack(plan, like)

    def give_up(self, blocks: Callable[[], Iterable[tuple[int, Tensor]]]) -> Callable[[], None] | None:
        """Forget rows that are still what the files hold: they are read again when they are asked for."""
        if not self.made or not self._untouched() or not torch.equal(bits(self.rows), bits(self._all_rows())):
            return None
        for name in _MADE:
            delattr(self, name)
        self.made = False
        return lambda: None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Bank:
        probe = torch.empty(0, dtype=self.dtype)
        if not self.made and (moved := fn(probe)).dtype == probe.dtype and moved.device == probe.device:
            return self
        self.make()
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.make()
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.make()
        super()._load_from_state_dict(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        learns = self.rows.requires_grad, self.contexts.requires_grad
        return _plain_bank, (self.block, self.rows.detach(), self.psi, self.contexts.detach(), learns)

    def __deepcopy__(self, memo: dict) -> RowsBank:
        if not self.made:
            copied = memo[id(self)] = object.__new__(type(self))
            vars(copied).update(vars(self))
            vars(copied).update({name: dict(vars(self)[name]) for name in _REGISTRIES})
            return copied
        copied = memo[id(self)] = object.__new__(type(self))
        vars(copied).update(deepcopy(vars(self), memo))
        return copied


def _plain_bank(
    block: tuple[int, int], rows: Tensor, psi: Tensor, contexts: Tensor, learns: tuple[bool, bool]
) -> RowsBank:
    """A bank that was unpickled, which refers to no file."""
    bank = RowsBank(block, rows, psi, contexts, hypermodules=0)
    bank.rows.requires_grad_(learns[0])
    bank.contexts.requires_grad_(learns[1])
    return bank
