"""The interface of a bank: what a method keeps to generate tensors of the members.

A bank has L locations; of each it generates one block of m x n elements. Whatever a method keeps for that, rows and
codes or two factors of a product, is its own: the joint model, slots, training and artifacts use what stands here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from surgery.util.stamps import Stamp, stamp, tensors_of, versions

if TYPE_CHECKING:
    from surgery.anatomy.plan import BankPlan, Placement

Parts = dict[str, Tensor]
"""Tensors by name, such as `rows.0` or `left`."""


@dataclass(frozen=True)
class Trained:
    """Parameters that an optimizer steps alike.

    Attributes:
        role: what they are, such as `rows` or `contexts`; the optimizer has one group for each role.
        parameters: those that are trained.
        decay: whether they decay as weights do.
        lr: learning rate; by default that of the run.
        scheduled: whether the learning rate follows the run's schedule.
        options: of the optimizer, such as `eps`.
    """

    role: str
    parameters: tuple[nn.Parameter, ...]
    decay: bool = True
    lr: float | None = None
    scheduled: bool = True
    options: Mapping[str, float] = field(default_factory=dict)


class Bank(nn.Module, ABC):
    """The blocks of L locations, as some method generates them.

    A subclass registers what it keeps as parameters and buffers, which makes it train, move, copy and resume.

    Attributes:
        form: name of the method whose `unpack` reads what `pack` returns.
        by_task: whether blocks depend on the task that is served.
        block: (m, n).
    """

    form: ClassVar[str]
    by_task: ClassVar[bool] = False
    block: tuple[int, int]

    @property
    @abstractmethod
    def locations(self) -> int:
        """L, the number of locations."""

    @property
    def width(self) -> int:
        """Elements of a block, m*n, also where a process holds only some of its columns."""
        return self.block[0] * self.block[1]

    @property
    def divisible(self) -> bool:
        """Whether blocks have the same bits alone as among others, so that they may be generated piece by piece."""
        return False

    @property
    def device(self) -> torch.device:
        """The device that the bank lies on."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the blocks that it generates."""
        return next(self.parameters()).dtype

    @property
    def learns(self) -> bool:
        """Whether any parameter of it requires gradients."""
        return any(p.requires_grad for p in self.parameters())

    def versions(self) -> Stamp:
        """Version counters of all tensors that blocks are generated from; a write to any of them changes the result."""
        return versions(tensors_of(self))

    def stamp(self) -> Stamp:
        """`versions` with a few sampled values besides, since some writes leave version counters as they are."""
        return stamp((*self.parameters(), *self.buffers()))

    # -- weights that lie elsewhere ------------------------------------------------------------------------

    def held(self, p: Placement) -> Tensor | None:
        """The weight of a site, where the bank holds it whole and mapped from a file; callers must not write to it.

        Args:
            p: of the site in the bank.
        """
        return None

    def lent(self) -> Iterable[tuple[Placement, Tensor]]:
        """The weights of sites that the bank holds whole, mapped so that memory is taken only by what is written to."""
        return ()

    # -- generating ----------------------------------------------------------------------------------------

    @abstractmethod
    def blocks(self, start: int = 0, stop: int | None = None, task: str | None = None) -> Tensor:
        """Generate the blocks `[L', m*n]` of locations `start` to `stop`; differentiable.

        Args:
            start: first location.
            stop: one past the last location; the end by default.
            task: whose blocks, where they depend on it.
        """

    @torch.no_grad()
    def settled_blocks(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Blocks `[L', m*n]` for collapse: those that training did not move are the original ones, bit for bit.

        A block has the same bits whatever range it is asked for in: by default all blocks are generated, and those that
        are not asked for are dropped. A method whose blocks are generated one by one overrides it.

        Args:
            start: first location.
            stop: one past the last location; the end by default.
        """
        return self.blocks().detach()[start:stop]

    @torch.no_grad()
    def portable_blocks(self, start: int, stop: int) -> Tensor:
        """Blocks `[L', m*n]` with the same bits on every machine, by which content hashes are made.

        Sums take one fixed order and products are rounded one by one. By default in float64 on the CPU, rounded once,
        which leaves the order of sums to a kernel: a method that sums many terms overrides it.
        """
        exact = self.blocks(start, stop).detach()
        return exact if exact.dtype == torch.float64 else self._in_double(start, stop).to(exact.dtype)

    def _in_double(self, start: int, stop: int) -> Tensor:
        from copy import deepcopy

        return deepcopy(self).cpu().double().blocks(start, stop).detach()

    # -- what training needs -------------------------------------------------------------------------------

    def trained(self) -> list[Trained]:
        """What an optimizer steps: by default every parameter that requires gradients, under the method's name."""
        return [Trained(self.form, tuple(p for p in self.parameters() if p.requires_grad))]

    def state(self) -> Parts:
        """The bank's own tensors that training changes, as a run's state records them."""
        return {name: t.detach() for name, t in (*self.named_parameters(), *self.named_buffers())}

    def misfits(self, state: Mapping[str, Tensor]) -> list[str]:
        """Reasons why `restore` cannot take a state, in words such as `must have left of [4, 2], found [4, 3]`."""
        wrong = []
        for name, own in self.state().items():
            if name not in state:
                wrong.append(f"has no {name}")
            elif (state[name].dtype, state[name].shape) != (own.dtype, own.shape):
                found = state[name]
                wrong.append(
                    f"must have {name} of {own.dtype} {[*own.shape]}, found {found.dtype} {[*found.shape]}"
                )
        return wrong

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take over a state in which `misfits` finds nothing wrong."""
        for name, own in self.state().items():
            own.copy_(state[name])

    @property
    def mixable(self) -> bool:
        """Whether two states can be mixed location by location; see `mixed`."""
        return False

    def mixed(self, kept: Mapping[str, Tensor], now: Mapping[str, Tensor], fresh: Tensor) -> Parts:
        """A state in which the locations `fresh [L]` are as in `now` and all others as they were `kept`.

        Args:
            kept: a state of an earlier time, as `state` returns it.
            now: of a later one.
            fresh: boolean.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot mix states")

    # -- what is stored ------------------------------------------------------------------------------------

    @property
    def packable(self) -> bool:
        """Whether `pack` loses nothing; a bank of which it does has to be settled first."""
        return True

    @abstractmethod
    def pack(self, plan: BankPlan, like: Collection[str] = ()) -> Parts:
        """The parts that an artifact stores, by name; the `unpack` of the method named by `form` is the inverse.

        Args:
            plan: of this bank.
            like: the parts that it was stored as before, where there is a choice.
        """

    def planned(self, plan: BankPlan) -> BankPlan:
        """The bank's plan as it is by now; by default the plan that the bank was made by."""
        return plan

    def settle(self, plan: BankPlan, placements: Sequence[Placement]) -> tuple[Bank, list[Placement]]:
        """The part of the bank that is worth storing: a bank, and the placements that it still generates, moved.

        Sites that are left out become plain tensors. By default everything stays.
        """
        return self, list(placements)

    def location_parameters(self, placements: Sequence[Placement], first: bool = True) -> Tensor:
        """Parameters that each location takes after collapse `[L]`, float64; by default its part of all of them.

        Args:
            placements: of the bank.
            first: whether what several banks of a stack share is counted here.
        """
        whole = sum(p.numel() for p in self.parameters())
        return torch.full((self.locations,), whole / max(self.locations, 1), dtype=torch.float64)

    # -- memory --------------------------------------------------------------------------------------------

    def give_up(self, blocks: Callable[[], Iterable[tuple[int, Tensor]]]) -> Callable[[], None] | None:
        """Free tensors that can be made again, bit for bit, from blocks that somebody else holds.

        The bank is not used in between. By default nothing is freed.

        Args:
            blocks: gives the blocks of all locations, piece by piece: the first location, and `[N, m*n]` from it on.

        Returns:
            what takes everything back, of the same blocks; None where nothing was freed.
        """
        return None

    # -- values that others give ---------------------------------------------------------------------------

    def refuses(self, locations: Tensor) -> str:
        """Why the blocks at these locations cannot be overwritten, in words; empty where they can."""
        return f"{self.form} generates its blocks"

    def write(self, locations: Tensor, blocks: Tensor) -> None:
        """Overwrite the blocks at locations `[N]`, which `refuses` has let pass, with blocks `[N, m*n]`."""
        raise NotImplementedError(f"{type(self).__name__} refuses every location")

    def repeats(self) -> tuple[Tensor, Tensor] | None:
        """Where several locations take one row as it is: the row of each location `[L]`, and the rows `[S, m*n]`.

        Whole tensors that are one row then share memory. None where there is nothing to share.
        """
        return None

    # -- generation in one go ------------------------------------------------------------------------------

    def together(self) -> object | None:
        """A key, or None; banks with equal keys are generated in one call of `generate_together`."""
        return None

    @staticmethod
    def generate_together(banks: Sequence[Bank], task: str | None = None) -> Tensor:
        """The blocks of several banks of equal L side by side, `[L, sum of m*n]`."""
        return torch.cat([bank.blocks(task=task) for bank in banks], 1)
