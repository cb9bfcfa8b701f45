"""The net of *Beyond Shared Hierarchies*: an encoder and a decoder for each task, and layers that serve every depth.

E. Meyerson and R. Miikkulainen, *Beyond Shared Hierarchies: Deep Multitask Learning through Soft Layer Ordering*,
ICLR 2018, arXiv 1711.00108.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from surgery.errors import PlanError
from surgery.methods.routes.routed import Routed

from .uci import TABLES, WIDTH

UNITS, LAYERS, CLASSES = 64, 4, 3
ORDERS = ("soft", "parallel", "permuted", "single")


class Ordered(nn.Module):
    """Core layers that tasks use in orders of their own.

    Args:
        tasks: names.
        order: `soft`, mixtures of all layers at each depth, learned; `parallel`, layer d at depth d for all;
            `permuted`, a random order for each task; or `single`, layers of its own for each task.
        dropout: after each core layer.
        seed: of random orders.
    """

    def __init__(self, tasks: Sequence[str], order: str = "soft", dropout: float = 0.2, seed: int = 0):
        super().__init__()
        if order not in ORDERS:
            raise PlanError(f"The order must be one of {', '.join(ORDERS)}, found '{order}'.")
        self.encoders = _each([nn.Linear(WIDTH, UNITS) for _ in tasks], tasks)
        count = LAYERS * (len(tasks) if order == "single" else 1)
        layers = [nn.Sequential(nn.Linear(UNITS, UNITS), nn.ReLU()) for _ in range(count)]
        own = {task: list(range(number * LAYERS, (number + 1) * LAYERS)) for number, task in enumerate(tasks)}
        self.core = Routed(
            layers,
            LAYERS,
            routing="permuted" if order == "single" else order,
            tasks=tasks,
            dropout=dropout,
            orders=own if order == "single" else None,
            seed=seed,
            rate=1.0,
        )
        self.decoders = _each([nn.Linear(UNITS, CLASSES) for _ in tasks], tasks)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, 64]` -> scores `[B, 3]`; a table of two classes never has the third."""
        return self.decoders(self.core(torch.relu(self.encoders(x))))


def ordered(order: str = "soft", dropout: float = 0.2, seed: int = 0) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """An `Ordered` whose tasks are UCI's tables, and example inputs."""
    return Ordered(TABLES, order, dropout, seed), (torch.zeros(2, WIDTH),)


def _each(parts: Sequence[nn.Module], tasks: Sequence[str]) -> Routed:
    """A part for each task: a route of one depth, by hand."""
    orders = {task: [number] for number, task in enumerate(tasks)}
    return Routed(parts, 1, routing="permuted", tasks=tasks, orders=orders)
