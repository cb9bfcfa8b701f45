"""The plan of a joint model: which sites go into which bank, in which blocks, and what stays private.

A plan is frozen and printable: a dry run stops here. `make_plan` needs only anatomies, no weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from surgery.anatomy.sites import Anatomy, LeftAlone, Site
from surgery.errors import PlanError
from surgery.geometry.blocks import BlockGrid
from surgery.members.member import check_names
from surgery.members.replacement import Replacement
from surgery.settings.names import DEFAULT_METHOD, RELATED
from surgery.util.showing import as_text, plural

# Of the blocks and hypermodules that a plan starts from; a fit chooses its own unless given.
SIDE, CONTEXT = (16, 4)


@dataclass(frozen=True)
class Placement:
    """Where the blocks of one site lie: locations `start` to `start + grid.locations` of a bank."""

    site: Site
    bank: str
    grid: BlockGrid
    start: int

    @property
    def stop(self) -> int:
        """One past the site's last location."""
        return self.start + self.grid.locations


@dataclass(frozen=True)
class BankPlan:
    """One bank: block shape, c, and how many locations draw on it.

    Attributes:
        key: its name.
        block: (m, n).
        context: c of hypermodules, or the number of templates.
        dtype: of the members' tensors.
        locations: L.
        stack: where it holds one tensor of the templates of a stack, that stack's name: a block is then the whole
            tensor, and a location is a layer.
        method: whose bank it is.
        settings: of that method, as JSON values.
    """

    key: str
    block: tuple[int, int]
    context: int
    dtype: str
    locations: int
    stack: str = ""
    method: str = DEFAULT_METHOD
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, repr=False)
class Plan:
    """All of a joint model's structure except its numbers.

    Attributes:
        members: names in the order given.
        banks: by block shape and dtype.
        placements: every site whose weights are generated, in member and execution order.
        left_alone: every other tensor with its reason.
        replacements: of modules, which `join` makes first; sites are those of the members with these in place.
    """

    members: tuple[str, ...]
    banks: tuple[BankPlan, ...]
    placements: tuple[Placement, ...]
    left_alone: tuple[LeftAlone, ...]
    replacements: tuple[Replacement, ...] = ()

    def __repr__(self) -> str:
        title = f"Plan of {plural(len(self.members), 'member')}: {plural(len(self.placements), 'site')} in "
        title += f"{plural(len(self.banks), 'bank')}, {plural(len(self.left_alone), 'tensor')} left alone"
        rows = [f"{each.path} of '{each.member}': replaced by {each.method}" for each in self.replacements]
        rows += [f"{bank.key}: {plural(bank.locations, 'location')}" for bank in self.banks]
        return as_text(title, rows)

    def of(self, member: str) -> tuple[Placement, ...]:
        """The placements of one member."""
        return self._by_member.get(member, ())

    @cached_property
    def _by_member(self) -> dict[str, tuple[Placement, ...]]:
        found: dict[str, list[Placement]] = {}
        for p in self.placements:
            found.setdefault(p.site.member, []).append(p)
        return {member: tuple(placements) for member, placements in found.items()}

    def bank(self, key: str) -> BankPlan:
        """The bank with this key."""
        return next(bank for bank in self.banks if bank.key == key)

    def in_bank(self, key: str) -> list[Placement]:
        """The placements in the bank with this key."""
        return [p for p in self.placements if p.bank == key]

    def in_order(self, placements: Iterable[Placement]) -> tuple[Placement, ...]:
        """Placements of sites of this plan, wherever they lie by now, in its member and execution order."""
        order = {(p.site.member, p.site.name): number for number, p in enumerate(self.placements)}
        return tuple(sorted(placements, key=lambda p: order[p.site.member, p.site.name]))

    @property
    def method(self) -> str:
        """The method that the plan was made with: of its banks' methods the one that is not for leftover sites."""
        names = dict.fromkeys(bank.method for bank in self.banks)
        return next((name for name in names if name not in (DEFAULT_METHOD, *RELATED)), DEFAULT_METHOD)

    def keys_of(self, method: str) -> list[str]:
        """The keys of a method's banks."""
        return [bank.key for bank in self.banks if bank.method == method]

    def of_method(self, method: str) -> Plan:
        """The plan of one method's banks alone."""
        keys = self.keys_of(method)
        banks = tuple(bank for bank in self.banks if bank.key in keys)
        return replace(self, banks=banks, placements=tuple(p for p in self.placements if p.bank in keys))

    @property
    def stacks(self) -> dict[str, tuple[str, ...]]:
        """Keys of the banks that hold the tensors of each stack's templates, by the stack's name."""
        names = dict.fromkeys(bank.stack for bank in self.banks if bank.stack)
        return {name: tuple(b.key for b in self.banks if b.stack == name) for name in names}


def make_plan(
    anatomies: Sequence[Anatomy],
    block: tuple[int, int] | None = (16, 16),
    context: int = 4,
    *,
    method: str = DEFAULT_METHOD,
    settings: Mapping[str, Any] = MappingProxyType({}),
) -> Plan:
    """Place every site of every member in banks of `block`-shaped blocks, one bank for each dtype.

    Sites smaller than a block in either direction are left alone.

    Args:
        anatomies: of all members.
        block: m x n; None for whole matrices, a bank for each shape of them.
        context: c.
        method: whose banks these are.
        settings: of that method, as JSON values.

    Raises:
        PlanError: two members of one name; a block that no site can fill; sizes below 1.
    """
    if method != DEFAULT_METHOD or settings:
        plan = make_plan(anatomies, block, context)
        own = tuple(replace(bank, method=method, settings=dict(settings)) for bank in plan.banks)
        return replace(plan, banks=own)
    names = [anatomy.member for anatomy in anatomies]
    check_names(names)
    if block is None:
        whole = [(site, site.view.shape[1:]) for anatomy in anatomies for site in anatomy.sites]
        return place(names, whole, context, [each for anatomy in anatomies for each in anatomy.left_alone])
    m, n = block
    if m < 1 or n < 1 or context < 1:
        raise PlanError(f"Block sides and context must be at least 1, found {m}x{n} and {context}.")
    sites = [site for anatomy in anatomies for site in anatomy.sites]
    fitting, small = by_size(sites, block)
    if sites and not fitting:
        largest = max(sites, key=lambda site: math.prod(site.view.shape[1:]))
        raise PlanError(
            f"A block of {m}x{n} is larger than every site; the largest is {largest.member}:"
            f"{largest.name} with {largest.view.shape[1]}x{largest.view.shape[2]}. Use a smaller `block`."
        )
    left_alone = [entry for anatomy in anatomies for entry in anatomy.left_alone]
    return place(names, ((site, block) for site in fitting), context, left_alone + small)


def by_size(sites: Iterable[Site], block: tuple[int, int]) -> tuple[list[Site], list[LeftAlone]]:
    """Sites that fill a block, and the others as left alone."""
    (m, n), fitting, small = block, [], []
    for site in sites:
        if site.view.shape[1] >= m and site.view.shape[2] >= n:
            fitting.append(site)
        else:
            small.append(too_small(site, block))
    return fitting, small


def too_small(site: Site, block: tuple[int, int]) -> LeftAlone:
    """A site that cannot fill a block, as left alone."""
    reason = f"smaller than a {block[0]}x{block[1]} block"
    return LeftAlone(
        site.member, site.name, site.owners, "skipped", site.kind, site.shape, site.dtype, reason, site.order
    )


def place(
    members: Sequence[str],
    sites: Iterable[tuple[Site, tuple[int, int]]],
    context: int,
    left_alone: Iterable[LeftAlone] = (),
) -> Plan:
    """Place sites, each with its own block shape, in one bank for each block shape and dtype."""
    banks: dict[str, BankPlan] = {}
    placements = []
    for site, (m, n) in sites:
        key = f"{m}x{n}-{site.dtype}"
        bank = banks.get(key) or BankPlan(key, (m, n), context, site.dtype, 0)
        grid = BlockGrid(*site.view.shape, m, n)
        placements.append(Placement(site, key, grid, bank.locations))
        banks[key] = replace(bank, locations=bank.locations + grid.locations)
    return Plan(tuple(members), tuple(banks.values()), tuple(placements), tuple(left_alone))


def leave_alone(plan: Plan, sites: Collection[tuple[str, str]], reason: str) -> Plan:
    """The same plan without some sites, which stay with their members; a stack gives up the tensor in all its layers.

    Args:
        plan: any.
        sites: members and names.
        reason: why they are left alone.
    """
    if not sites:
        return plan
    stacked = {key for keys in plan.stacks.values() for key in keys}
    whole = {p.bank for p in plan.placements if (p.site.member, p.site.name) in sites} & stacked
    gone = [p for p in plan.placements if p.bank in whole or (p.site.member, p.site.name) in sites]
    follow = {bank.key: 0 for bank in plan.banks}
    placements = []
    for p in sorted((p for p in plan.placements if p not in gone), key=lambda p: (p.bank, p.start)):
        placements.append(replace(p, start=follow[p.bank]))
        follow[p.bank] += p.grid.locations
    banks = tuple(replace(b, locations=follow[b.key]) for b in plan.banks if follow[b.key])
    left = [
        LeftAlone(s.member, s.name, s.owners, "skipped", s.kind, s.shape, s.dtype, reason, s.order)
        for s in (p.site for p in gone)
    ]
    return replace(
        plan, banks=banks, placements=plan.in_order(placements), left_alone=(*plan.left_alone, *left)
    )


def follow_up(placements: Sequence[Placement]) -> list[Placement]:
    """Placements moved so that they follow one another from location 0 on."""
    moved, start = [], 0
    for p in placements:
        moved.append(replace(p, start=start))
        start = moved[-1].stop
    return moved


def locations_of(placements: Iterable[Placement]) -> Tensor:
    """The locations of some placements, one after the other `[N]`, int64."""
    return torch.cat([torch.arange(p.start, p.stop) for p in placements])


def plan_in_dtypes(plan: Plan, change: Callable[[torch.dtype], torch.dtype]) -> Plan:
    """The same plan for members whose tensors took other dtypes."""

    def changed(name: str) -> str:
        return str(change(torch_dtype(name))).removeprefix("torch.")

    return replace(
        plan,
        banks=tuple(replace(bank, dtype=changed(bank.dtype)) for bank in plan.banks),
        placements=tuple(
            replace(p, site=replace(p.site, dtype=changed(p.site.dtype))) for p in plan.placements
        ),
        left_alone=tuple(replace(entry, dtype=changed(entry.dtype)) for entry in plan.left_alone),
    )


def torch_dtype(name: str) -> torch.dtype:
    """`"float32"` -> `torch.float32`."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def starting_block(anatomies: Sequence[Anatomy]) -> tuple[int, int]:
    """16 x 16, or the largest power of two that fits a site where all sites are smaller."""
    sides = [min(site.view.shape[1:]) for anatomy in anatomies for site in anatomy.sites]
    side = min(SIDE, 1 << (max(sides, default=SIDE).bit_length() - 1))
    return side, side
