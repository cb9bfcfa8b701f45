"""Stacks to decide on: their layers apart, or as mixtures of K templates, every number of them an arrangement.

Each tensor of each template has a precision of its own. A squared error e of template k moves the output of member i
by `sum over i's layers l of sensitivity[l] * A[l, k]^2 * e`, A being the mixtures; what K templates leave of the layers
is a unit without tensors, whose error cannot be bought off. So one allocation decides K and bits together.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from surgery.anatomy.plan import Plan
from surgery.fitting.related import components
from surgery.fitting.scene import Scene, key_of
from surgery.fitting.units import BANK_BYTES, Arrangement, Group, Unit, measure
from surgery.geometry.blocks import BlockGrid
from surgery.methods.rows.shared import SharedRows
from surgery.methods.templates.layers import (
    StackTensor,
    TemplateRow,
    distinct_layers,
    layer_scales,
    read_stack,
    row_dtype,
    total_gram,
    unexplained,
)
from surgery.methods.templates.settings import Settings, settings_in
from surgery.methods.templates.solving import fit_mixtures
from surgery.settings.names import Mixing
from surgery.storage.codecs import NATIVE
from surgery.util import progress

EVERY = 8  # up to so many templates, every number of them is tried
RELATED = 0.2  # least cosine of two layers of a family; two that are less alike save 0.015 bits a number
STEP = 1.25  # beyond, each is so many times the one before it


def arrange_stacks(scene: Scene, plan: Plan) -> list[Group]:
    """Each stack of a plan as one thing to decide on; a tensor elsewhere that equals one of theirs is decided on by
    itself.

    Args:
        scene: what is being fitted.
        plan: of the stacks.
    """
    settings = settings_in(plan)
    sensitivity = scene.sensitive_to(key_of(p.site) for p in plan.placements)
    groups = []
    for name in plan.stacks:
        tensors = read_stack(plan, name, scene.originals, sensitivity)
        apart = scene.apart(key_of(site) for tensor in tensors for site in tensor.sites)
        groups.append(stack_group(tensors, apart, settings, scene.seed))
    return groups


def stack_group(tensors: Sequence[StackTensor], apart: Arrangement, settings: Settings, seed: int) -> Group:
    """A stack's layers as one thing to decide on.

    Args:
        tensors: of the stack.
        apart: the layers' tensors each by itself; it can be chosen too, as there are then as many templates as layers.
        settings: which mixtures are allowed; with `templates`, exactly so many for each stack, or as many as there are
            distinct layers where these are fewer.
        seed: of clusterings.
    """
    most = int(distinct_layers([each.weights for each in tensors]).max()) + 1
    run = max(Counter(site.member for site in tensors[0].sites).values())
    counts = candidates(most, run) if settings.templates is None else [settings.templates]
    counts = [count for count in counts if count < most]  # otherwise layers are templates themselves: `apart`
    fits = [fit_templates(tensors, count, settings.mixture, seed) for count in counts]
    if settings.mixture == "linear" and (settings.templates is None or not counts):
        fits += families(tensors)
    droppable = settings.mixture == "linear" and settings.templates is None
    measured: dict[tuple, Unit] = {}
    arrangements = [apart]
    with progress.task("Measuring templates", len(fits)) as task:
        for mixtures, combine in fits:
            arrangements.append(
                _from_templates(tensors, mixtures, combine, settings.mixture, droppable, measured)
            )
            task.advance()
    return Group(tuple(arrangements), shared=bool(counts) and settings.templates is not None, claimed=True)


def candidates(most: int, run: int) -> list[int]:
    """Numbers of templates worth trying for so many distinct layers, in runs of at most `run`, these included.

    Example:
        >>> candidates(24, 6)
        [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 15, 18, 19, 24]
    """
    counts = {most, *range(1, min(most, EVERY) + 1), *range(run, most, max(run, most // 8))}
    at = float(EVERY)
    while (at := at * STEP) < most:
        counts.add(int(at))
    return sorted(counts)


def fit_templates(
    tensors: Sequence[StackTensor], count: int, mixing: Mixing, seed: int
) -> tuple[Tensor, Tensor]:
    """Mixtures `[L, K]` and templates as combinations of layers `[K, L]`, by what errors of layers do to outputs.

    Any mixtures may be scaled, so layers count by how much an error in each of them does; mixtures that sum to 1 may
    not, and count all layers alike.
    """
    gram, generator = total_gram(tensors), torch.Generator().manual_seed(seed)
    if mixing != "linear":
        mixtures, combine = fit_mixtures(gram, count, mixing, generator)
        used = mixtures.any(0)  # a cluster may be empty
        return mixtures[:, used], combine[used]
    scale = layer_scales(tensors)
    mixtures, combine = fit_mixtures(gram * scale * scale.unsqueeze(1), count, mixing, generator)
    return mixtures / scale.unsqueeze(1), combine * scale


def families(tensors: Sequence[StackTensor]) -> list[tuple[Tensor, Tensor]]:
    """Mixtures `[L, L]` and templates `[L, L]` that are the principal directions of each family of layers by itself.

    These are as many templates as layers, and lose nothing; what layers of a family have in common is in the first
    templates, with most of the energy, and the later ones are small. Directions of all layers together would be no
    better, and an error in one would reach layers that have nothing to do with one another. Nothing where no two layers
    are of a family.
    """
    scale = layer_scales(tensors)
    gram = total_gram(tensors) * scale * scale.unsqueeze(1)
    size = gram.diagonal().clamp_min(torch.finfo(gram.dtype).tiny).sqrt()
    found = components(gram.abs() > RELATED * size * size.unsqueeze(1))
    if len(found) == len(gram):
        return []
    directions = torch.zeros_like(gram)
    for family in found:
        own = gram[family][:, family]
        directions[torch.tensor(family).unsqueeze(1), family] = torch.linalg.eigh(own)[1].flip(1)
    return [(directions / scale.unsqueeze(1), directions.T * scale)]


def _from_templates(
    tensors: Sequence[StackTensor],
    mixtures: Tensor,
    combine: Tensor,
    mixing: Mixing,
    droppable: bool,
    measured: dict[tuple, Unit],
) -> Arrangement:
    """Layers from these templates; `measured` keeps what was found out about a template's tensor."""
    hard = mixing == "one-hot"
    units, banks, fixed = [], [], 0.0
    members = [site.member for site in tensors[0].sites]
    for tensor in tensors:
        for k in range(mixtures.shape[1]):
            power = tensor.sensitivity * mixtures[:, k].square()
            weight = _by_member(members, power)
            known = (tensor.key, combine[k].numpy().tobytes(), droppable and k > 0)
            if known not in measured:
                row = TemplateRow("row", tensor.weights, combine[k], row_dtype(tensor, hard))
                unit = measure({"row": row["row"]}, {}, droppable=droppable and k > 0)
                measured[known] = replace(unit, tensors=row)
            units.append(replace(measured[known], weight=weight))
        width = tensor.weights[0].numel()
        contexts = mixtures.to(row_dtype(tensor, False)).unsqueeze(1)  # one location for each layer
        grid = BlockGrid(1, 1, width, 1, width)
        banks.append(SharedRows(tensor.sites, grid, contexts, tensor.key, tensor.stack, hard, "templates"))
        fixed += BANK_BYTES + banks[-1].fixed_bytes
    left = _by_member(members, unexplained(tensors, mixtures, combine))
    units.append(Unit({}, left, (NATIVE,), (0.0,), (1.0,)))
    return Arrangement(tuple(units), fixed, tuple(banks))


def _by_member(members: Sequence[str], each: Tensor) -> dict[str, float]:
    """Sums over layers by the member that they belong to."""
    total: dict[str, float] = defaultdict(float)
    for member, value in zip(members, each.tolist(), strict=True):
        total[member] += value
    return dict(total)
