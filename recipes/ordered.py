"""The net of *Beyond Shared Hierarchies*: an encoder and a decoder for each task, and layers that serve every depth.

E. Meyerson and R. Miikkulainen, *Beyond Shared Hierarchies: Deep Multitask Learning through Soft Layer Ordering*,
ICLR 2018, arXiv 1711.00108. Policies: X. Sun, R. Panda, R. Feris and K. Saenko, *AdaShare: Learning What To Share For
Efficient Deep Multi-Task Learning*, NeurIPS 2020, arXiv 1911.12423.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from surgery.errors import PlanError
from surgery.methods.routes.routed import Routed
from surgery.training.tasks.streams import Batches

from .routed import one_for_each
from .uci import TABLES, WIDTH

UNITS, LAYERS, CLASSES = 64, 4, 3
MOSTLY = 0.97  # probability of each layer at first under a policy
ORDERS = ("soft", "parallel", "permuted", "policy", "single")


class Ordered(nn.Module):
    """Core layers that tasks use in orders of their own.

    Args:
        tasks: names.
        order: `soft`, mixtures of all layers at each depth, learned; `parallel`, layer d at depth d for all;
            `permuted`, a random order for each task; `policy`, layer d at depth d or none, as each task learns to
            (AdaShare); or `single`, layers of its own for each task.
        dropout: after each core layer.
        seed: of random orders.
        inputs: features of an example.
        classes: scores in the output.
        frozen: whether encoders stay as they begin, so that tasks see the same things in ways of their own.
        budget: share of the layers that a task may use on average, where it has a policy.
        layers: how many a task has, and how deep it is.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        order: str = "soft",
        dropout: float = 0.2,
        seed: int = 0,
        inputs: int = WIDTH,
        classes: int = CLASSES,
        frozen: bool = False,
        budget: float | None = None,
        layers: int = LAYERS,
    ):
        super().__init__()
        if order not in ORDERS:
            raise PlanError(f"The order must be one of {', '.join(ORDERS)}, found '{order}'.")
        self.encoders = one_for_each([nn.Linear(inputs, UNITS) for _ in tasks], tasks).requires_grad_(
            not frozen
        )
        count = layers * (len(tasks) if order == "single" else 1)
        core = [nn.Sequential(nn.Linear(UNITS, UNITS), nn.ReLU()) for _ in range(count)]
        if order == "policy":
            self.core = Routed(
                [[layer] for layer in core],
                routing="gumbel",
                tasks=tasks,
                identity=True,
                dropout=dropout,
                p_init=MOSTLY,
                component_budget=budget,
            )
        else:
            own = {
                task: list(range(number * layers, (number + 1) * layers)) for number, task in enumerate(tasks)
            }
            self.core = Routed(
                core,
                layers,
                routing="permuted" if order == "single" else order,
                tasks=tasks,
                dropout=dropout,
                orders=own if order == "single" else None,
                seed=seed,
                rate=1.0,
            )
        self.decoders = one_for_each([nn.Linear(UNITS, classes) for _ in tasks], tasks)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, ...]` -> scores `[B, classes]`; a table of two classes never has the third."""
        return self.decoders(self.core(torch.relu(self.encoders(x.flatten(1)))))


class Patterns(nn.Module):
    """Four layers of 64 units, and nothing else, that two tasks use in the same order or one backward.

    Args:
        order: `parallel` or `permuted`.
        linear: whether there is no ReLU before each layer; none is after the last, whose units might be off for good.
    """

    def __init__(self, order: str = "permuted", linear: bool = True):
        super().__init__()
        forth = list(range(LAYERS))
        orders = {"forth": forth, "back": forth[::-1] if order == "permuted" else forth}
        layers = [nn.Sequential(*[nn.ReLU()] * (not linear), nn.Linear(UNITS, UNITS)) for _ in forth]
        self.core = Routed(layers, LAYERS, routing="permuted", tasks=tuple(orders), orders=orders, rate=1.0)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, 64]` -> `[B, 64]`."""
        return self.core(x)


def ordered(
    order: str = "soft",
    dropout: float = 0.2,
    seed: int = 0,
    budget: float | None = None,
    layers: int = LAYERS,
) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """An `Ordered` whose tasks are UCI's tables, and example inputs."""
    return Ordered(TABLES, order, dropout, seed, budget=budget, layers=layers), (torch.zeros(2, WIDTH),)


def pairs(
    tasks: int = 10, order: str = "soft", dropout: float = 0.2, seed: int = 0
) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """An `Ordered` whose tasks `p0`, `p1` and so on are pairs of digits behind random encoders, and example inputs."""
    names = [f"p{n}" for n in range(tasks)]
    net = Ordered(names, order, dropout, seed, inputs=784, classes=2, frozen=True)
    return net, (torch.zeros(2, 1, 28, 28),)


def two_orders(order: str = "permuted", linear: bool = True) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A `Patterns` and example inputs."""
    return Patterns(order, linear), (torch.zeros(2, UNITS),)


def patterns(task: int = 0, count: int = 32, batch: int = 32, seed: int = 0) -> dict[str, Batches]:
    """Random patterns to be learned by heart: inputs and targets `[B, 64]`, uniform in [0, 1].

    Args:
        task: its number; each has patterns of its own.
        count: of patterns.
        batch: of them in a batch.
        seed: of the patterns.
    """
    generator = torch.Generator().manual_seed(seed * 1000 + task)
    x, y = (torch.rand(count, UNITS, generator=generator) for _ in range(2))
    parts = {"train": True, "validation": False, "test": False}  # what counts is how well these fit
    return {part: Batches(x, y, batch, shuffled, seed) for part, shuffled in parts.items()}
