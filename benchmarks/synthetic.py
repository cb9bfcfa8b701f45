"""The synthetic benchmark of the paper (Table 2, Fig. 2): which alignment is found, how soon, and what it is worth.

    python -m benchmarks.synthetic                                 all settings, noisy and clean, 10 seeds
    python -m benchmarks.synthetic --setting synthetic --seeds 3
    python -m benchmarks.synthetic --file synthetic_mtl.npz        the original data in place of generated ones

Each row is a recipe of that name, trained by its own settings on one thread. RMSE is the mean over the tasks, on test
data, in the state that the recipe keeps. *Found* is the first generation after which three hypermodules serve the 30
tasks and at least 27 of them are with most of their group; *kept* is the share of the later generations of which that
is still true; the adjusted Rand index compares the final grouping with the true one. Without --file every seed draws
its own data.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

SETTINGS = ("synthetic_single", "synthetic_random", "synthetic_oracle", "synthetic_paper", "synthetic")
PURE = 27  # tasks, of 30, that must be with most of their group


def run(
    setting: str, noisy: bool, seed: int, file: str | None, changes: Sequence[str] = ()
) -> dict[str, Any]:
    """Train one setting once, with `changes` of its recipe."""
    import torch

    torch.set_num_threads(1)
    from surgery_recipes.synthetic import problem

    from surgery.pipeline.train import train_recipe
    from surgery.settings.documents import override, read_document
    from surgery.settings.recipe import Recipe
    from surgery.training.report.runlog import find_log, read_log

    options = [f"models.0.tasks.0.options.noisy={str(noisy).lower()}", f"seed={seed}"]
    options += [
        f"models.0.tasks.0.options.{k}={v}" for k, v in (("seed", seed), ("file", file)) if v is not None
    ]
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        recipe = Recipe.of(override(read_document(setting), [*options, *changes, f"out={folder}/joint"]))
        joint, report = train_recipe(recipe, cpu=True)
        lines = read_log(find_log(f"{folder}/joint"))
    found = problem(noisy, file, seed)
    examples, target = found.test
    with torch.no_grad():
        errors = (joint["tasks"](examples) - target).square().mean(0).sqrt()
    strips = [next(iter(line["alignment"].values())) for line in lines if line["event"] == "generation"]
    right = [_is_found(strip, found.group.tolist()) for strip in strips]
    first = next((number for number, each in enumerate(right) if each), None)
    return {
        "setting": setting, "noisy": noisy, "seed": seed,
        "rmse": float(errors.mean()),
        "modules": len(set(strips[report.best])),
        "agreement": rand_index(strips[report.best], found.group.tolist()),
        "found": None if first is None else first + 1,
        "kept": None if first is None else statistics.mean(right[first:]),
        "seconds": time.perf_counter() - began,
    }  # fmt: skip


def rand_index(one: Sequence[int], other: Sequence[int]) -> float:
    """The adjusted Rand index of two groupings: 1 where they are equal, 0 what chance gives.

    Example:
        >>> rand_index([5, 5, 2, 2], [0, 0, 1, 1])
        1.0
    """
    pairs = [
        sum(math.comb(n, 2) for n in Counter(g).values()) for g in (zip(one, other, strict=True), one, other)
    ]
    both, first, second = pairs
    chance = first * second / math.comb(len(one), 2)
    most = (first + second) / 2
    return 1.0 if most == chance else (both - chance) / (most - chance)


def _is_found(strip: Sequence[int], group: Sequence[int]) -> bool:
    """Whether three hypermodules serve three groups but for a few tasks."""
    if len(set(strip)) != 3:
        return False
    majority = 0
    for number in set(group):
        own = [module for module, of in zip(strip, group, strict=True) if of == number]
        majority += max(own.count(module) for module in set(own))
    return majority >= PURE


def table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown: one row for each setting and kind of data."""
    lines = [
        "| recipe | targets | RMSE, mean ± standard error | hypermodules at the end | found (median generation) "
        "| found in | kept afterwards | adjusted Rand index, and runs where it is 1 | seconds a run |",
        "| --- | --- | ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for noisy in (False, True):
        for setting in SETTINGS:
            rows = [r for r in results if r["setting"] == setting and r["noisy"] == noisy]
            if not rows:
                continue
            errors = [r["rmse"] for r in rows]
            error = statistics.stdev(errors) / len(errors) ** 0.5 if len(errors) > 1 else 0.0
            found = [r for r in rows if r["found"] is not None]
            counts = sorted(r["modules"] for r in rows)
            modules = str(counts[0]) if counts[0] == counts[-1] else f"{counts[0]} to {counts[-1]}"
            kept = f"{statistics.mean(r['kept'] for r in found):.0%}" if found else "-"
            when = sorted(r["found"] or 10**9 for r in rows)[(len(rows) - 1) // 2]
            median = "-" if when == 10**9 else str(when)
            lines.append(
                f"| {setting} | {'noisy' if noisy else 'clean'} | {statistics.mean(errors):.3f} ± {error:.3f} | "
                f"{modules} | {median} | {len(found)}/{len(rows)} | {kept} | "
                f"{statistics.mean(r['agreement'] for r in rows):.3f}, "
                f"{sum(r['agreement'] == 1 for r in rows)}/{len(rows)} | "
                f"{statistics.mean(r['seconds'] for r in rows):.0f} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--setting", action="append", choices=SETTINGS, help="default: all; repeatable")
    parser.add_argument("--targets", choices=("clean", "noisy", "both"), default="both")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--file", help="the original benchmark's .npz file")
    parser.add_argument("--set", dest="changes", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", action="store_true", help="every run as a line")
    options = parser.parse_args()
    kinds = {"clean": [False], "noisy": [True], "both": [False, True]}[options.targets]
    file = None if options.file is None else str(Path(options.file).resolve())
    cells = [
        (setting, noisy, seed, file, options.changes)
        for setting in options.setting or SETTINGS
        for noisy in kinds
        for seed in range(options.first, options.first + options.seeds)
    ]
    began, results = time.perf_counter(), []
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        for done, result in enumerate(pool.map(run, *zip(*cells, strict=True)), 1):
            results.append(result)
            if options.json:
                print(json.dumps(result), flush=True)
            else:
                gone = time.perf_counter() - began
                print(
                    f"\r{done}/{len(cells)} runs, {gone:.0f} s, about {gone / done * (len(cells) - done):.0f} s left ",
                    end="", flush=True,
                )  # fmt: skip
    if not options.json:
        print(
            f"\r{len(cells)} runs in {time.perf_counter() - began:.0f} s on {options.jobs} processes"
            + " " * 20
        )
        print(table(results))


if __name__ == "__main__":
    main()
