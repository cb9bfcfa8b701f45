"""Runs of a training recipe with several methods and seeds, as the benchmarks that compare methods need them.

Every run is a process of its own; finished runs are kept in a folder and not run again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.harness import make_header, show, write_csv

Changes = Mapping[str, Mapping[str, Any]]
"""By method, what it changes in a recipe."""
Runs = Sequence[tuple[str, tuple[str, ...]]]
"""A method with the members that it is tried on."""


def add_options(parser: argparse.ArgumentParser, folder: str) -> None:
    """Options of every benchmark that compares methods."""
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--set", dest="changes", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--folder", type=Path, default=Path(folder), help="where finished runs are kept")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each with --threads threads")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--markdown", type=Path)


def document_of(
    recipe: str, method: Mapping[str, Any], members: Sequence[str], seed: int, changes: Sequence[str]
) -> dict[str, Any]:
    """The recipe of one run: some members, what the method changes, and then `changes`."""
    from surgery.settings.documents import override, read_document

    document = read_document(recipe)
    document["models"] = [model for model in document["models"] if model["name"] in members]
    document = _merged(document, method)
    evolution = document["train"].get("evolution", {})
    if evolution.get("codes", "contexts") != "contexts":
        evolution.pop("contexts", None)
    return override(document, [*changes, f"seed={seed}"])


def _merged(document: Any, changes: Any) -> Any:
    """Changes laid over a document, mapping by mapping."""
    if not isinstance(document, dict) or not isinstance(changes, Mapping):
        return changes
    return {**document, **{key: _merged(document.get(key), value) for key, value in changes.items()}}


def in_evolution(methods: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Methods that change `train.evolution` alone."""
    return {name: {"train": {"evolution": dict(changes)}} for name, changes in methods.items()}


def place_of(folder: Path, method: str, document: Mapping[str, Any], fast: bool) -> Path:
    """Where a run's report is kept: another recipe, or other settings, are another run."""
    names = "+".join(model["name"] for model in document["models"])
    content = json.dumps({"fast": fast, **document}, sort_keys=True)
    digest = hashlib.sha256(content.encode()).hexdigest()[:10]
    return folder / f"{method}-{names}-{document['seed']}-{digest}.json"


def run_one(path: Path, document: Mapping[str, Any], fast: bool, threads: int) -> None:
    """One run in a process of its own; its report goes to `path`."""
    work = path.with_suffix(".yaml")
    work.write_text(json.dumps(document), encoding="utf-8")  # JSON is YAML
    command = [sys.executable, "-m", "benchmarks.recipe_runs", str(work), str(threads)]
    done = subprocess.run(
        command + ["--fast"] * fast,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
    )
    if done.returncode:
        raise SystemExit(f"{path.stem} failed:\n{done.stderr[-2000:]}")
    path.write_text(done.stdout.splitlines()[-1], encoding="utf-8")
    work.unlink()


def run_here(work: Path, fast: bool, threads: int) -> None:
    """The run itself: prints its report as one line of JSON."""
    import torch

    from surgery.pipeline.train import train_recipe
    from surgery.settings.recipe import Recipe

    torch.set_num_threads(threads)
    document = json.loads(work.read_text(encoding="utf-8"))
    _, report = train_recipe(Recipe.of(document), fast_run=fast, cpu=document.get("device") == "cpu")
    print(json.dumps(report.document()))


def error_of(score: Mapping[str, Any]) -> tuple[str, float]:
    """What a task is judged by: the share of mistakes, 1 - r, or the perplexity of a language model."""
    if score["metric"] is not None:
        return "error", 1 - score["metric"]
    return "perplexity", math.exp(score["loss"])


def welch(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Two-sided p of Welch's t-test; None where one side has fewer than two values or neither varies."""
    from scipy.stats import ttest_ind

    if min(len(a), len(b)) < 2 or stdev(a) + stdev(b) == 0:
        return None
    return float(ttest_ind(a, b, equal_var=False).pvalue)


def tabulate(
    found: Mapping[tuple[str, tuple[str, ...]], Sequence[Mapping[str, Any]]], reference: str
) -> list[dict[str, Any]]:
    """One row for each method, set of members and task; `reference` is the method that others are tested against."""
    single = {
        name: [error_of(report["tests"][name])[1] for report in reports]
        for (method, members), reports in found.items()
        if method == reference
        for name in members
    }
    rows = []
    for (method, members), reports in found.items():
        for name in members:
            errors = [error_of(report["tests"][name])[1] for report in reports]
            p = None if method == reference or name not in single else welch(errors, single[name])
            rows.append(
                {
                    "method": method,
                    "members": "+".join(members),
                    "task": name,
                    "measure": error_of(reports[0]["tests"][name])[0],
                    "mean": mean(errors),
                    "standard error": stdev(errors) / len(errors) ** 0.5 if len(errors) > 1 else None,
                    f"p against {reference}": p,
                    "share of numbers": mean(r["numbers"][0] / max(r["numbers"][1], 1) for r in reports),
                    "seeds": len(errors),
                    "seconds": mean(report["seconds"] for report in reports),
                }
            )
    return rows


def to_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a Markdown table."""
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + " --- |" * len(rows[0])]
    for row in rows:
        cells = [
            "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
            for value in row.values()
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def compare(
    name: str,
    options: argparse.Namespace,
    argv: Sequence[str] | None,
    recipe: str,
    methods: Changes,
    runs: Runs,
    reference: str,
) -> None:
    """Run what is not yet there, `options.jobs` at a time, seed by seed, and show the table."""
    options.folder.mkdir(parents=True, exist_ok=True)
    seeds = range(options.seed, options.seed + (1 if options.fast else options.seeds))
    every = [(seed, *run) for seed in seeds for run in runs]

    def finish(run: tuple[int, str, tuple[str, ...]]) -> dict[str, Any]:
        seed, method, chosen = run
        document = document_of(recipe, methods[method], chosen, seed, options.changes)
        path = place_of(options.folder, method, document, options.fast)
        if not path.exists():
            run_one(path, document, options.fast, options.threads)
            print(f"{path.stem} done", file=sys.stderr, flush=True)
        return json.loads(path.read_text(encoding="utf-8"))

    found: dict[tuple[str, tuple[str, ...]], list[Mapping[str, Any]]] = {}
    with ThreadPoolExecutor(options.jobs) as pool:
        for (_, method, chosen), report in zip(every, pool.map(finish, every), strict=True):
            found.setdefault((method, chosen), []).append(report)
    rows = tabulate(found, reference)
    if options.csv:
        write_csv(options.csv, rows)
    if options.markdown:
        options.markdown.write_text(to_markdown(rows), encoding="utf-8")
    show(f"test errors of {recipe}", make_header(name, options, argv), rows, [], options.json)


def members_of(recipe: str) -> tuple[str, ...]:
    """The names of a recipe's members."""
    from surgery.settings.documents import read_document

    return tuple(model["name"] for model in read_document(recipe)["models"])


if __name__ == "__main__":
    run_here(Path(sys.argv[1]), "--fast" in sys.argv, int(sys.argv[2]))
