"""The Gumbel-Matrix on synthetic tasks: do related tasks end on the same components, and unrelated ones on others?

The data are those of Maziarz et al., *Flexible Multi-task Networks by Learning Parameter Allocation*, 2019: for normal
x in R^d, y = w . x + sum_i sin(alpha_i (w . x) + beta_i) + noise, with d = 128, m = 6, alpha_i = i, beta_i = (i - 1)^2
and noise of variance 0.01. A pair of tasks has w1 = u1 and w2 = rho u1 + sqrt(1 - rho^2) u2, u1 and u2 orthogonal.

    related     figure 1: two tasks of relatedness rho = 0 and 1 and four components, all of them shared, or two for
                each task
    pairs       figure 7: two pairs of equal tasks, routes learned: the share of components that tasks of a pair, and of
                different pairs, have in common in the end
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from statistics import mean, stdev
from typing import Any

from benchmarks.harness import make_header, make_parser, show

D, TERMS, NOISE = 128, 6, 0.01
COMPONENTS, HIDDEN = 4, 16


def directions(count: int, generator: Any) -> Any:
    """Orthogonal vectors of length one `[count, d]`."""
    import torch

    return torch.linalg.qr(torch.randn(D, count, generator=generator))[0].t()


def related(rho: float, generator: Any) -> list[Any]:
    """Weights of two tasks of some relatedness."""
    u1, u2 = directions(2, generator)
    return [u1, rho * u1 + (1 - rho**2) ** 0.5 * u2]


def labels(x: Any, w: Any, generator: Any) -> Any:
    """Targets `[B]` of inputs `[B, d]`."""
    import torch

    at = x @ w
    terms = [torch.sin(i * at + (i - 1) ** 2) for i in range(1, TERMS + 1)]
    return at + sum(terms) + NOISE**0.5 * torch.randn(len(x), generator=generator)


def network(tasks: int, allocation: Any = None, **settings: Any) -> Any:
    """Components of one hidden layer, a head for each task; routes that are learned, or by hand."""
    import torch
    from torch import nn

    import surgery

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            parts = [nn.Sequential(nn.Linear(D, HIDDEN), nn.ReLU()) for _ in range(COMPONENTS)]
            names = [str(task) for task in range(tasks)]
            self.routed = surgery.Routed([parts], routing="gumbel", tasks=names, **settings)
            self.heads = nn.ModuleList([nn.Linear(HIDDEN, 1) for _ in range(tasks)])
            if allocation is not None:
                (gates,) = self.routed.depths()
                gates.harden({name: allocation[task] for task, name in enumerate(names)})  # pyright: ignore

        def forward(self, x: Any, task: int) -> Any:
            self.routed.serve_task(str(task))
            return self.heads[task](self.routed(x)).squeeze(-1)

    with torch.no_grad():
        return Net()


def fit(net: Any, weights: Sequence[Any], steps: int, generator: Any, lr: float = 0.01) -> list[float]:
    """Train on fresh batches of 64, a batch of each task in a step; the last test losses."""
    import torch

    from surgery.methods.routes.mathematics import temperature_at

    optimizer = torch.optim.Adam(net.parameters(), lr=lr)
    net.train()
    for step in range(steps):
        optimizer.zero_grad()
        for task, w in enumerate(weights):
            net.routed.temperature = temperature_at(step * len(weights) + task)
            x = torch.randn(64, D, generator=generator)
            loss = (net(x, task) - labels(x, w, generator)).square().mean()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
    net.eval()
    with torch.no_grad():
        x = torch.randn(4096, D, generator=generator)
        return [float((net(x, t) - labels(x, w, generator)).square().mean()) for t, w in enumerate(weights)]


def one_related(steps: int, seed: int) -> dict[str, Any]:
    """Figure 1: shared bottom against no sharing at both ends of relatedness."""
    import torch

    torch.set_num_threads(1)
    found: dict[str, Any] = {"seed": seed}
    for rho in (0.0, 1.0):
        for name, allocation in (("shared", [(0, 1, 2, 3)] * 2), ("apart", [(0, 1), (2, 3)])):
            torch.manual_seed(seed)
            generator = torch.Generator().manual_seed(seed)
            weights = related(rho, generator)
            found[f"{name}, rho {rho:g}"] = mean(fit(network(2, allocation), weights, steps, generator))
    return found


def one_pairs(steps: int, seed: int) -> dict[str, Any]:
    """Figure 7: the components that four tasks, two equal pairs, end on."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    first, second = directions(2, generator)
    net = network(4)
    losses = fit(net, [first, first, second, second], steps, generator)
    (gates,) = net.routed.depths()
    rows = (gates.table() >= 0.5).float()
    same = [
        (rows[a] * rows[b]).sum().item() / max((rows[a] + rows[b]).clamp_max(1).sum().item(), 1)
        for a, b in ((0, 1), (2, 3), (0, 2), (0, 3), (1, 2), (1, 3))
    ]
    return {
        "seed": seed, "loss": mean(losses), "on": rows.sum(1).mean().item(),
        "of a pair": mean(same[:2]), "of two pairs": mean(same[2:]),
    }  # fmt: skip


def tabulate(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds and their standard errors."""
    rows = []
    for name in (key for key in found[0] if key != "seed"):
        values = [each[name] for each in found]
        error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
        rows.append({"what": name, "mean": mean(values), "standard error": error, "runs": len(values)})
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Run one of the figures."""
    parser = make_parser(__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("figure", choices=("related", "pairs"))
    parser.add_argument(
        "--runs", type=int, default=None, help="seeds; 30 for related and 20 for pairs by default"
    )
    parser.add_argument("--steps", type=int, default=3000, help="batches of each task")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args(argv)
    runs = 1 if options.fast else options.runs or (30 if options.figure == "related" else 20)
    steps = 3 if options.fast else options.steps
    one = partial(one_related if options.figure == "related" else one_pairs, steps)
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        found = list(pool.map(one, range(options.seed, options.seed + runs)))
    header = make_header("gumbel_matrix", options, argv)
    show(f"Gumbel-Matrix, {options.figure}", header, tabulate(found), [], options.json)


if __name__ == "__main__":
    main()
