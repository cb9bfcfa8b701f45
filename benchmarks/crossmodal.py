"""Three architectures of three modalities, each alone, within itself, in pairs and all together, with baselines.

Every run is the recipe crossmodal_small (or --recipe) with some of its members and one method; all members of a run
take the same number of steps in every run. The table has each task's test error as mean and standard error over
seeds, and the probability by Welch's t-test that the difference to its single-task runs is chance. Finished runs
are kept in --folder and not run again.

    single        no sharing, plain training
    intra         evolution within one member
    evolved       evolution over all members of the run
    priced        the same at a price of parameters: what takes more of them has to be worth it
    hierarchical  the same, from an alignment by topological order
    order         the alignment by topological order stays; locations have contexts
    hard          the same with c = 0: classical hard sharing
    adapters      the same with a diagonal for each location: parallel adapters
    c0            evolution with c = 0
    rows          evolution, rows carrying the deviations of layers, contexts of challengers scaled to the blocks
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any

from benchmarks.harness import make_parser
from benchmarks.recipe_runs import add_options, compare, in_evolution, members_of

METHODS: dict[str, dict[str, Any]] = {
    "single": {"codes": "ones", "change": "none"},
    "intra": {},
    "evolved": {},
    "priced": {"price": 0.3},
    "hierarchical": {"start": "order"},
    "order": {"start": "order", "change": "none"},
    "hard": {"start": "order", "change": "none", "codes": "ones"},
    "adapters": {"start": "order", "change": "none", "codes": "diagonals"},
    "c0": {"codes": "ones"},
    "rows": {"scale": "rows", "contexts": "scaled"},
}
ALONE = ("single", "intra")


def changes() -> dict[str, dict[str, Any]]:
    """What each method changes in the recipe."""
    return in_evolution(METHODS)


def plan_runs(members: Sequence[str], methods: Sequence[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Every method with the sets of members that it is tried on: baselines on all together alone."""
    for method in methods:
        if method in ALONE:
            yield from ((method, (name,)) for name in members)
        elif method == "evolved":
            yield from ((method, chosen) for size in (2, 3) for chosen in combinations(members, size))
        else:
            yield method, tuple(members)


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--recipe", default="crossmodal_small", help="name or file")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--members", nargs="+", help="of the recipe's; all by default")
    add_options(parser, "crossmodal")
    options = parser.parse_args(argv)
    members = options.members or members_of(options.recipe)
    runs = list(plan_runs(members, options.methods))
    compare("crossmodal", options, argv, options.recipe, changes(), runs, "single")


if __name__ == "__main__":
    main()
