"""Nets whose components tasks share by routes, and the synthetic tasks of *Flexible Multi-task Networks*.

Nets and tasks are those of K. Maziarz et al., *Flexible Multi-task Networks by Learning Parameter Allocation*, 2019,
arXiv 1910.04915. Synthetic tasks: for normal x in R^d, y = w . x + sum_i sin(alpha_i (w . x) + beta_i) + noise, with
d = 128, six terms, alpha_i = i, beta_i = (i - 1)^2 and noise of variance 0.01. A pair of tasks has w1 = u1 and
w2 = rho u1 + sqrt(1 - rho^2) u2, where u1 and u2 are orthogonal.

Each net has an `allocation` of components to tasks: `gumbel`, learned; `shared`, all tasks use all; or `apart`, each
task has components of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from surgery.errors import PlanError
from surgery.methods.routes.gates import LearnedGates
from surgery.methods.routes.routed import Routed

from .alphabets import LETTERS, SCRIPTS

D, TERMS, NOISE = 128, 6, 0.01
COMPONENTS, HIDDEN, FILTERS = 4, 16, 4
HELD, EPOCH = 4096, 100  # examples for validation, and for test; batches in an epoch
ALLOCATIONS = ("gumbel", "shared", "apart")


class Regression(nn.Module):
    """Components of one hidden layer, of which each task takes the mean of some, and a linear head for each task.

    Args:
        tasks: names.
        allocation: `gumbel`, `shared` or `apart`.
        settings: of the gumbel route, such as `component_budget`.
    """

    def __init__(self, tasks: Sequence[str], allocation: str = "gumbel", **settings: Any):
        super().__init__()
        parts = [nn.Sequential(nn.Linear(D, HIDDEN), nn.ReLU()) for _ in range(COMPONENTS)]
        self.routed = allocated([parts], tasks, allocation, settings)
        self.heads = _heads(HIDDEN, 1, tasks)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, 128]` -> `[B]`."""
        return self.heads(self.routed(x)).squeeze(-1)


class Digits(nn.Module):
    """Three depths of small convolutions, mean pooling after the first two, and a linear head for each task.

    Args:
        tasks: names.
        allocation: `gumbel`, `shared` or `apart`.
        components: at each depth.
        filters: of each component.
        classes: scores in the output.
        settings: of the gumbel route, such as `component_budget`.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        allocation: str = "gumbel",
        components: int = COMPONENTS,
        filters: int = FILTERS,
        classes: int = 10,
        **settings: Any,
    ):
        super().__init__()
        shapes = ((1, 5), (filters, 3), (filters, 3))
        parts = [
            [nn.Sequential(nn.Conv2d(channels, filters, side), nn.ReLU()) for _ in range(components)]
            for channels, side in shapes
        ]
        for depth in parts[:2]:  # pooling is linear, so the mean of pooled outputs is the pooled mean
            for component in depth:
                component.append(nn.AvgPool2d(2))
        self.routed = allocated(parts, tasks, allocation, settings)
        self.dropout = nn.Dropout(0.5)
        self.heads = _heads(filters * 9, classes, tasks)
        _initialise(self)

    def forward(self, pictures: Tensor) -> Tensor:
        """Pictures `[B, 1, 28, 28]` -> scores `[B, 10]`."""
        return self.heads(self.dropout(self.routed(pictures).flatten(1)))


def regression(
    tasks: int = 4, allocation: str = "gumbel", **settings: Any
) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A `Regression` for tasks `t0`, `t1` and so on, and example inputs."""
    return Regression([f"t{n}" for n in range(tasks)], allocation, **settings), (torch.zeros(2, D),)


def digits(allocation: str = "gumbel", **settings: Any) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A `Digits` for two copies of MNIST and two of rotated MNIST, and example inputs."""
    names = ("mnist", "mnist_again", "rotated", "rotated_again")
    return Digits(names, allocation, **settings), (torch.zeros(2, 1, 28, 28),)


def clusters(
    components: int = 16, filters: int = 8, component_budget: float = 0.5, rate: float = 20.0, **settings: Any
) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A `Digits` for ten tasks of MNIST, ten of Fashion-MNIST and one for each alphabet, and example inputs."""
    names = [f"{kind}{n}" for kind in ("mnist", "fashion") for n in range(10)] + list(SCRIPTS)
    settings |= {"component_budget": component_budget, "rate": rate}
    net = Digits(names, "gumbel", components, filters, LETTERS, **settings)
    return net, (torch.zeros(2, 1, 28, 28),)


def allocated(
    parts: Sequence[Sequence[nn.Module]], tasks: Sequence[str], allocation: str, settings: Mapping[str, Any]
) -> Routed:
    """One route through components, depth by depth, that tasks have by an `allocation`."""
    if allocation not in ALLOCATIONS:
        raise PlanError(f"The allocation must be one of {', '.join(ALLOCATIONS)}, found '{allocation}'.")
    if allocation == "gumbel":
        return Routed(parts, routing="gumbel", tasks=tasks, **{"rate": float(len(tasks)), **settings})
    routed = Routed(parts, routing="gumbel", tasks=tasks, **{**settings, "harden": False})
    for gates in routed.depths():
        count = len(gates.names)
        own = {
            task: range(count * number // len(tasks), count * (number + 1) // len(tasks))
            for number, task in enumerate(tasks)
        }
        assert isinstance(gates, LearnedGates)
        gates.harden(own if allocation == "apart" else dict.fromkeys(tasks, range(count)))
    return routed


def one_for_each(parts: Sequence[nn.Module], tasks: Sequence[str]) -> Routed:
    """A part for each task: a route of one depth, by hand."""
    orders = {task: [number] for number, task in enumerate(tasks)}
    return Routed(parts, 1, routing="permuted", tasks=tasks, orders=orders)


def _heads(width: int, outputs: int, tasks: Sequence[str]) -> Routed:
    """A linear map for each task."""
    return one_for_each([nn.Linear(width, outputs) for _ in tasks], tasks)


def _initialise(net: nn.Module) -> None:
    """As the paper's nets begin: Glorot's uniform weights, and no biases."""
    for part in net.modules():
        if isinstance(part, (nn.Linear, nn.Conv2d)):
            nn.init.xavier_uniform_(part.weight)
            assert part.bias is not None
            nn.init.zeros_(part.bias)


class Fresh:
    """Batches of a synthetic task that are drawn as they are asked for.

    Args:
        weights: w `[d]`.
        batch: examples in a batch.
        count: batches in an epoch.
        seed: of the examples.
    """

    def __init__(self, weights: Tensor, batch: int, count: int, seed: int):
        self.weights, self.batch, self.count, self.seed, self.epoch = weights, batch, count, seed, 0

    def __len__(self) -> int:
        return self.count

    def set_epoch(self, epoch: int) -> None:
        """Choose the examples of an epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed((self.seed << 20) + self.epoch)
        for _ in range(self.count):
            x = torch.randn(self.batch, D, generator=generator)
            at = x @ self.weights
            terms = [torch.sin(i * at + (i - 1) ** 2) for i in range(1, TERMS + 1)]
            noise = NOISE**0.5 * torch.randn(self.batch, generator=generator)
            yield x, at + torch.stack(terms).sum(0) + noise


def related(
    task: int = 0, rho: float = 1.0, batch: int = 64, seed: int = 0, validation: int = HELD, test: int = HELD
) -> dict[str, Fresh]:
    """Fresh batches of inputs `[B, 128]` and targets `[B]` of one of a few pairs of tasks.

    Args:
        task: its number; 2 k and 2 k + 1 are a pair, and different pairs are unrelated.
        rho: how related the tasks of a pair are, from 0, not at all, to 1, equal.
        batch: examples in a batch.
        seed: of the pairs' directions and of the examples.
        validation: examples for validation.
        test: examples for test.

    Raises:
        PlanError: for a task or relatedness that there is not.
    """
    if not 0 <= task < D or not 0 <= rho <= 1:
        raise PlanError(
            f"A task's number must lie between 0 and {D - 1} and rho between 0 and 1, found {task} and {rho}."
        )
    directions = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(seed)))[0].t()
    u1, u2 = directions[task - task % 2], directions[task - task % 2 + 1]
    weights = u1 if task % 2 == 0 else rho * u1 + (1 - rho**2) ** 0.5 * u2
    own = 3 * (seed * D + task)
    return {
        "train": Fresh(weights, batch, EPOCH, own),
        "validation": Fresh(weights, validation, 1, own + 1),
        "test": Fresh(weights, test, 1, own + 2),
    }
