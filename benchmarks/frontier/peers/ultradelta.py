"""UltraDelta (Wang et al., 2505.13563): differences from the base, rounded, then pruned at random within each value.

Matrices are in three parts of equal size by the variance of their differences; the part with the largest is pruned
least. A global factor makes up for what is pruned; the paper takes it from trace norms, here it is swept. Codes are
symmetric, so that a pruned element is one of them, and go through a lossless coder.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import product

import torch
from torch import Tensor

from benchmarks.frontier.packing import Grid, Package
from benchmarks.frontier.peers.base import Peer, Setting, rest_bits_for, rest_of, room_for
from benchmarks.frontier.peers.shared import shared_bytes, shared_leaves
from benchmarks.frontier.scene import Scene

STEP = 0.05  # between the parts' rates of pruning


def rates_by_variance(differences: Mapping[str, Tensor], rate: float, step: float = STEP) -> dict[str, float]:
    """How much of each matrix is pruned: more of the third with the least variance, less of that with the largest.

    Args:
        differences: by matrix.
        rate: of all elements together.
        step: more or less.

    Returns:
        rates whose mean over elements is `rate`, as near as clipping to [0, 1) allows.
    """
    order = sorted(differences, key=lambda name: float(differences[name].var(unbiased=False)))
    whole = sum(t.numel() for t in differences.values())
    rates, seen, spent, high = {}, 0, 0.0, []
    for name in order:
        seen += differences[name].numel()
        if 3 * seen <= whole or 3 * seen <= 2 * whole:
            rates[name] = min(rate + (step if 3 * seen <= whole else 0.0), 0.999)
            spent += rates[name] * differences[name].numel()
        else:
            high.append(name)
    size = sum(differences[name].numel() for name in high)
    for name in high:
        rates[name] = min(max((rate * whole - spent) / size, 0.0), 0.999)
    return rates


def prune_by_value(codes: Tensor, rate: float, middle: int, generator: torch.Generator) -> Tensor:
    """Set the same share of each value's elements to the middle code, which elements is drawn.

    Args:
        codes: of any shape.
        rate: share of all elements that shall be the middle one, those that are already included.
        middle: the code of 0.
        generator: draws.
    """
    flat = codes.flatten().clone()
    already = float((flat == middle).double().mean())
    share = max((rate - already) / max(1 - already, 1e-12), 0.0)
    for value in flat.unique().tolist():
        if value != middle:
            places = (flat == value).nonzero().squeeze(1)
            order = torch.randperm(len(places), generator=generator)
            flat[places[order[: round(share * len(places))]]] = middle
    return flat.view_as(codes)


def settings(scene: Scene, size: int) -> Iterator[Setting]:
    """Bits of the base and of differences, the rate of pruning, and the factor that makes up for it."""
    centre = "mean" if scene.base is None else "base"
    tables = {name for name, h in scene.moments().items() if h.dim() == 1}
    names = [name for name in scene.matrices if name not in tables]

    def codes_for(member: str, levels: int, rate: float) -> dict[str, tuple[Tensor, Tensor]]:
        differences = {name: scene.matrix(member, name) - scene.centre(centre, name) for name in names}
        rates = rates_by_variance(differences, rate)
        generator = torch.Generator().manual_seed(0)
        made = {}
        for name, difference in differences.items():
            scale = difference.abs().max().clamp_min(1e-12) / (levels / 2 - 0.5)
            codes = (difference / scale + levels / 2).round().clamp(0, levels - 1).to(torch.uint8)
            made[name] = prune_by_value(codes, rates[name], levels // 2, generator), scale
        return made

    def package(levels: int, own: int, rate: float, factor: float, rest_bits: int) -> Package | None:
        rest = rest_of(scene, rest_bits)
        count = sum(scene.matrix(scene.names[0], name).numel() for name in names) * len(scene.names)
        entropy = -(rate * math.log2(rate) + (1 - rate) * math.log2(1 - rate))
        if room_for(scene, size, rest, shared_bytes(scene, levels)) < 0.8 * count * entropy / 8:
            return None
        for member in scene.names:
            made = scene.once(("ultradelta", member, own, rate), partial(codes_for, member, own, rate))
            for name, (codes, scale) in made.items():
                shape = tuple(scene.states[member][name].shape)
                scaled = (factor * scale).view(1, 1)
                rest[member][name] = Grid(codes, scaled, own, 0, shape, sparse=True)
        return Package(shared_leaves(scene, centre, levels, False), rest)

    for levels, own, rate, rest_bits in product(
        (16, 256), (4, 16), (0.5, 0.7, 0.8, 0.9, 0.95, 0.98), rest_bits_for(scene, size)
    ):
        for factor in (1.0, 0.5 / (1 - rate), 1 / (1 - rate)):
            words = (
                f"{centre} int{levels.bit_length() - 1}, differences {own.bit_length() - 1} bits, {rate:.0%} pruned, "
                f"times {factor:.2g}, rest {rest_bits} bits"
            )
            yield words, partial(package, levels, own, rate, factor, rest_bits)


ULTRADELTA = Peer("UltraDelta", "2505.13563", settings)
