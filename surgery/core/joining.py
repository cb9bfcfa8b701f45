"""Joining: the exact start of a joint model, in which every distinct block of its members is a row."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from surgery.anatomy.plan import CONTEXT, Placement, Plan, follow_up, leave_alone, make_plan, starting_block
from surgery.anatomy.sites import Anatomy, LeftAlone, Site, discover
from surgery.core.bank import Bank
from surgery.core.dictionary import Dictionary
from surgery.core.generation import to_blocks
from surgery.core.joint import JointModel
from surgery.core.replacing import modules_replaced
from surgery.disk.mapped import Reader, places_of
from surgery.errors import PlanError
from surgery.members.member import Member, check_names
from surgery.members.occupancy import check_free
from surgery.members.replacement import Replaced
from surgery.methods.rows.bank import exact_bank
from surgery.methods.rows.referred import ReferredRows
from surgery.methods.rows.sources import SiteBlocks
from surgery.settings.recipe import Recipe
from surgery.slots.collapse import collapse
from surgery.slots.slots import locate, put_back
from surgery.storage.codecs import LARGEST, is_tame
from surgery.util.alignment import align_module
from surgery.util.dtypes import master_dtype


def join(
    members: Sequence[Member],
    plan: Plan | None = None,
    *,
    block: tuple[int, int] = (16, 16),
    context: int = 4,
) -> JointModel:
    """Join members into one model that generates their weight matrices (*sites*) from one dictionary of blocks.

    Nothing changes in what they compute: every distinct block starts as its own row of the dictionary, and blocks that
    are equal, or equal up to an exact factor, share one. Sites with NaN, infinite or huge values, which no sum of rows
    can hold, stay with their members.

    The members' modules become part of the joint model, as `joint["name"]`, and their sites' parameters move into the
    dictionary. A module can be part of one joint model only; `JointModel.extract` gives ordinary copies.

    Args:
        members: as `load_member` returns them.
        plan: which tensors are generated, and how; by default all sites are, in blocks of the size `block`.
        block: rows and columns of a block, where no plan is given.
        context: how many basis blocks a hypermodule has where training opens some (c in MUiR).

    Raises:
        PlanError: names given twice, a module in two members or in another joint model, a tensor in two members, a
            block larger than every site, no member at all; replacements that cannot be made. Modules are then as they
            were.

    Example:
        >>> import surgery
        >>> joint = surgery.join([surgery.load_member("text=./text"), surgery.load_member("vision=./vision")])
        >>> joint.names
        ('text', 'vision')
    """
    if not members:
        raise PlanError("A joint model needs at least one member, found none.")
    check_names(member.name for member in members)
    check_free({member.name: member.module for member in members})
    with modules_replaced(members, plan.replacements if plan else (), keep=True) as changed:
        return _join(changed, plan and replace(plan, replacements=()), block, context)


def _join(members: Sequence[Member], plan: Plan | None, block: tuple[int, int], context: int) -> JointModel:
    """`join`, of members whose modules are replaced."""
    joined = None
    if plan is None:
        anatomies = [discover(member) for member in members]
        plan, joined = make_plan(anatomies, block, context), _recorded(members, anatomies, block, context)
    modules = {member.name: align_module(member.module) for member in members}
    keys = [(p.site.member, p.site.name) for p in plan.placements]
    wild = {(name, site) for name, site in keys if not is_tame(_weight(modules[name], site))}
    plan = leave_alone(plan, wild, f"holds NaN, infinite values or values beyond {LARGEST:.0e}")
    joint = JointModel(members, plan, _exact_start(modules, plan))
    if joined is not None:
        joint.keep_known(replace(joint.known, joined=joined))
    return joint


def join_anew(joint: JointModel, change: Callable[[JointModel, str], tuple[Replaced, ...]]) -> JointModel:
    """Let members be changed while they have ordinary parameters, and join what is left of their sites, in place.

    What the dictionary shares beyond equal blocks is shared no more, and stored forms are forgotten.

    Args:
        joint: any.
        change: of a member of the joint model, by its name: drops or moves modules of it, and returns what is recorded
            of its replaced modules then.
    """
    before, states = joint.plan, {name: collapse(joint, name) for name in joint.names}
    known = replace(joint.known, stale=frozenset(joint.names), training=None, joined=None)
    joint.vacate()
    for p in before.placements:
        name, owners = p.site.member, p.site.owners
        put_back(joint[name], owners, states[name][p.site.name], joint.trains(name, p.site.name))
    del states
    entries = [*(p.site for p in before.placements), *before.left_alone]
    held = {(each.member, id(_tensor(joint[each.member], each.name))): each for each in entries}
    replaced = {name: change(joint, name) for name in joint.names}
    joint.take_members([replace(each, replaced=replaced[name]) for name, each in joint.members.items()])
    found: dict[tuple[str, str], Site | LeftAlone] = {}
    for name in joint.names:
        for first, owners in joint.owners[name].items():
            entry = held.get((name, id(_tensor(joint[name], first))))
            if entry is not None:
                found[name, entry.name] = replace(entry, name=first, owners=owners)
    plan = _plan_of_rest(before, found)
    modules = {name: align_module(joint[name]) for name in joint.names}
    return joint.occupy(plan, _exact_start(modules, plan), {}, known)


def _plan_of_rest(plan: Plan, found: Mapping[tuple[str, str], Site | LeftAlone]) -> Plan:
    """A plan of the tensors that are still there, under the names that they have now."""
    placements, banks = [], []
    for bank in plan.banks:
        mine = [
            replace(p, site=site)
            for p in plan.placements
            if p.bank == bank.key and isinstance(site := found.get((p.site.member, p.site.name)), Site)
        ]
        if mine:
            placements += follow_up(mine)
            banks.append(replace(bank, locations=sum(p.grid.locations for p in mine)))
    left = [e for each in plan.left_alone if isinstance(e := found.get((each.member, each.name)), LeftAlone)]
    return replace(plan, banks=tuple(banks), placements=tuple(placements), left_alone=tuple(left))


def _tensor(module: nn.Module, name: str) -> Tensor:
    return getattr(*locate(module, name))


def _recorded(
    members: Sequence[Member], anatomies: Sequence[Anatomy], block: tuple[int, int], context: int
) -> Recipe | None:
    """The recipe by which a merge joins the same members by the same plan; None where there is none."""
    if context != CONTEXT:
        return None
    if any(
        m.origin.kind == "module" or not m.original or m.inputs.source == "given" or m.replaced
        for m in members
    ):
        return None
    models = [{"model": member.origin.reference, "name": member.name} for member in members]
    parameters = {} if block == starting_block(anatomies) else {"block": block}
    return Recipe.of({"models": models, "parameters": parameters})


def _exact_start(modules: Mapping[str, nn.Module], plan: Plan) -> Dictionary:
    """Every distinct block of the plan's sites as a row; of weights that are mapped from files, where it is there."""
    weights = {
        (p.site.member, p.site.name): _weight(modules[p.site.member], p.site.name) for p in plan.placements
    }
    places = places_of(weights.values())
    banks: dict[str, Bank] = {}
    for bank in plan.banks:
        mine = plan.in_bank(bank.key)
        lies = (places.get(id(weights[p.site.member, p.site.name])) for p in mine)
        found = [place for place in lies if place is not None]
        if len(found) == len(mine):
            source = SiteBlocks(mine, found, Reader(place.file for place in found))
            banks[bank.key] = ReferredRows(bank.block, source)
        else:
            banks[bank.key] = exact_bank(_blocks(modules, mine), bank.block)
    return Dictionary(banks)


def _blocks(modules: Mapping[str, nn.Module], placements: Sequence[Placement]) -> Tensor:
    """The blocks of one bank `[L, m*n]`, written site by site: large models have no memory for a second copy."""
    sites = [(p, _weight(modules[p.site.member], p.site.name)) for p in placements]
    dtypes = {master_dtype(weight.dtype) for _, weight in sites}
    dtype = torch.float64 if torch.float64 in dtypes else torch.float32
    grid, total = placements[0].grid, max(p.stop for p in placements)
    blocks = torch.empty(total, grid.m * grid.n, dtype=dtype, device=sites[0][1].device)
    for p, weight in sites:
        blocks[p.start : p.stop] = to_blocks(weight, p)
    return blocks


def _weight(module: nn.Module, name: str) -> Tensor:
    return getattr(*locate(module, name)).detach()
