"""Groups: the gates of all depths of one route together, which share a budget."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from surgery.methods.routes.gates import WRITTEN, BernoulliGates, Gates, LearnedGates
from surgery.methods.routes.mathematics import budget_excess, strongest

Chosen = list[dict[str, tuple[int, ...]]]
"""By depth and task, the components that are on."""


def routes_in(module: nn.Module) -> dict[str, list[Gates]]:
    """The gates of each route within a module, depth by depth.

    Args:
        module: any.

    Returns:
        by a name: that of the route, or the path of its `Routed`.
    """
    found: dict[str, list[Gates]] = {}
    for path, part in module.named_modules():
        if isinstance(part, Gates):
            above = path.rpartition(".gates")[0]
            found.setdefault(above if part.route == WRITTEN else part.route, []).append(part)
    return {name: sorted(gates, key=lambda each: each.depth) for name, gates in found.items()}


def budget_of(depths: Sequence[Gates]) -> float | None:
    """The share of a route's components that a task may have on; None where there is no bound."""
    settings = depths[0].settings
    count = count_of(depths)
    return settings.component_budget if count is None else count / len(depths)


def count_of(depths: Sequence[Gates]) -> int | None:
    """How many depths of a route a task keeps a component at, by the settings; None where these do not say.

    Args:
        depths: the gates of a route.
    """
    layers = depths[0].settings.layers
    return None if layers is None else layers * depths[0].per_layer


def penalty_of(
    depths: Sequence[Gates], left: float = 0.0, weights: Mapping[str, float] | None = None
) -> Tensor:
    """`lambda * max(0, mean p - b)` of each task, summed; zero without a budget.

    Args:
        depths: the gates of a route.
        left: how much of the way from all components to the budget b is left to go.
        weights: by task, the factor of its loss, of some tasks at least; by default 1 for all.
    """
    learned = [gates for gates in depths if isinstance(gates, BernoulliGates)]
    budget = budget_of(depths)
    if not learned or budget is None or learned[0].hard is not None:
        return torch.zeros(())
    p = torch.cat([gates.probability() for gates in learned], 1)  # [T, D * N]
    of_one = budget / (p.shape[1] / len(learned)) if depths[0].settings.layers is not None else budget
    of_one += left * (1 - of_one)
    factors = dict.fromkeys(depths[0].tasks, 1.0) if weights is None else weights
    rows = zip(depths[0].tasks, p, strict=True)
    found = [budget_excess(row, of_one) * factors[task] for task, row in rows if task in factors]
    return depths[0].settings.penalty * torch.stack(found).sum()


def hard_routes(depths: Sequence[Gates]) -> Chosen:
    """What each task keeps of a route: of each z its likelier value, or so many layers as the settings say."""
    chosen = [dict(gates.likely()) for gates in depths]
    count = count_of(depths)
    if count is None or not all(isinstance(gates, BernoulliGates) for gates in depths):
        return chosen
    for row, task in enumerate(depths[0].tasks):
        best = [gates.table()[row].max(0) for gates in depths]  # of each depth, its likeliest component
        kept = strongest(torch.stack([each.values for each in best])[:, None], count).flatten().tolist()
        for d, gates in enumerate(depths):
            chosen[d][task] = (int(best[d].indices),) if kept[d] else (len(gates.names) - 1,)
    return chosen


def harden_gates(routes: Iterable[Sequence[Gates]]) -> None:
    """From now on every task has one route, the likeliest; nothing of it is learned any more."""
    for depths in routes:
        for gates, chosen in zip(depths, hard_routes(depths), strict=True):
            if isinstance(gates, LearnedGates):
                gates.harden(chosen)
