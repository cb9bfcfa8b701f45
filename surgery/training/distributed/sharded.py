"""Sharded: joint training in which each process holds a part of everything that is large.

Of every bank a process holds some columns of all rows, with their gradients and optimizer state: a bank is cut, and
all that changes it stays what it was (`methods.rows.columns`); banks without rows are whole in every process. Members
are PyTorch's FSDP modules. Before a step
each process generates its columns of all blocks; site by site these are gathered, made a weight, and each keeps its
chunk.
Forward and backward passes gather weights layer by layer, as FSDP does. Afterwards each site's gradient is gathered in
its turn, and each process takes the columns that go back through its part of the dictionary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from surgery.anatomy.plan import Placement
from surgery.core.bank import Bank
from surgery.core.generation import Weights, to_blocks, to_weight
from surgery.core.joint import JointModel
from surgery.members.extra_state import extra_state_of, set_extra_state
from surgery.methods.rows.bank import RowsBank
from surgery.slots.filler import Filler
from surgery.slots.gate import unwatched
from surgery.slots.hooks import Enter, Leave
from surgery.slots.serving import Tasks
from surgery.slots.slots import Slots, locate, put_back, reorder
from surgery.storage.keys import StateKey
from surgery.training.distributed.columns import SomeColumns
from surgery.training.distributed.fsdp import Sharding
from surgery.training.distributed.shards import ChunkPart, ColumnPart, Part, reshard
from surgery.training.loop.state import own_part
from surgery.util.collectives import add_up
from surgery.util.copies import duplicate


class ShardedFiller(Filler):
    """Gives every process its chunks of the weights that the dictionary generates.

    Args:
        joint: the joint model, while it is cut.
    """

    joint: ShardedModel

    def refresh(self, members: Any = None) -> None:
        """Fill the chunks of all members from the dictionary as it is now; all processes call it."""
        self.refuse_in_step("Filling the slots")
        with torch.inference_mode(False), torch.no_grad():
            self.joint.fill_sites()
        self.filled = {name: self._generated_from(name) for name in self.joint.names}

    def enter(self, name: str, path: str) -> bool:
        """Before a member runs outside of a step: make its weights what the dictionary says."""
        if not self.in_step and not self.is_filled(name):
            self.refresh()
        return True

    def leave(self, name: str, path: str) -> None:
        """After a member ran outside of a step: give up what its forward pass gathered."""
        if not self.in_step:
            reshard(self.joint[name])

    @contextmanager
    def step(self) -> Iterator[Weights]:
        """As in one process; afterwards all gradients are those of the mean over the processes."""
        edges = self.joint.fill_sites()
        self.in_step = True
        try:
            yield {}
            self.joint.go_back(edges)
        finally:
            self.in_step = False
            self.filled.clear()
            reshard(self.joint.bodies)


class ShardedModel(JointModel):
    """A joint model for the time of its training, cut over processes that all make it alike.

    Args:
        joint: opened, on the CPU. Its dictionary is cut and its slots are emptied until `give_back`.
        sharding: how members are cut.

    Attributes:
        parts: how each tensor that is held in parts is cut, by its name in `model_tensors`.
        chunks: how each private tensor that is held in parts is cut, by the identity of what the optimizer gets of it.
    """

    def __init__(self, joint: JointModel, sharding: Sharding):
        nn.Module.__init__(self)
        self._given = (joint,)  # a tuple: it is not part of this module
        self.sharding, self.plan, self.dictionary = sharding, joint.plan, joint.dictionary
        self.owners, self.state_keys = joint.owners, joint.state_keys
        self.encoded = joint.encoded
        self.slots, self.filler = Slots(), ShardedFiller(self)
        self.task = None
        copies = self._copy_members()
        self.members = {name: replace(m, module=copies[name]) for name, m in joint.members.items()}
        self.bodies = nn.ModuleList(copies.values())
        self.tasks = Tasks(self.bodies)
        self.parts: dict[StateKey, Part] = {}
        self._shard_members()
        self._placed = {key: self.plan.in_bank(key) for key in self.dictionary}
        self._origins: dict[str, tuple[nn.Parameter, Tensor]] = {}
        self._rows: dict[str, RowsBank] = {}  # banks that are cut; all others are whole in every process
        for key in self.dictionary:
            self._cut(key, self.dictionary[key])
        self.dictionary._apply(lambda tensor: tensor.to(sharding.device))

    # -- cutting -------------------------------------------------------------------------------------------

    def _copy_members(self) -> dict[str, nn.Module]:
        """Copies with a parameter for every slot; the given members keep none of the slots' memory."""
        joint, memo = self._given[0], {}
        for p in self.plan.placements:
            slot = getattr(*locate(joint[p.site.member], p.site.owners[0]))
            memo[id(slot)] = slot  # not copied
        with ExitStack() as stack:
            for name in joint.names:
                stack.enter_context(unwatched(joint[name]))
            copies = {name: duplicate(joint[name], memo) for name in joint.names}
        for name, copy in copies.items():
            for p in self.plan.of(name):
                weight = getattr(*locate(copy, p.site.owners[0]))
                learns = any(x.requires_grad for x in self.dictionary[p.bank].parameters())
                put_back(copy, p.site.owners, weight, learns and self.trains(name, p.site.name))
                joint.slots.put(name, p.site.name, torch.empty_like(weight, device="meta").detach())
            reorder(copy, self.state_keys[name])
        return copies

    def _shard_members(self) -> None:
        """Make the copies FSDP modules; private tensors that members share stay whole in every process."""
        users = Counter(id(p) for name in self.names for p in self[name].parameters())
        shared = {p for p in self.bodies.parameters() if users[id(p)] > 1}
        for name in self.names:
            module = self[name]
            self.sharding.apply(name, module, shared & set(module.parameters()))
            # Before FSDP's own hook gathers weights, they must be what the dictionary says.
            module.register_forward_pre_hook(Enter(self, name, ""), prepend=True)
            module.register_forward_hook(Leave(self, name, ""), always_call=True)
        self._sites = {
            (p.site.member, p.site.name): getattr(*locate(self[p.site.member], p.site.owners[0]))
            for p in self.plan.placements
        }
        for name in self.names:
            for first in self.owners[name]:
                own = getattr(*locate(self[name], first))
                if own_part(own) is not own:
                    self.parts[StateKey("member", name, first)] = self._chunks(own.shape)
        self._private: list[tuple[nn.Parameter, nn.Parameter]] = []
        self.chunks: dict[int, Part] = {}
        for path, given in self._given[0].bodies.named_parameters():
            number, _, name = path.partition(".")
            own = getattr(*locate(self[self.names[int(number)]], name))
            # Optimizers get plain tensors: parts of one group need not be of one kind, and steps are faster.
            local = own if own_part(own) is own else nn.Parameter(own_part(own).detach())
            if given.requires_grad:
                self._private.append((own, local))
            if local is not own:
                self.chunks[id(local)] = self._chunks(own.shape)

    def _cut(self, key: str, bank: Bank) -> None:
        if not isinstance(bank, RowsBank):
            return
        columns = SomeColumns(bank.width, self.sharding.rank, self.sharding.world)
        part = self.parts[StateKey("bank", key, "rows")] = ColumnPart(columns)
        self._rows[key], bank.columns = bank, columns
        bank.rows = nn.Parameter(part.own(bank.rows.detach()), requires_grad=bank.rows.requires_grad)
        if bank.origin is not None:  # not needed until the end: it stays on the CPU
            self._origins[key], bank.origin = (bank.contexts, part.own(bank.origin)), None

    def part_of(self, parameter: nn.Parameter) -> Part | None:
        """How a parameter is cut, as the optimizer gets it; None where every process holds all of it."""
        for key, bank in self._rows.items():
            if bank.rows is parameter:
                return self.parts[StateKey("bank", key, "rows")]
        return self.chunks.get(id(parameter))

    def _chunks(self, shape: torch.Size) -> ChunkPart:
        return ChunkPart(shape, self.sharding.rank, self.sharding.world)

    # -- generating ------------------------------------------------------------------------------------------

    def trained_private(self) -> list[nn.Parameter]:
        """What this process holds of the private parameters that are trained, as plain tensors."""
        return [local for _, local in self._private]

    def stepped(self, parameter: nn.Parameter) -> nn.Parameter:
        """What this process holds of a private parameter."""
        return next((local for own, local in self._private if own is parameter), parameter)

    def trains(self, name: str, site: str) -> bool:
        """As in the joint model that was given."""
        return self._given[0].trains(name, site)

    def fill_sites(self) -> dict[str, Any]:
        """Fill all sites; of each bank the edge of the graph at which its blocks' gradients enter."""
        edges: dict[str, Any] = {}
        for key, placements in self._placed.items():
            blocks = self.dictionary[key].blocks()
            if blocks.requires_grad:
                edges[key] = torch.autograd.graph.get_gradient_edge(blocks)
            blocks = blocks.detach()
            for p in placements:
                self._fill_site(p, blocks[p.start : p.stop])
        return edges

    @torch.no_grad()
    def _fill_site(self, p: Placement, own: Tensor) -> None:
        weight = to_weight(self._columns(p.bank).gather(own), p)
        site = self._sites[p.site.member, p.site.name]
        if (local := own_part(site)) is not site:
            first = self._chunks(site.shape).rows * self.sharding.rank
            weight = weight[first : first + len(local)]
        local.detach().copy_(weight)

    def go_back(self, edges: dict[str, Any]) -> None:
        """Carry the sites' gradients into rows and codes, and give all parameters the mean of the processes."""
        for key, placements in self._placed.items():
            bank, columns = self.dictionary[key], self._columns(key)
            gradient: Tensor | None = None
            for p in placements:
                site = self._sites[p.site.member, p.site.name]
                if site.grad is None:
                    continue
                if gradient is None:
                    size = (bank.locations, columns.held)
                    gradient = torch.zeros(size, dtype=bank.dtype, device=bank.device)
                gradient[p.start : p.stop] = columns.cut(to_blocks(self._whole_gradient(site), p))
                site.grad = None
            if gradient is not None and key in edges:
                torch.autograd.backward([edges[key]], [gradient])
        # A process knows of a code's gradient what its own columns say: the whole is the sum.
        codes = {id(p): p for bank in self._rows.values() for p in bank.parameters() if p is not bank.rows}
        add_up([p.grad for p in codes.values() if p.grad is not None])
        whole = []
        for parameter, local in self._private:
            if local is parameter and parameter.grad is not None:
                whole.append(parameter.grad.div_(self.sharding.world))
        self.hand_over()
        add_up(whole)

    def hand_over(self) -> None:
        """Give the optimizer's tensors the gradients of the private parameters that they are parts of."""
        for parameter, local in self._private:
            if local is not parameter and parameter.grad is not None:
                own = own_part(parameter.grad)
                local.grad = own if local.grad is None else local.grad + own
                parameter.grad = None

    def _columns(self, key: str) -> SomeColumns:
        """The columns of a bank that this process holds."""
        bank = self._rows.get(key)
        if bank is None:
            return SomeColumns(self.dictionary[key].width, 0, 1)
        assert isinstance(bank.columns, SomeColumns)
        return bank.columns

    def _whole_gradient(self, site: nn.Parameter) -> Tensor:
        gradient: Any = site.grad
        if own_part(gradient) is not gradient:
            return gradient.full_tensor()
        add_up([gradient.div_(self.sharding.world)])
        return gradient

    # -- the end -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def give_back(self) -> JointModel:
        """The joint model that this was made of, with what was learnt, whole in every process and on the CPU."""
        joint, device = self._given[0], self.sharding.device
        for key, bank in self._rows.items():
            part = self.parts[StateKey("bank", key, "rows")]
            bank.rows = nn.Parameter(part.whole(bank.rows.detach(), device, True), bank.rows.requires_grad)
            contexts, origin = self._origins.get(key, (None, None))
            if origin is not None and contexts is bank.contexts:  # hardening forgets it, with the mixtures
                bank.origin = part.whole(origin, device, True)
            del bank.columns
        self.dictionary._apply(lambda tensor: tensor.cpu())
        for name in self.names:
            set_extra_state(joint[name], extra_state_of(self[name]))
            generated = {owner for p in self.plan.of(name) for owner in p.site.owners}
            for first in (first for first in self.owners[name] if first not in generated):
                own = own_part(getattr(*locate(self[name], first)).detach())
                part = self.parts.get(StateKey("member", name, first))
                given = getattr(*locate(joint[name], first))
                given.copy_(own if part is None else part.whole(own, device, True))
        joint.bodies.eval()
        joint.refresh()
        return joint

    def _apply(self, fn: Any, recurse: bool = True) -> JointModel:
        return self  # it is on its device, and of the dtypes that it was made of
