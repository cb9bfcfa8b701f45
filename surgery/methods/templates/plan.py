"""Plans with templates: the layers of stacks as mixtures, every other site in blocks as ever."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from surgery.anatomy.plan import BankPlan, Placement, Plan, make_plan, too_small
from surgery.anatomy.sites import Anatomy, LeftAlone, Site
from surgery.anatomy.stacks import Stack, choose_runs, pool_runs
from surgery.core.registry import settings_of
from surgery.errors import PlanError
from surgery.geometry.blocks import BlockGrid
from surgery.geometry.views import CanonicalView
from surgery.settings.names import Mixing

_AXES = "abcdefgh"


def plan_templates(
    anatomies: Sequence[Anatomy],
    block: tuple[int, int] = (16, 16),
    context: int = 4,
    *,
    templates: int | None = None,
    mixture: Mixing | None = None,
    mix_norms: bool = False,
    stacks: Sequence[str] = (),
) -> Plan:
    """Place the layers of stacks in banks of templates, and all other sites in banks of `block`-shaped blocks.

    Each tensor of a layer has a bank of its own: a block is the whole tensor, a location is a layer. Biases,
    depthwise weights and first and last maps inside a layer are mixed too.

    Args:
        anatomies: of all members.
        block: m x n, for sites outside stacks.
        context: c, for sites outside stacks.
        templates: K, so many for each stack. By default the target of a fit decides how many, and training takes one
            for each distinct layer.
        mixture: `linear`, `softmax` or `one-hot`; by default `linear` in a fit, and `softmax` in training.
        mix_norms: whether scale and shift of norms are mixed.
        stacks: runs to take, as exact paths such as `encoder.layer.*` or `re:` patterns; all by default.

    Raises:
        PlanError: where there is no stack, a pattern matches none, or a setting is not valid.
    """
    given = {
        name: value for name, value in (("templates", templates), ("mixture", mixture)) if value is not None
    }
    settings = settings_of("templates", given).model_dump(mode="json", exclude_unset=True)
    chosen = choose_runs([run for anatomy in anatomies for run in anatomy.runs], stacks)
    pooled = pool_runs(chosen, mix_norms)
    if not pooled:
        raise PlanError(
            "Templates need layers of one structure that are applied one after the other, but the members have none; "
            "surgery inspect lists stacks. Use `method=hypermodules`."
        )
    entries = {
        (anatomy.member, each.name): each
        for anatomy in anatomies
        for each in (*anatomy.sites, *anatomy.left_alone)
    }
    banks: list[BankPlan] = []
    placements: list[Placement] = []
    for stack in pooled:
        for bank, placed in _place(stack, entries):
            banks.append(replace(bank, settings=settings))
            placements += placed
    taken = {(p.site.member, p.site.name) for p in placements}
    rest = _plan_rest([_without(anatomy, taken) for anatomy in anatomies], block, context)
    return replace(rest, banks=(*banks, *rest.banks), placements=(*placements, *rest.placements))


def _place(
    stack: Stack, entries: dict[tuple[str, str], Site | LeftAlone]
) -> list[tuple[BankPlan, list[Placement]]]:
    """A bank for each tensor of a stack's layers, with the placements of all layers in it."""
    found, keys = [], set()
    for part in stack.parts:
        key = f"{stack.name}-{part.name.replace('.', '-')}"
        while key in keys:  # `a.b` and `a-b`
            key += "-"
        keys.add(key)
        width = math.prod(part.shape)
        axes = " ".join(_AXES[: len(part.shape)])
        view = CanonicalView.of(f"{axes} -> 1 1 ({axes})", part.shape)
        placed = []
        for start, (member, layer) in enumerate(stack.layers):
            each = entries[member, f"{layer}.{part.name}"]
            site = Site(member, each.name, each.owners, part.kind, part.shape, part.dtype, view, each.order)
            placed.append(Placement(site, key, BlockGrid(1, 1, width, 1, width), start))
        count = len(stack.layers)
        found.append((BankPlan(key, (1, width), count, part.dtype, count, stack.name, "templates"), placed))
    return found


def _without(anatomy: Anatomy, taken: set[tuple[str, str]]) -> Anatomy:
    def left(entries: tuple) -> tuple:
        return tuple(each for each in entries if (each.member, each.name) not in taken)

    return replace(anatomy, sites=left(anatomy.sites), left_alone=left(anatomy.left_alone))


def _plan_rest(anatomies: Sequence[Anatomy], block: tuple[int, int], context: int) -> Plan:
    """The plan of what lies outside stacks, where no site may be large enough for a block."""
    shapes = [site.view.shape for anatomy in anatomies for site in anatomy.sites]
    if any(out >= block[0] and into >= block[1] for _, out, into in shapes):
        return make_plan(anatomies, block, context)
    small = [
        replace(
            anatomy, sites=(), left_alone=(*anatomy.left_alone, *(too_small(s, block) for s in anatomy.sites))
        )
        for anatomy in anatomies
    ]
    return make_plan(small, block, context)
