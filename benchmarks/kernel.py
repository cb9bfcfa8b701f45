"""Time the hot kernel against what one would write without it: `python -m benchmarks.kernel`.

One problem per row: L blocks of 16x16, c = 4 rows per hypermodule, one alternative besides the incumbent
(MUiR Eq. 8 with lambda = 1, so 8 rows per location), K hypermodules. When K = L each location's incumbent is
its own hypermodule, otherwise both are random. Competitors take turns within a round, each after one warm-up,
and the table holds medians over rounds. For all of them every gradient starts at None (`zero_grad`'s default)
and the allocator is PyTorch's as installed; that `generate` keeps its results' memory from call to call is
part of it. Run again under `THP_MEM_ALLOC_ENABLE=1`, which puts all of PyTorch's memory on huge pages, to see
how much of the ratios fresh memory makes. Where other
processes use the same cores, threads that spin while they wait for each other cost more than the work, and
`generate`, with its slabs, most: set `OMP_WAIT_POLICY=PASSIVE`, or measure on one thread.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from surgery.core.kernel import generate, transpose

LOCATIONS, CONTEXT, BLOCK, ALTERNATIVES = 41_472, 4, 256, 2
TITLES = {
    "copy": "copy of\nthe blocks",
    "forward": "generate\nforward",
    "generate": "generate\nboth ways",
    "prepared": "the same,\ntransposed\nat hand",
    "embedding_bag": "embedding\nbag",
    "padded_bmm": "sort, pad,\nbmm",
    "gather_bmm": "gather,\nbmm",
}


@dataclass(frozen=True)
class Problem:
    rows: Tensor  # [K*c, d]
    psi: Tensor  # [L, alternatives]
    index: Tensor  # [L, w]
    coefficient: Tensor  # [L, w]
    grad: Tensor  # [L, d]


def make_problem(hypermodules: int, locations: int, device: str) -> Problem:
    generator = torch.Generator().manual_seed(0)
    psi = torch.randint(hypermodules, (locations, ALTERNATIVES), generator=generator)
    if hypermodules == locations:
        psi[:, 0] = torch.arange(locations)
    index = (psi[:, :, None] * CONTEXT + torch.arange(CONTEXT)).flatten(1)
    return Problem(
        torch.randn(hypermodules * CONTEXT, BLOCK, generator=generator).to(device).requires_grad_(),
        psi.to(device),
        index.to(device),
        torch.randn(index.shape, generator=generator).to(device).requires_grad_(),
        torch.randn(locations, BLOCK, generator=generator).to(device),
    )


def gather_bmm(problem: Problem) -> Tensor:
    return torch.bmm(problem.coefficient[:, None], problem.rows[problem.index]).squeeze(1)


def embedding_bag(problem: Problem) -> Tensor:
    return F.embedding_bag(problem.index, problem.rows, per_sample_weights=problem.coefficient, mode="sum")


def padded_bmm(problem: Problem) -> Tensor:
    """Sort all (location, alternative) pairs by hypermodule, pad to the fullest one, and use one bmm."""
    hypermodules = len(problem.rows) // CONTEXT
    pairs = problem.psi.flatten()
    order = pairs.argsort(stable=True)
    counts = torch.bincount(pairs, minlength=hypermodules)
    width = int(counts.max())
    rank = torch.arange(len(pairs), device=pairs.device) - (counts.cumsum(0) - counts)[pairs[order]]
    slot = torch.empty_like(pairs).scatter_(0, order, pairs[order] * width + rank)
    contexts = problem.coefficient.view(-1, CONTEXT)
    padded = contexts.new_zeros(hypermodules * width, CONTEXT).index_copy(0, slot, contexts)
    generated = torch.bmm(padded.view(-1, width, CONTEXT), problem.rows.view(-1, CONTEXT, BLOCK))
    return generated.view(-1, BLOCK).index_select(0, slot).view(-1, ALTERNATIVES, BLOCK).sum(1)


def both_ways(problem: Problem, forward: Callable[[Problem], Tensor]) -> None:
    forward(problem).backward(problem.grad)
    problem.rows.grad = problem.coefficient.grad = None  # each pays for freeing its own


def make_competitors(problem: Problem) -> dict[str, Callable[[], object]]:
    prepared = transpose(problem.index, len(problem.rows))
    target = torch.empty_like(problem.grad)

    def run(p: Problem) -> Tensor:
        return generate(p.rows, p.index, p.coefficient)

    def run_prepared(p: Problem) -> Tensor:
        return generate(p.rows, p.index, p.coefficient, prepared)

    return {
        "copy": partial(target.copy_, problem.grad),
        "forward": torch.no_grad()(partial(run, problem)),
        "generate": partial(both_ways, problem, run),
        "prepared": partial(both_ways, problem, run_prepared),
        "embedding_bag": partial(both_ways, problem, embedding_bag),
        "padded_bmm": partial(both_ways, problem, padded_bmm),
        "gather_bmm": partial(both_ways, problem, gather_bmm),
    }


def time_one(competitor: Callable[[], object], device: str) -> float:
    """Milliseconds of one call, its kernels finished."""
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    competitor()
    if device != "cpu":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


def measure(hypermodules: int, locations: int, device: str, rounds: int) -> dict[str, float]:
    """Median milliseconds of each competitor, and two ratios to `generate`."""
    competitors = make_competitors(make_problem(hypermodules, locations, device))
    times: dict[str, list[float]] = {name: [] for name in competitors}
    for turn in range(rounds + 1):
        for name, competitor in competitors.items():
            elapsed = time_one(competitor, device)
            if turn:  # the first turn warms up
                times[name].append(elapsed)
    row = {name: median(values) for name, values in times.items()}
    return {
        "K": hypermodules,
        **row,
        "embedding_bag / generate": row["embedding_bag"] / row["generate"],
        "gather_bmm / generate": row["gather_bmm"] / row["generate"],
    }


def print_table(results: list[dict[str, float]], title: str) -> None:
    table = Table(title=title)
    for name in results[0]:
        table.add_column(TITLES.get(name, name.replace("_", " ").replace(" / ", " /\n")), justify="right")
    for result in results:
        cells = [f"{value:.1f}" if isinstance(value, float) else f"{value:,}" for value in result.values()]
        table.add_row(*cells)
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--locations", type=int, default=LOCATIONS, help="L")
    parser.add_argument("--hypermodules", type=int, nargs="+", help="K; by default L, L/4, 1000 and 100")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    hypermodules = options.hypermodules or [options.locations, options.locations // 4, 1000, 100]
    results = [measure(k, options.locations, options.device, options.rounds) for k in hypermodules]
    title = f"milliseconds, L = {options.locations:,}, {options.device}, {options.threads} threads"
    if options.json:
        print(json.dumps({"title": title, "results": results}, indent=2))
    else:
        print_table(results, title)


if __name__ == "__main__":
    main()
