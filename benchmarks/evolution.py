"""One generation's evolution over 100,000 locations: draw locations and challengers, decide, and all around it.

*Draw* is the sample of half of all locations and a challenger for each; *decide* is the winner of every contest.
*Code* is the index of the mixed blocks that Eq. 8 generates from; *remove* takes the rows of hypermodules that nobody
uses any more out of the parameter. The first bank has a hypermodule for every location, the second one for twenty.
Between two rounds soft weights are drawn anew, so that half of the contests are won by the challenger.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch

from benchmarks.harness import judge, make_header, make_parser, show
from surgery.methods.hypermodules.alignment import draw_by_usage, draw_locations, draw_new
from surgery.methods.hypermodules.bank import HypermoduleBank
from surgery.methods.hypermodules.contest import Contest
from surgery.methods.hypermodules.evolution import prune
from surgery.methods.hypermodules.explanation import draw_by_explanation

LIMIT = 50.0  # ms, for draw and decide
BLOCK, CONTEXT, ALPHA, EPSILON = (16, 16), 4, 0.5, 1e-4


def make_bank(locations: int, hypermodules: int, seed: int, device: str) -> HypermoduleBank:
    """A bank whose locations use `hypermodules`, each of them at least once."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(hypermodules * CONTEXT, BLOCK[0] * BLOCK[1], generator=generator)
    more = torch.randint(hypermodules, (locations - hypermodules,), generator=generator)
    psi = torch.cat([torch.arange(hypermodules), more])
    contexts = torch.randn(locations, CONTEXT, generator=generator)
    return HypermoduleBank(BLOCK, rows, psi, contexts, hypermodules).to(device)


def one_generation(
    bank: HypermoduleBank, draw: str, challengers: int, generator: torch.Generator
) -> dict[str, float]:
    """Milliseconds of each part; the bank is left smaller, as training would leave it."""
    device = bank.psi.device.type
    clock = _Clock(device)
    chosen = draw_locations(bank.locations, 0.5, generator).to(bank.psi.device)
    if draw == "usage":
        drawn = draw_by_usage(bank.psi, len(chosen), challengers, generator)
    else:
        rows = bank.rows.detach().view(bank.hypermodules, CONTEXT, -1)
        with torch.no_grad():
            blocks = bank.blocks()[chosen]
        drawn = draw_by_explanation(blocks, rows, bank.psi, challengers, generator, None, own=chosen)
    drawn = draw_new(drawn, EPSILON, 0, bank.hypermodules, generator)[0]
    clock.lap("draw")
    contest = Contest(bank.psi, bank.hypermodules, chosen, drawn, CONTEXT, ALPHA)
    clock.lap("code")
    with torch.no_grad():
        contest.soft.copy_(torch.randn(contest.soft.shape, generator=generator))
    clock.lap("")
    bank.psi, contexts = contest.decide(bank.psi, bank.contexts.detach())
    clock.lap("decide")
    with torch.no_grad():
        bank.contexts.copy_(contexts)
    prune(bank)
    clock.lap("remove")
    return clock.times


class _Clock:
    """Milliseconds between laps, everything started on a device finished."""

    def __init__(self, device: str):
        self.device, self.times = device, dict[str, float]()
        self.last = self._now()

    def lap(self, name: str) -> None:
        now = self._now()
        if name:
            self.times[name] = 1e3 * (now - self.last)
        self.last = self._now()

    def _now(self) -> float:
        if self.device != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter()


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--locations", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    locations = 2_000 if options.fast else options.locations
    cases = [(locations, "usage", 1), (locations // 20, "usage", 1), (locations // 20, "usage", 4)]
    cases += [(locations // 20, "explain", 4)]
    results: list[dict[str, Any]] = []
    verdicts = []
    for hypermodules, draw, challengers in cases:
        rounds = []
        for number in range(1 if options.fast else options.rounds + 1):
            bank = make_bank(locations, hypermodules, options.seed + number, options.device)
            generator = torch.Generator().manual_seed(options.seed + number)
            rounds.append(one_generation(bank, draw, challengers, generator))
        rounds = rounds[1:] or rounds
        times = {name: median(each[name] for each in rounds) for name in rounds[0]}
        evolution = median(each["draw"] + each["decide"] for each in rounds)
        what = {"hypermodules": hypermodules, "draw by": draw, "lambda": challengers}
        results.append(what | {f"{k} ms": v for k, v in times.items()} | {"draw and decide ms": evolution})
        if draw == "usage" and not options.fast:
            verdicts.append(
                judge(
                    f"draw and decide, K = {hypermodules:,}, lambda = {challengers}", evolution, LIMIT, " ms"
                )
            )
    title = f"evolution of {locations:,} locations, 16x16, c = 4, p = 0.5, {options.device}"
    show(title, make_header("evolution", options, argv), results, verdicts, options.json)


if __name__ == "__main__":
    main()
