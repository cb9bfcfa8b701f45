"""The Gumbel-Matrix: do related tasks end on the same components, and unrelated ones on others?

Figures and a table of Maziarz et al., *Flexible Multi-task Networks by Learning Parameter Allocation*, 2019, each a
recipe that `surgery train` runs as well, with several seeds:

    related     figure 1: two tasks of relatedness rho = 0 and 1 and four components, all of them shared, or two for
                each task (recipe gumbel_related); test losses
    pairs       figure 7: two pairs of equal tasks, routes learned with and without a budget (recipe gumbel_pairs): the
                share of components that tasks of a pair, and of different pairs, have in common in the end
    digits      4-MNIST: two copies of MNIST and two of rotated MNIST (recipe four_mnist): test accuracy without
                sharing, with all components shared, and with learned routes, and what copies share in the end

`of a pair` and `of two pairs` are components that two tasks have in common, as a share of those that either has, at all
depths together. Finished runs are kept line by line in a file, and not run again.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from itertools import combinations
from statistics import mean, stdev
from typing import Any

from benchmarks.harness import add_cell_options, make_header, make_parser, run_cells, show

NET = "surgery_recipes.routed:"
FIGURES: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "related": (
        "gumbel_related",
        {
            f"{allocation}, rho {rho}": f"regression?tasks=2&allocation={allocation}"
            for rho in (0, 1)
            for allocation in ("shared", "apart")
        },
    ),
    "pairs": (
        "gumbel_pairs",
        {
            "budget 0.5": "regression?component_budget=0.5",
            "no budget": "regression",
            "budget 0.75": "regression?component_budget=0.75",
        },
    ),
    "digits": (
        "four_mnist",
        {
            "apart": "digits?allocation=apart",
            "shared": "digits?allocation=shared",
            "gumbel": "digits",
            "gumbel, budget 0.75": "digits?component_budget=0.75",
        },
    ),
}
"""By figure, its recipe and by way the net that stands in it."""


def document_of(figure: str, way: str, seed: int, changes: Sequence[str]) -> dict[str, Any]:
    """The recipe of one run."""
    from surgery.settings.documents import override, read_document

    recipe, ways = FIGURES[figure]
    document = override(read_document(recipe), [*changes, f"seed={seed}"])
    document["models"][0]["model"] = NET + ways[way]
    document["train"]["validate_every"] = document["train"]["generations"]  # the last state is kept
    for number, task in enumerate(document["models"][0]["tasks"]):
        options = task.setdefault("options", {})
        if figure == "related":
            options["rho"] = int(way[-1])
        if figure == "digits":  # copies come in orders of their own
            options["seed"] = 4 * seed + number
    return document


def common(first: Sequence[Sequence[str]], second: Sequence[Sequence[str]]) -> float:
    """Components that two tasks have in common, as a share of those that either has; 0 where neither has any.

    Args:
        first: by depth, names of the components that are on.
        second: of the other task.
    """
    one, other = ({name for names in each for name in names} for each in (first, second))
    return len(one & other) / max(len(one | other), 1)


def run(figure: str, way: str, seed: int, changes: Sequence[str], fast: bool) -> dict[str, Any]:
    """One run of a recipe: what it reached on test data, and who uses what."""
    import torch

    from surgery.pipeline.train import train_recipe
    from surgery.settings.recipe import Recipe

    torch.set_num_threads(1)
    began = time.process_time()
    document = document_of(figure, way, seed, changes)
    _, report = train_recipe(Recipe.of(document), fast_run=fast, cpu=True)
    scores = [score.metric if figure == "digits" else score.loss for score in report.tests.values()]
    found: dict[str, Any] = {"way": way, "seed": seed, "score": mean(scores), "scores": scores}  # pyright: ignore
    chosen = list(report.methods["routes"]["chosen"]["net:routed"].values())
    found["on"] = mean(sum(map(len, task)) for task in chosen)
    if len(chosen) == 4:
        shared = {(a, b): common(chosen[a], chosen[b]) for a, b in combinations(range(4), 2)}
        of_pair = [shared.pop(pair) for pair in ((0, 1), (2, 3))]
        found |= {"of a pair": mean(of_pair), "of two pairs": mean(shared.values())}
        found["as in the paper"] = float(min(of_pair) == 1 and not any(shared.values()))
    names = [f"{depth}.{number}" for depth in range(len(chosen[0])) for number in range(4)]
    on = [{name for depth in task for name in depth} for task in chosen]
    found["chosen"] = ["".join(str(int(name in each)) for name in names) for each in on]
    return {**found, "cpu seconds": time.process_time() - began}


def tabulate(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """By way, means over seeds, and the standard error of the score."""
    rows = []
    for way in dict.fromkeys(each["way"] for each in found):
        mine = [each for each in found if each["way"] == way]
        scores = [each["score"] for each in mine]
        error = stdev(scores) / len(scores) ** 0.5 if len(scores) > 1 else None
        row = {"way": way, "runs": len(mine), "score": mean(scores), "standard error": error}
        columns = ("on", "of a pair", "of two pairs", "as in the paper", "cpu seconds")
        rows.append(
            {**row, **{name: mean(each[name] for each in mine) for name in columns if name in mine[0]}}
        )
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Run one of the figures."""
    parser = make_parser(__doc__)
    parser.add_argument("figure", choices=tuple(FIGURES))
    parser.add_argument("--ways", nargs="+", default=None, help="some of the figure's; all by default")
    parser.add_argument(
        "--runs", type=int, default=None, help="seeds; by default 30 for related, 20 for pairs, 10"
    )
    add_cell_options(parser, "gumbel_matrix.jsonl")
    options = parser.parse_args(argv)
    figure, ways = options.figure, options.ways or list(FIGURES[options.figure][1])
    runs = 1 if options.fast else options.runs or {"related": 30, "pairs": 20}.get(figure, 10)
    seeds = range(options.seed, options.seed + runs)
    cells = [(figure, way, seed, tuple(options.changes), options.fast) for seed in seeds for way in ways]
    kept = None if options.fast else options.kept
    done = run_cells(run, cells, options.jobs, kept, options.minutes)
    header = make_header("gumbel_matrix", options, argv)
    rows = tabulate([done[cell] for cell in cells if cell in done])
    show(f"Gumbel-Matrix, {figure}", header, rows, [], options.json)


if __name__ == "__main__":
    main()
