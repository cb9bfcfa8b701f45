"""Rounding a matrix, plainly and with error feedback: `python -m benchmarks.rounding`.

Both take turns with one product of the matrix and its second moment, which error feedback has to take several of:
times are given as ratios to it, so that they say the same on any machine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.harness import make_header, make_parser, show, take_turns
from surgery.storage.codecs import Statistics, decode, encode, grouped
from surgery.storage.codecs.feedback import damped, price

SHAPES = ((768, 768), (3072, 768), (2048, 2048), (5632, 2048))
FAST = ((48, 128),)


def correlated(n: int, generator: torch.Generator) -> Tensor:
    """The second moment `[n, n]` of inputs of which few directions are strong."""
    inputs = torch.randn(n, n, generator=generator) * torch.linspace(2, 0.02, n)
    return inputs @ inputs.T / n


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bits", type=int, default=4)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    results = []
    for o, n in FAST if options.fast else SHAPES:
        generator = torch.Generator().manual_seed(options.seed)
        weight, moment = torch.randn(o, n, generator=generator), correlated(n, generator)
        precision, known = grouped(options.bits, 64), Statistics(moment, 1)
        ways: dict[str, Callable[[], Tensor]] = {
            "product": lambda weight=weight, moment=moment: weight @ moment,
            "plain": lambda weight=weight, precision=precision: decode(encode(weight, precision)),
            "fed back": lambda weight=weight, precision=precision, known=known: decode(
                encode(weight, precision, known)
            ),
        }
        times = take_turns(ways, 1 if options.fast else options.rounds)
        base, costs = times["product"].fastest, damped(moment)
        cost = {name: float(price(ways[name]() - weight, costs).sum()) for name in ("plain", "fed back")}
        results += [
            {
                "matrix": f"{o}x{n}",
                "rounded": name,
                "fastest ms": times[name].fastest * 1e3,
                "products": times[name].fastest / base,
                "error cost": cost[name] / cost["plain"],
            }
            for name in ("plain", "fed back")
        ]
    show(
        f"rounding to int{options.bits}/64", make_header("rounding", options, argv), results, (), options.json
    )


if __name__ == "__main__":
    main()
