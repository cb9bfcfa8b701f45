"""Pretrained members trained jointly: how evolution should draw its challengers, against no sharing and one encoder.

--case sentiment: MiniLM four times, each to human ratings of sentiment in a domain of its own. --case
cross_architecture: EfficientNet-Lite0 on clothes beside MiniLM on tweets. All members of a run take the same number
of steps; the table has each task's test error (1 - r of a rating) as mean and standard error over seeds, the
probability by Welch's t-test that the difference to training alone is chance, and how many numbers the sites took.

    alone      no sharing, plain training: every member by itself
    encoder    one encoder for all members of one base, plain training: classical hard sharing
    splits     the same, and a block that members pull apart becomes two, however little (`splits: 0`)
    apart      the same, only where the cosine of their pulls is below -0.3
    contexts   one encoder, and every location has a context of its own
    usage      evolution as in the paper: from no sharing, challengers by usage, with the location's own context
    fitted     challengers by usage, their contexts fitted to the block
    explained  challengers by how much of the block they explain, siblings first, with fitted contexts
    scaled     the same, contexts scaled to the block's length
    able       as explained, but only challengers that explain at least half of the block compete
    paper      as usage, with the paper's scale: contexts carry the deviations of layers, not rows
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.harness import make_parser
from benchmarks.recipe_runs import add_options, compare, in_evolution, members_of

_OWN = {"start": "own", "change": "evolve", "least": 0.0, "scale": "rows"}
_EXPLAIN = {**_OWN, "draw": "explain", "siblings": True}
METHODS: dict[str, dict[str, Any]] = {
    "alone": {"start": "own", "codes": "ones", "change": "none"},
    "encoder": {"start": "given", "codes": "ones", "change": "none"},
    "splits": {"start": "given", "codes": "ones", "change": "none", "splits": 0.0},
    "apart": {"start": "given", "codes": "ones", "change": "none", "splits": 0.3},
    "contexts": {"start": "given", "change": "none", "scale": "rows"},
    "usage": {**_OWN, "draw": "usage", "contexts": "own"},
    "fitted": {**_OWN, "draw": "usage", "contexts": "fitted"},
    "explained": {**_EXPLAIN, "contexts": "fitted"},
    "scaled": {**_EXPLAIN, "contexts": "scaled"},
    "able": {**_EXPLAIN, "contexts": "fitted", "least": 0.5},
}
METHODS["paper"] = {**METHODS["usage"], "scale": "contexts"}
SHARED = ("encoder", "splits", "apart", "contexts")
"""What begins with one encoder for several members."""
CASES = {
    "sentiment": tuple(METHODS),
    "cross_architecture": tuple(name for name in METHODS if name not in SHARED),
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--case", choices=list(CASES), default="sentiment", help="the recipe")
    parser.add_argument(
        "--methods", nargs="+", choices=list(METHODS), help="all that suit the case by default"
    )
    add_options(parser, "pretrained")
    options = parser.parse_args(argv)
    members = members_of(options.case)
    runs = [(method, members) for method in options.methods or CASES[options.case]]
    compare("pretrained", options, argv, options.case, in_evolution(METHODS), runs, "alone")


if __name__ == "__main__":
    main()
