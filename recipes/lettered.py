"""Nets that tell letters of alphabets apart, tasks of two papers at once, and all their ways of sharing.

Of E. Meyerson and R. Miikkulainen, *Beyond Shared Hierarchies*, ICLR 2018: four convolutions with max pooling that
serve every depth, with GroupNorm, without which four layers that twenty alphabets share stay at chance for hundreds
of batches. Of K. Maziarz et al., *Flexible Multi-task Networks by Learning Parameter Allocation*, 2019: eight depths of
seven components, convolutions of several shapes, pooling and passing on; GroupNorm and ReLU after each convolution and
each depth, and heads that see every pixel that is left: of means over pixels such nets learn next to nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from math import gcd
from typing import Any

import torch
from torch import Tensor, nn

from surgery.errors import PlanError
from surgery.methods.routes.routed import Routed

from .alphabets import LETTERS, SCRIPTS
from .routed import allocated, one_for_each

ORDERS = ("single", "parallel", "permuted", "soft")
WAYS = (*ORDERS, "bottom", "gumbel")
LAYERS = 4
STRIDES = (2, 2, 1, 2, 2, 1, 2, 1)  # of the eight depths, as published for pictures of 105 pixels
LEAST = 4  # what these leave of 105; smaller pictures are made smaller less often


class Ordered(nn.Module):
    """Four convolutions that tasks use in orders of their own, between a map of pixels for all and a head for each.

    Args:
        tasks: names.
        order: one of `ORDERS`.
        channels: of each convolution.
        dropout: after each of them.
        seed: of orders by chance.
    """

    def __init__(self, tasks: Sequence[str], order: str, channels: int, dropout: float, seed: int):
        super().__init__()
        single = order == "single"
        layers = [
            nn.Sequential(
                nn.Conv2d(channels, channels, 3, padding=1),
                _normalised(channels),
                nn.ReLU(),
                nn.MaxPool2d(2),
            )
            for _ in range(LAYERS * (len(tasks) if single else 1))
        ]
        own = {name: list(range(n * LAYERS, (n + 1) * LAYERS)) for n, name in enumerate(tasks)}
        self.encoder = nn.Conv2d(1, channels, 1)
        self.core = Routed(
            layers,
            LAYERS,
            routing="permuted" if single else order,
            tasks=tasks,
            dropout=dropout,
            orders=own if single else None,
            seed=seed,
            rate=1.0,
        )
        self.heads = one_for_each([nn.Linear(channels, LETTERS) for _ in tasks], tasks)

    def forward(self, pictures: Tensor) -> Tensor:
        """Pictures `[B, 1, S, S]`, S from 16 -> scores `[B, 30]`."""
        return self.heads(self.core(self.encoder(pictures)).mean((2, 3)))


class Matrix(nn.Module):
    """Eight depths of seven components each, after a convolution that all tasks share.

    Args:
        tasks: names.
        allocation: `gumbel` or `shared`.
        channels: of each component.
        dropout: before heads.
        side: of a picture.
        settings: of the routes.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        allocation: str,
        channels: int,
        dropout: float,
        side: int = 28,
        **settings: Any,
    ):
        super().__init__()
        strides = strides_of(side)
        self.stem = nn.Sequential(nn.Conv2d(1, channels, 3, padding=1), _normalised(channels), nn.ReLU())
        self.routes = nn.ModuleList(
            allocated([_components(channels, stride)], tasks, allocation, settings) for stride in strides
        )
        self.after = nn.ModuleList(nn.Sequential(_normalised(channels), nn.ReLU()) for _ in strides)
        self.dropout = nn.Dropout(dropout)
        features = channels * reduce(lambda now, stride: -(-now // stride), strides, side) ** 2
        self.heads = one_for_each([nn.Linear(features, LETTERS) for _ in tasks], tasks)

    def forward(self, pictures: Tensor) -> Tensor:
        """Pictures `[B, 1, S, S]` -> scores `[B, 30]`."""
        y = self.stem(pictures)
        for route, after in zip(self.routes, self.after, strict=True):
            y = after(route(y))
        return self.heads(self.dropout(y.flatten(1)))


def lettered(
    way: str = "soft",
    channels: int = 48,
    side: int = 28,
    dropout: float | None = None,
    seed: int = 0,
    p_init: float = 0.97,
    rate: float = 20.0,
    tasks: int = len(SCRIPTS),
) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A net whose tasks are alphabets, and example inputs.

    Args:
        way: `single`, `parallel`, `permuted` or `soft` order of four layers; or seven components at each of eight
            depths, of which tasks share all (`bottom`) or learn to use some (`gumbel`).
        channels: of all layers.
        side: of a picture.
        dropout: 0.2 after each of four layers, or 0.5 before heads, unless given.
        seed: of orders by chance.
        p_init: probability of being on at first.
        rate: how many times as fast as weights logits learn.
        tasks: how many alphabets, the first ones of the recipe.

    Raises:
        PlanError: for a way that is not known, or another number of alphabets than there are.
    """
    if way not in WAYS:
        raise PlanError(f"The way must be one of {', '.join(WAYS)}, found '{way}'.")
    if not 1 <= tasks <= len(SCRIPTS):
        raise PlanError(f"There are {len(SCRIPTS)} alphabets, found tasks = {tasks}.")
    names, inputs = tuple(SCRIPTS)[:tasks], (torch.zeros(2, 1, side, side),)
    if way in ORDERS:
        return Ordered(names, way, channels, 0.2 if dropout is None else dropout, seed), inputs
    allocation = "shared" if way == "bottom" else way
    last = 0.5 if dropout is None else dropout
    return Matrix(names, allocation, channels, last, side, p_init=p_init, rate=rate), inputs


def strides_of(side: int) -> list[int]:
    """Strides of the eight depths for pictures `[side, side]`.

    Example:
        >>> strides_of(105), strides_of(28)
        ([2, 2, 1, 2, 2, 1, 2, 1], [2, 2, 1, 2, 1, 1, 1, 1])
    """
    found = []
    for stride in STRIDES:
        after = -(-side // stride)
        found.append(stride if after >= LEAST else 1)
        side = after if after >= LEAST else side
    return found


def _normalised(channels: int) -> nn.Module:
    """GroupNorm of twelve channels or more to a group: of two numbers it would leave nothing but their order."""
    return nn.GroupNorm(gcd(channels, max(channels // 12, 1)), channels)


def _components(channels: int, stride: int) -> list[nn.Module]:
    def convolution(*sides: tuple[int, int]) -> nn.Module:
        parts = []
        for number, (high, wide) in enumerate(sides):
            last = number == len(sides) - 1
            parts += [
                nn.Conv2d(channels, channels, (high, wide), stride if last else 1, (high // 2, wide // 2)),
                _normalised(channels),
                nn.ReLU(),
            ]
        return nn.Sequential(*parts)

    return [
        convolution((3, 3)),
        convolution((5, 5)),
        convolution((7, 7)),
        convolution((1, 7), (7, 1)),
        nn.MaxPool2d(3, stride, 1),
        nn.AvgPool2d(3, stride, 1),
        nn.AvgPool2d(1, stride),  # passing on
    ]
