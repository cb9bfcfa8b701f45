"""Orders of shared layers on digits, random patterns and alphabets: runs of three recipes with several seeds.

    pairs       pairs of MNIST's digits behind random encoders that stay as they are, 2 to 10 tasks (recipe
                digit_pairs): test errors by order and number of tasks
    patterns    two tasks learn so many random patterns each by heart, with four layers of 64 units in the same order
                or one backward, linear or with ReLU (recipe random_patterns): the mean squared error that is left
    alphabets   twenty alphabets (recipe alphabets), or ten at a small size: fifteen letters of 20 x 20 pixels, nets of
                8 or 16 channels, no dropout. Errors with layers of their own, four layers in parallel, permuted and
                soft order, and seven components at eight depths, all shared or as learned

Seeds choose weights, orders, pairs and patterns. Finished runs are kept line by line in a file, and not run again.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from itertools import combinations
from statistics import mean, stdev
from typing import Any

from benchmarks.harness import add_cell_options, make_header, make_parser, run_cells, show

ORDERS = ("soft", "permuted", "parallel", "single")
TASKS, PATTERNS, SMALL = (2, 5, 10), (8, 16, 32, 48, 64, 96), 10
WAYS: Mapping[str, Sequence[tuple[str, int]]] = {
    "pairs": [(order, tasks) for tasks in TASKS for order in ORDERS],
    "patterns": [
        (f"{order}, {kind}", count)
        for count in PATTERNS
        for kind in ("linear", "ReLU")
        for order in ("permuted", "parallel")
    ],
    "alphabets": [(way, tasks) for tasks in (SMALL, 20) for way in (*ORDERS, "bottom", "gumbel")],
}
"""By table, ways and what they are tried with: tasks, or patterns of each; so few alphabets are a small size."""
RECIPES = {"pairs": "digit_pairs", "patterns": "random_patterns", "alphabets": "alphabets"}


def document_of(
    table: str, way: str, size: int, seed: int, rate: float | None, changes: Sequence[str]
) -> dict[str, Any]:
    """The recipe of one run."""
    from surgery.settings.documents import override, read_document

    given = [] if rate is None else [f"train.optimizer.lr={rate}"]
    document = override(read_document(RECIPES[table]), [*changes, *given, f"seed={seed}"])
    document["train"]["validate_every"] = document["train"]["generations"]  # the last state is kept
    model = document["models"][0]
    if table == "pairs":
        every = list(combinations(range(10), 2))
        drawn = random.Random(seed).sample(every, size)
        model["tasks"] = model["tasks"][:size]
        for task, classes in zip(model["tasks"], drawn, strict=True):
            task["options"]["classes"] = list(classes)
        model["model"] += f"?order={way}&tasks={size}&seed={seed}"
    elif table == "patterns":
        order, _, kind = way.partition(", ")
        for task in model["tasks"]:
            task["batch"] = task["options"]["count"] = size
        model["model"] += f"?order={order}&linear={str(kind == 'linear').lower()}"
    else:
        model["tasks"] = model["tasks"][:size]
        if size == SMALL:
            for task in model["tasks"]:
                task["options"] |= {"side": 20, "letters": 15}
            channels = 8 if way in ("bottom", "gumbel") else 16
            model["model"] += f"?side=20&dropout=0&channels={channels}"
        model["model"] += f"{'&' if '?' in model['model'] else '?'}way={way}&tasks={size}&seed={seed}"
    return document


def run(
    table: str,
    way: str,
    size: int,
    seed: int,
    rate: float | None,
    changes: Sequence[str],
    fast: bool,
    device: str,
) -> dict[str, Any]:
    """One run of a recipe: mean errors over tasks, on test and on validation data."""
    import torch

    from surgery.pipeline.train import train_recipe
    from surgery.settings.recipe import Recipe

    torch.set_num_threads(1)
    began, wall = time.process_time(), time.monotonic()
    document = document_of(table, way, size, seed, rate, changes)
    _, report = train_recipe(Recipe.of(document), fast_run=fast, cpu=device == "cpu")
    errors, held = errors_of(report.tests), errors_of(report.scores)
    found = {
        "way": way,
        "size": size,
        "seed": seed,
        "lr": rate,
        "error": mean(errors.values()),
        "errors": errors,
    }
    found["validation"] = mean(held.values()) if held else None
    if way == "gumbel":
        chosen = report.methods["routes"]["chosen"]
        found["on"] = mean(
            len(depth)
            for name, tasks in chosen.items()
            if "routes" in name
            for own in tasks.values()
            for depth in own
        )
    return {**found, "seconds": time.monotonic() - wall, "cpu seconds": time.process_time() - began}


def errors_of(scores: Mapping[str, Any]) -> dict[str, float]:
    """By task, the share of mistakes, or the loss where there is no metric."""
    return {name: score.loss if score.metric is None else 1 - score.metric for name, score in scores.items()}


def tabulate(found: Sequence[Mapping[str, Any]], sized: str) -> list[dict[str, Any]]:
    """By way, size and rate, mean errors over seeds and the standard error of those on test data."""
    cells: dict[tuple[int, str, float | None], list[Mapping[str, Any]]] = {}
    for each in found:
        cells.setdefault((each["size"], each["way"], each["lr"]), []).append(each)
    rows = []
    for (size, way, rate), mine in sorted(cells.items(), key=str):
        errors = [each["error"] for each in mine]
        se = stdev(errors) / len(errors) ** 0.5 if len(errors) > 1 else None
        row = {
            sized: size,
            "way": way,
            "lr": rate,
            "runs": len(mine),
            "error": mean(errors),
            "standard error": se,
        }
        held = [each["validation"] for each in mine if each["validation"] is not None]
        row["validation"] = mean(held) if held else None
        rows.append({**row, "cpu seconds": mean(each["cpu seconds"] for each in mine)})
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Run one of the tables."""
    parser = make_parser(__doc__)
    parser.add_argument("table", choices=tuple(RECIPES))
    parser.add_argument("--ways", nargs="+", default=None, help="some of the table's; all by default")
    parser.add_argument(
        "--sizes", nargs="+", type=int, default=None, help="some of the table's; all by default"
    )
    parser.add_argument("--runs", type=int, default=3, help="seeds")
    parser.add_argument(
        "--rates", nargs="+", type=float, default=[None], help="of learning; that of the recipe by default"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    add_cell_options(parser, "orders.jsonl")
    options = parser.parse_args(argv)
    table, seeds = options.table, range(options.seed, options.seed + (1 if options.fast else options.runs))
    ways = [
        (way, size)
        for way, size in WAYS[table]
        if (options.ways is None or way in options.ways) and (options.sizes is None or size in options.sizes)
    ]
    cells = [
        (table, way, size, seed, rate, tuple(options.changes), options.fast, options.device)
        for seed in seeds
        for rate in options.rates
        for way, size in ways
    ]
    done = run_cells(run, cells, options.jobs, None if options.fast else options.kept, options.minutes)
    rows = tabulate(list(done.values()), "patterns" if table == "patterns" else "tasks")
    show(f"Orders of shared layers, {table}", make_header("orders", options, argv), rows, [], options.json)


if __name__ == "__main__":
    main()
