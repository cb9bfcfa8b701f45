"""Hypermodules in training: rows and codes whose alignment is open, with contests and diagonals."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from surgery.anatomy.plan import BankPlan
from surgery.core.bank import Parts, Trained
from surgery.methods.hypermodules.contest import Contest
from surgery.methods.rows.bank import RowsBank


class HypermoduleBank(RowsBank):
    """Hypermodules of c basis blocks, and which of them each location uses.

    Attributes:
        contest: the alternatives that compete while training decides between them, else None.
        diagonals: parameter `[L, min(m, n)]`, added to the blocks' own diagonals, else None.
        scale: `[L]`, and
        size: `[K]`: a location's contexts are multiplied by `scale_l / size_k`, which is not trained (see
            `methods.hypermodules.balance`); None where they are used as they are.
        pull: `[L, m*n]`, the gradients of all blocks are added here as they come; None where nobody asks for them.
        kept: `[L]` locations whose blocks must not change while others are trained; None where all may.
    """

    form: ClassVar[str] = "rows"
    contest: Contest | None
    diagonals: nn.Parameter | None
    scale: Tensor | None
    size: Tensor | None
    pull: Tensor | None
    kept: Tensor | None

    def __init__(
        self, block: tuple[int, int], rows: Tensor, psi: Tensor, contexts: Tensor, hypermodules: int
    ):
        super().__init__(block, rows, psi, contexts, hypermodules)
        self.register_module("contest", None)
        self.register_parameter("diagonals", None)
        self.register_buffer("scale", None, persistent=False)
        self.register_buffer("size", None, persistent=False)
        self.register_buffer("kept", None, persistent=False)
        self.register_buffer("pull", None, persistent=False)
        self._factors: tuple[Tensor, int, Tensor, Tensor] | None = None

    @classmethod
    def of(cls, bank: RowsBank) -> HypermoduleBank:
        """The same bank, ready to be trained; parameters are the same objects."""
        if isinstance(bank, cls):
            return bank
        made = cls(bank.block, bank.rows.detach(), bank.psi, bank.contexts.detach(), bank.hypermodules)
        made.rows, made.contexts, made.origin = bank.rows, bank.contexts, bank.origin
        return made.train(bank.training)

    # -- what stays ----------------------------------------------------------------------------------------

    @property
    def free(self) -> Tensor:
        """The locations that may change: `[L']`, ascending."""
        if self.kept is None:
            return torch.arange(self.locations, device=self.device)
        return (~self.kept).nonzero().squeeze(1)

    @property
    def kept_hypermodules(self) -> Tensor:
        """Which hypermodules have users that must not change: `[K]`, boolean."""
        found = torch.zeros(self.hypermodules, dtype=torch.bool, device=self.device)
        if self.kept is not None:
            found[self.psi[self.kept]] = True
        return found

    @torch.no_grad()
    def hold(self) -> None:
        """Take the gradients of what must not change away; an optimizer without decay then leaves it as it is."""
        if self.kept is None:
            return
        if self.rows.grad is not None:
            self.rows.grad[self.kept_hypermodules.repeat_interleave(self.context)] = 0
        for own in (self.contexts, self.diagonals):
            if own is not None and own.grad is not None:
                own.grad[self.kept] = 0

    # -- factors -------------------------------------------------------------------------------------------

    def set_factors(self, scale: Tensor, size: Tensor) -> None:
        """Multiply contexts by `scale [L] / size [K]` from now on."""
        self.scale, self.size = scale.to(self.rows), size.to(self.rows)

    def factors_of(self, locations: Tensor, hypermodules: Tensor) -> Tensor | None:
        """By what contexts are multiplied at some locations `[N]` with hypermodules `[N, A]`: `[N, A]`, or None."""
        if self.scale is None or self.size is None:
            return None
        return self.scale[locations].unsqueeze(1) / self.size[hypermodules]

    @property
    def factors(self) -> Tensor:
        """By what the contexts of each location are multiplied: `[L]`, kept while the alignment stays as it is."""
        if self.scale is None or self.size is None:
            return torch.ones(self.locations, dtype=self.rows.dtype, device=self.device)
        known = self._factors
        if (
            known is None
            or known[0] is not self.psi
            or known[1] != self.psi._version
            or known[2] is not self.size
        ):
            known = self._factors = (self.psi, self.psi._version, self.size, self.scale / self.size[self.psi])
        return known[3]

    @property
    def coefficients(self) -> Tensor:
        """Contexts times factors."""
        return self.contexts if self.scale is None else self.contexts * self.factors.unsqueeze(1)

    def blocks(self, start: int = 0, stop: int | None = None, task: str | None = None) -> Tensor:
        """Generate blocks; while a contest is open, alternatives weighted. # Eq. (5), Eq. (8)"""
        if self.contest is None:
            blocks = super().blocks(start, stop)
        else:
            with torch.autocast(self.rows.device.type, enabled=False):
                blocks = self.contest.blocks(self.rows, self.contexts, start, stop, self.coefficients)
        if self.pull is not None and blocks.requires_grad:
            part = self.pull[start : start + len(blocks)]
            blocks.register_hook(lambda gradient: (part.add_(gradient), None)[1])
        return blocks if self.diagonals is None else self._on_diagonals(blocks, self.diagonals[start:stop])

    def add_diagonals(self) -> None:
        """Give every location a diagonal of its own, 0 at first."""
        size = (self.locations, min(self.block))
        self.diagonals = nn.Parameter(torch.zeros(size, dtype=self.rows.dtype, device=self.rows.device))

    def _on_diagonals(self, blocks: Tensor, diagonals: Tensor) -> Tensor:
        m, n = self.block
        places = torch.arange(min(m, n), device=blocks.device) * (n + 1)
        own, places = self.columns.find(places)
        diagonals = diagonals[:, own]
        return blocks.index_add(1, places, diagonals)

    @property
    def divisible(self) -> bool:
        """As of rows and codes; not while alternatives compete."""
        return self.contest is None and super().divisible

    @property
    def own_elements(self) -> int:
        """As of rows and codes, with the diagonal."""
        return super().own_elements + (0 if self.diagonals is None else self.diagonals.shape[1])

    @torch.no_grad()
    def settled_blocks(self, start: int = 0, stop: int | None = None) -> Tensor:
        """As of rows and codes, with diagonals; alternatives do not count."""
        if self.diagonals is None:
            return super().settled_blocks(start, stop)
        blocks = self._sums(start, stop)
        if self.diagonals.any():
            blocks = self._on_diagonals(blocks, self.diagonals[start:stop])
        return self._restored(blocks, start, stop)

    def trained(self) -> list[Trained]:
        """Rows; contexts and diagonals."""
        rows, contexts = super().trained()
        own = () if self.diagonals is None else (self.diagonals,)
        return [rows, Trained("contexts", (*contexts.parameters, *own), decay=False)]

    def state(self) -> Parts:
        """Rows, contexts, alignment, diagonals and factors; an open contest is kept beside it."""
        own = {"diagonals": self.diagonals, "scale": self.scale, "size": self.size}
        return {**super().state(), **{name: t.detach() for name, t in own.items() if t is not None}}

    def misfits(self, state: Mapping[str, Tensor]) -> list[str]:
        """As of rows and codes; each hypermodule has a size, above 0."""
        own, size = self.size, state.get("size")
        if own is None or size is None or not isinstance(state.get("rows"), Tensor):
            return super().misfits(state)
        count = len(state["rows"]) // self.context
        if wrong := super().misfits({**state, "size": size if size.shape != (count,) else own}):
            return wrong
        factors = torch.cat([size, state["scale"]])
        if size.dtype != own.dtype or not bool((factors.isfinite() & (factors > 0)).all()):
            return ["must have factors above 0"]
        return []

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take a state; no contest is open afterwards."""
        super().restore(state)
        if self.diagonals is not None:
            self.diagonals.copy_(state["diagonals"])
        if self.scale is not None:
            self.set_factors(
                state["scale"].to(self.device, copy=True), state["size"].to(self.device, copy=True)
            )
        self.contest = None

    @property
    def mixable(self) -> bool:
        """Each state brings its rows."""
        return True

    def mixed(self, kept: Mapping[str, Tensor], now: Mapping[str, Tensor], fresh: Tensor) -> Parts:
        """Rows of both states that some location uses; what shares a row in one of them goes on to."""
        c, count = self.context, len(kept["rows"]) // self.context
        psi = torch.where(fresh, now["psi"] + count, kept["psi"])
        used, psi = torch.unique(psi, return_inverse=True)
        rows = (used.unsqueeze(1) * c + torch.arange(c)).reshape(-1)
        own = fresh.unsqueeze(1)
        found = {
            name: torch.where(own if tensor.ndim > 1 else fresh, now[name], tensor)
            for name, tensor in kept.items()
            if name not in ("rows", "psi", "size")
        }
        if "size" in kept:
            found["size"] = torch.cat([kept["size"], now["size"]])[used]
        return {"rows": torch.cat([kept["rows"], now["rows"]])[rows], "psi": psi, **found}

    @property
    def packable(self) -> bool:
        """Diagonals have no stored form: they become part of blocks."""
        return self.diagonals is None

    def pack(self, plan: BankPlan, like: Collection[str] = ()) -> Parts:
        """As rows and codes."""
        if self.diagonals is not None:
            raise ValueError("a bank with diagonals has to be settled before it is stored")
        return super().pack(plan, like)

    def refuses(self, locations: Tensor) -> str:
        """As of rows and codes; and nothing is written while alternatives compete, or beside diagonals."""
        if self.contest is not None:
            return "alternatives compete for its blocks"
        if self.diagonals is not None:
            return "each of its blocks has a diagonal of its own"
        return super().refuses(locations)

    def write(self, locations: Tensor, blocks: Tensor) -> None:
        """As of rows and codes, with a factor of 1."""
        super().write(locations, blocks)
        if self.scale is not None and self.size is not None:
            self.scale[locations] = self.size[self.psi[locations]]
            self._factors = None
