"""Siblings as a method: how banks of a shared matrix and private rows are stored and read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from surgery.anatomy.plan import BankPlan, Placement, Plan, make_plan, torch_dtype
from surgery.core.bank import Bank
from surgery.core.dictionary import index_dtype
from surgery.core.foreign_parts import wrong_parts
from surgery.core.method import PlanRequest, register_method
from surgery.core.tensor_method import TensorMethod
from surgery.geometry.blocks import BlockGrid
from surgery.methods.rows.bank import exact_bank
from surgery.methods.siblings.bank import SiblingsBank
from surgery.settings.problems import Strict
from surgery.storage.codecs import Encoded, decode, encode_native, take_rows
from surgery.util.dtypes import master_dtype

if TYPE_CHECKING:
    from surgery.anatomy.sites import Anatomy, Site
    from surgery.fitting.scene import Scene
    from surgery.fitting.units import Arrangement


class Recorded(Strict):
    """What an artifact says of a bank.

    Attributes:
        lent: whether its shared matrix is the tensor of a member that was stored alone before others were added.
    """

    lent: bool = False


@register_method
class Siblings(TensorMethod):
    """Related sites as a shared matrix plus private rows; a fit finds them by itself."""

    name: ClassVar[str] = "siblings"
    form: ClassVar[str] = "siblings"
    recorded: ClassVar[type[Strict] | None] = Recorded
    claims: ClassVar[bool] = False
    stored_as: ClassVar[str] = "shared matrix"
    summary: ClassVar[str] = "a shared matrix, and products of low rank"

    def plan(self, anatomies: Sequence[Anatomy], request: PlanRequest) -> Plan:
        """As a fit finds siblings among all sites, every site as without a method."""
        return make_plan(anatomies, request.block, request.context)

    def make(self, plan: BankPlan, blocks: Tensor, generator: torch.Generator) -> Bank:
        """Every distinct block as a row: nothing is lost."""
        return exact_bank(blocks, plan.block)

    def unpack(self, plan: BankPlan, parts: Mapping[str, Tensor]) -> SiblingsBank:
        """A bank from its parts."""
        shared = parts["shared"].to(master_dtype(torch_dtype(plan.dtype)))
        count = _kinds(parts)
        rows, contexts = (
            [parts[f"{kind}.{k}"].to(shared) for k in range(count)] for kind in ("rows", "contexts")
        )
        none = shared.new_zeros(0, len(shared))
        owner = parts["owner"].to(shared.device) if count else torch.zeros(0, dtype=torch.long)
        return SiblingsBank(
            plan.locations // len(shared),
            shared,
            torch.cat([shared[:0], *rows]),
            torch.cat([none, *contexts]),
            owner.to(shared.device),
            [len(each) for each in rows],
        )

    def weight(self, plan: BankPlan, placement: Placement, parts: Mapping[str, Tensor]) -> Tensor | None:
        """The shared matrix and one product, for a matrix that lies as its rows do."""
        shared, count = parts["shared"], _kinds(parts)
        site, grid = placement.site, placement.grid
        rows = site.view.in_order and (grid.m, grid.n) == (1, grid.into) == (1, shared.shape[1])
        if not rows or plan.locations != len(shared) or torch_dtype(plan.dtype) != shared.dtype:
            return None
        if master_dtype(shared.dtype) != shared.dtype:
            return None
        if not count:
            return shared.clone().view(site.shape)
        private, contexts = (
            parts[f"{kind}.0"] if count == 1 else torch.cat([parts[f"{kind}.{k}"] for k in range(count)])
            for kind in ("rows", "contexts")
        )
        kind = shared.device.type
        context = torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
        with context:
            return (contexts.T @ private).add_(shared).view(site.shape)  # all private rows are this site's

    def wrong_parts(self, plan: BankPlan, parts: Mapping[str, Encoded]) -> list[str]:
        """As of any bank; and values must be finite."""
        return wrong_parts(self, plan, parts, finite=True)

    def location_bytes(self, plan: BankPlan, parts: Mapping[str, Encoded]) -> Tensor:
        """The shared matrix is divided among all sites, private rows among the blocks of their own."""
        o = parts["shared"].shape[0]
        sites = plan.locations // o
        each = torch.full((sites,), parts["shared"].nbytes / sites, dtype=torch.float64)
        owner, start = _owners(parts), 0
        for number in range(_kinds(parts)):
            count = parts[f"rows.{number}"].shape[0]
            size = parts[f"rows.{number}"].nbytes + parts[f"contexts.{number}"].nbytes
            size += count * parts["owner"].nbytes / max(len(owner), 1)
            each += torch.bincount(owner[start : start + count], minlength=sites) * (size / max(count, 1))
            start += count
        return (each / o).repeat_interleave(o)

    def alignment(self, plan: BankPlan, parts: Mapping[str, Encoded]) -> tuple[Tensor, int]:
        """Blocks at one place of all sites draw on one row of the shared matrix."""
        o = parts["shared"].shape[0]
        return torch.arange(plan.locations) % o, o

    def common(self, plan: BankPlan, parts: Mapping[str, Encoded]) -> Encoded:
        """The shared matrix."""
        return parts["shared"]

    def addition(self, scene: Scene, site: Site, common: Encoded) -> Arrangement:
        """The shared matrix as it is stored, and private rows for what the site differs from it by."""
        from surgery.methods.siblings.differences import added_site  # where fits are: above most of this

        return added_site(scene, site, common)

    def lend(
        self, key: str, site: Site, tensor: Encoded
    ) -> tuple[BankPlan, Placement, dict[str, Encoded]] | None:
        """A matrix, as the shared one."""
        o, n = site.view.shape[1:]
        numbers = torch.arange(math.prod(site.shape)).view(site.shape)
        if (
            site.view.shape[0] != 1
            or site.shape != (o, n)
            or not site.view.to_matrices(numbers)[0].equal(numbers)
        ):
            return None  # stored in another shape than that of the shared matrix
        plan = BankPlan(key, (1, n), 1, site.dtype, o, method=self.name, settings={"lent": True})
        return plan, Placement(site, key, BlockGrid(1, o, n, 1, n), 0), {"shared": tensor}

    def given_back(self, plan: BankPlan, parts: Mapping[str, Encoded]) -> Encoded | None:
        """The shared matrix where there are no private rows."""
        return parts["shared"] if plan.settings.get("lent") and not _kinds(parts) else None

    def extend(
        self, plan: BankPlan, parts: Mapping[str, Encoded], more: BankPlan, added: Mapping[str, Encoded]
    ) -> tuple[BankPlan, dict[str, Encoded]]:
        """Private rows of the added sites come behind those that there are, in parts of their own."""
        o = parts["shared"].shape[0]
        sites, number, found = plan.locations // o, _kinds(parts), dict(parts)
        for k in range(_kinds(added)):
            for kind in ("rows", "contexts"):
                found[f"{kind}.{number + k}"] = added[f"{kind}.{k}"]
        owner = torch.cat([_owners(parts), _owners(added) + sites])
        if len(owner):
            found["owner"] = encode_native(owner.to(index_dtype(sites + more.locations // o)))
        return replace(plan, locations=plan.locations + more.locations), found

    def restrict(
        self, plan: BankPlan, placements: Sequence[Placement], parts: Mapping[str, Encoded]
    ) -> tuple[BankPlan, list[Placement], dict[str, Encoded]]:
        """The shared matrix and the private rows of some sites."""
        o = parts["shared"].shape[0]
        chosen = [p.start // o for p in placements]
        owner, start, kept = _owners(parts), 0, {"shared": parts["shared"]}
        number, left = 0, []
        for k in range(_kinds(parts)):
            count = parts[f"rows.{k}"].shape[0]
            mine = owner[start : start + count]
            rows = torch.nonzero(torch.isin(mine, torch.tensor(chosen))).flatten()
            start += count
            if not len(rows):
                continue
            for kind in ("rows", "contexts"):
                part = parts[f"{kind}.{k}"]
                kept[f"{kind}.{number}"] = part if len(rows) == count else take_rows(part, rows)
            left += [chosen.index(int(i)) for i in mine[rows]]
            number += 1
        if left:
            kept["owner"] = encode_native(torch.tensor(left).to(index_dtype(len(chosen))))
        moved = [replace(p, start=i * o) for i, p in enumerate(placements)]
        return replace(plan, locations=o * len(chosen)), moved, kept


def _kinds(parts: Mapping[str, Any]) -> int:
    """How many parts have private rows."""
    return sum(name.startswith("rows.") for name in parts)


def _owners(parts: Mapping[str, Encoded]) -> Tensor:
    return decode(parts["owner"]).long() if "owner" in parts else torch.zeros(0, dtype=torch.long)
