"""Soft layer ordering on UCI's tables: soft against permuted and parallel order, and against a net for each table.

Seven tables of Meyerson and Miikkulainen, *Beyond Shared Hierarchies*, 2018, as tasks of one net of 64 units and four
core layers, by the recipe soft_order: shares of test examples that are mistaken, after the last step; with `--set
train.stopping.keep=best`, of the state with the least mean validation loss. Seeds choose weights, orders and splits.
Finished runs are kept line by line in a file, and not run again.

    soft        each task mixes all layers at each depth, as it learns to
    permuted    each task has an order of the layers by chance
    parallel    all tasks use layer d at depth d
    parallel N  the same with N layers instead of four
    policy B    the same, but each task learns which of them it leaves out (AdaShare's policies, by Gumbel samples),
                within a share B of them
    single      each task has layers of its own
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from benchmarks.harness import add_cell_options, make_header, make_parser, run_cells, show

ORDERS = ("soft", "permuted", "parallel", "parallel 2", "policy 1", "policy 0.75", "policy 0.5", "single")


def run(order: str, seed: int, changes: Sequence[str], fast: bool) -> dict[str, Any]:
    """One run of the recipe: test errors by table, and the largest share of each depth."""
    import torch

    from surgery.pipeline.train import train_recipe
    from surgery.settings.documents import override, read_document
    from surgery.settings.recipe import Recipe

    torch.set_num_threads(1)
    began = time.process_time()
    document = override(read_document("soft_order"), [*changes, f"seed={seed}"])
    kind, _, number = order.partition(" ")
    name = "budget" if kind == "policy" else "layers"
    document["models"][0]["model"] += f"?order={kind}&seed={seed}" + f"&{name}={number}" * bool(number)
    joint, report = train_recipe(Recipe.of(document), fast_run=fast, cpu=True)
    errors = {name: 1 - (score.metric or 0.0) for name, score in report.tests.items()}
    core: Any = joint["net"].get_submodule("core")
    shares = [[gates.table()[row].tolist() for gates in core.depths()] for row in range(len(core.tasks))]
    return {
        "order": order, "seed": seed, "error": mean(errors.values()), "errors": errors, "shares": shares,
        "generation": report.best, "cpu seconds": time.process_time() - began,
    }  # fmt: skip


def tabulate(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """By order, means over seeds: of the mean error, with what it is above that of soft order with the same seeds."""
    soft = {each["seed"]: each["error"] for each in found if each["order"] == "soft"}
    rows = []
    for order in dict.fromkeys(each["order"] for each in found):
        mine = [each for each in found if each["order"] == order]
        errors = [each["error"] for each in mine]
        more = [
            each["error"] - soft[each["seed"]] for each in mine if each["seed"] in soft and order != "soft"
        ]
        row = {"order": order, "runs": len(mine), "error": mean(errors), "standard error": _error(errors)}
        row |= {"above soft": mean(more) if more else None, "its standard error": _error(more)}
        row |= {name: mean(each["errors"][name] for each in mine) for name in mine[0]["errors"]}
        rows.append({**row, "cpu seconds": mean(each["cpu seconds"] for each in mine)})
    return rows


def _error(values: Sequence[float]) -> float | None:
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


def main(argv: Sequence[str] | None = None) -> None:
    """Run all orders with some seeds."""
    parser = make_parser(__doc__)
    parser.add_argument("--orders", nargs="+", choices=ORDERS, default=list(ORDERS))
    parser.add_argument("--runs", type=int, default=10, help="seeds")
    add_cell_options(parser, "soft_order.jsonl")
    options = parser.parse_args(argv)
    seeds = range(options.seed, options.seed + (1 if options.fast else options.runs))
    cells = [
        (order, seed, tuple(options.changes), options.fast) for seed in seeds for order in options.orders
    ]
    done = run_cells(run, cells, options.jobs, None if options.fast else options.kept, options.minutes)
    rows = tabulate(list(done.values()))
    show("Soft layer ordering", make_header("soft_order", options, argv), rows, [], options.json)


if __name__ == "__main__":
    main()
