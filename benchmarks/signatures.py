"""Isometric nets from scratch: learned mixtures of templates against signatures by hand, at equal parameters.

--case cnn: blocks of expansion, depthwise convolution, squeeze-and-excitation and projection; --case vit: a small
vision transformer; both on Fashion-MNIST. All runs take the same steps with the same learning rate; the table has
test errors as mean and standard error over seeds, and the probability by Welch's t-test that the difference to a
cyclic signature is chance.

    plain         every layer has weights of its own: eight layers
    shallow       the same with as many layers as there are templates
    learned       mixtures of four templates, trained; all layers begin alike
    begun         the same, from mixtures that begin as the sequential signature, nine tenths sure
    hardened      as learned, each layer on one template in the last generations
    sequential    1 1 2 2 3 3 4 4
    cyclic        1 2 3 4 1 2 3 4
    progressive   1 2 2 3 3 3 4 4 (later templates more often)
    random        by the seed
    deeper        16 layers, mixtures of four templates
    deeper-begun  the same, from the sequential signature
    deepest       32 layers, mixtures of four templates
    deepest-begun the same, from the sequential signature
    deeper-cyclic 16 layers, 1 2 3 4 1 2 3 4 ...
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.harness import make_parser
from benchmarks.recipe_runs import add_options, compare

TEMPLATES = 4


def _by_hand(kind: str) -> dict[str, Any]:
    return {"settings": {"mixture": "one-hot"}, "train": {"templates": {"start": kind, "harden": False}}}


_PLAIN = {"settings": {"templates": None, "mixture": "one-hot"}, "train": {"templates": {"harden": False}}}
_LEARNED = {"train": {"templates": {"start": "uniform", "entropy": 0.0, "harden": False}}}
_BEGUN = {"train": {"templates": {**_LEARNED["train"]["templates"], "start": "sequential"}}}
METHODS: Mapping[str, tuple[int, Mapping[str, Any]]] = {
    "plain": (8, _PLAIN),
    "shallow": (TEMPLATES, _PLAIN),
    "learned": (8, _LEARNED),
    "begun": (8, _BEGUN),
    "hardened": (8, {"train": {"templates": {"start": "uniform", "entropy": 0.01, "harden": True}}}),
    "sequential": (8, _by_hand("sequential")),
    "cyclic": (8, _by_hand("cyclic")),
    "progressive": (8, _by_hand("progressive")),
    "random": (8, _by_hand("random")),
    "deeper": (16, _LEARNED),
    "deeper-begun": (16, _BEGUN),
    "deepest": (32, _LEARNED),
    "deepest-begun": (32, _BEGUN),
    "deeper-cyclic": (16, _by_hand("cyclic")),
}


def methods_of(case: str) -> dict[str, dict[str, Any]]:
    """What every method changes in the recipe."""
    from surgery.settings.documents import read_document

    (model,) = read_document("isometric")["models"]
    return {
        name: {**changes, "models": [{**model, "model": f"surgery_recipes.isometric:{case}?layers={layers}"}]}
        for name, (layers, changes) in METHODS.items()
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--case", choices=("cnn", "vit"), default="cnn", help="the net")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    add_options(parser, "signatures")
    options = parser.parse_args(argv)
    runs = [(method, ("net",)) for method in options.methods]
    compare("signatures", options, argv, "isometric", methods_of(options.case), runs, "cyclic")


if __name__ == "__main__":
    main()
