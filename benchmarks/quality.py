"""Quality against bytes: rounding, SVD per matrix, one basis for all layers, and the fit at the same sizes.

`python -m benchmarks.quality --plot docs/quality.png`. The sizes are those that plain rounding to 8, 6, 5, 4
and 3 bits takes; every other method gets the same bytes. Error is the relative L2 distance of the main output
from the original's on real sentences and pictures, which no method has seen: the fit makes up its own inputs.
How far chance moves a task figure is shown by noise on all matrices that moves outputs as far as the fit.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import surgery
from benchmarks import zoo
from benchmarks.baselines import Compressed, LowRank, is_matrix, one_basis, per_matrix, rounding
from benchmarks.harness import cell, make_header, make_parser, show, write_csv
from benchmarks.plot import draw
from benchmarks.tasks import PictureTask, Score, Task, TextTask, set_weights
from surgery import Member

BITS = (8, 6, 5, 4, 3)
TITLES = {"minilm": "all-MiniLM-L6-v2", "efficientnet": "EfficientNet-Lite0"}
FIT, NOISE = "fit", "noise"
DRAWS = 4  # of noise, at each size at which the fit is behind in a task figure
COLUMNS = ("model", "size", "of fp32", "method", "bytes", "error", "detail")  # all others are task figures
Row = dict[str, Any]


class Bench:
    """One model with its task, and how much of it is measured."""

    def __init__(self, member: Member, task: Task, seed: int):
        self.member, self.task, self.seed = member, task, seed
        self.state: dict[str, Tensor] = {key: t.clone() for key, t in member.module.state_dict().items()}
        self.whole = sum(t.numel() * t.element_size() for t in self.state.values())
        self.values = sum(t.numel() for t in self.state.values() if is_matrix(t))

    def score(self, weights: Mapping[str, Tensor]) -> Score:
        set_weights(self.member.module, weights)
        score = self.task.score()
        set_weights(self.member.module, self.state)
        return score

    def row(self, method: str, size: int, found: Compressed, score: Score) -> Row:
        return {
            "model": self.member.name,
            "size": size,
            "of fp32": size / self.whole,
            "method": method,
            "bytes": found.nbytes,
            "error": score.error,
            **score.tasks,
            "detail": found.detail,
        }

    def rows(self, bits: Sequence[int]) -> Iterator[Row]:
        """All methods at all sizes."""
        yield self.row("original", self.whole, Compressed({}, self.whole, "as it is"), self.score({}))
        low = {"SVD per matrix": per_matrix(self.state), "one basis": one_basis(self.state)}
        for each in bits:
            rounded, score = self.best_rounding(each)
            size = rounded.nbytes
            others = [self.row("rounding", size, rounded, score)]
            for method, factors in low.items():
                others += self.best_low_rank(method, factors, size)
            found = self.fit(size)
            fit = self.row(FIT, size, found, self.score(found.weights))
            yield from (*others, fit)
            if figures_behind(fit, others):
                yield from self.noise(size, fit["error"])

    def best_rounding(self, bits: int) -> tuple[Compressed, Score]:
        """Rounding with the other tensors in bfloat16 or as they are, whichever gives more for its bytes."""

        def cost(candidate: tuple[Compressed, Score]) -> float:
            # One bit halves the error.
            return candidate[1].error * 2 ** (8 * candidate[0].nbytes / self.values)

        tried = [rounding(self.state, bits, halved) for halved in (False, True)]
        return min(((found, self.score(found.weights)) for found in tried), key=cost)

    def best_low_rank(self, method: str, factors: LowRank, size: int) -> Iterator[Row]:
        tried = [(found, self.score(found.weights)) for found in factors.within(size, halved=True)]
        if tried:
            yield self.row(method, size, *min(tried, key=lambda candidate: candidate[1].error))

    def fit(self, size: int) -> Compressed:
        joint = surgery.join([deepcopy(self.member)])
        joint = surgery.fit(joint, budget=size / self.whole, seed=self.seed, device="cpu")
        report = joint.report
        return Compressed(
            joint.collapse(self.member.name),
            report.stored_bytes,
            f"{report.errors[self.member.name]:.3g} on its probes",
        )

    def noise(self, size: int, error: float) -> Iterator[Row]:
        """Independent noise on all matrices that moves the output about as far as the fit does."""
        matrices = {key: t for key, t in self.state.items() if is_matrix(t)}
        for number in range(DRAWS):
            generator = torch.Generator().manual_seed(self.seed + number)
            noise = {key: t.std() * torch.randn(t.shape, generator=generator) for key, t in matrices.items()}
            scale = error / 3
            for _ in range(2):  # the error grows about in proportion
                score = self.score({key: t + scale * noise[key] for key, t in matrices.items()})
                found = Compressed({}, self.whole, f"{scale:.3g} of each matrix' deviation, draw {number}")
                scale *= error / score.error
            yield self.row(NOISE, size, found, score)


def benches(models: Sequence[str], folder: Path, seed: int, fast: bool) -> Iterator[Bench]:
    """The models with their tasks; tiny ones of random weights where it has to be fast."""
    limit = 6 if fast else None
    if "minilm" in models:
        text = zoo.tiny_text(folder / "text", seed) if fast else zoo.minilm()
        yield Bench(text, TextTask(text, zoo.minilm_folder(), limit), seed)
    if "efficientnet" in models:
        vision = zoo.tiny_vision(seed) if fast else zoo.efficientnet()
        yield Bench(vision, PictureTask(vision, folder / "pictures", limit), seed)


def figures_behind(fit: Row, others: Sequence[Row]) -> dict[str, Row]:
    """The task figures in which the fit is behind, each with the row that is best in it."""
    best = {name: max(others, key=lambda row, name=name: row[name]) for name in fit if name not in COLUMNS}
    return {name: row for name, row in best.items() if row[name] > fit[name]}


def compare(rows: Sequence[Row]) -> Iterator[str]:
    """At each size the fit's error, the best other one, and the task figures in which the fit is behind."""
    for fit in (row for row in rows if row["method"] == FIT):
        here = [row for row in rows if (row["model"], row["size"]) == (fit["model"], fit["size"])]
        others = [row for row in here if row["method"] not in (FIT, NOISE)]
        best = min(others, key=lambda row: row["error"])
        behind = ""
        for name, other in figures_behind(fit, others).items():
            chance = [row[name] for row in here if row["method"] == NOISE]
            behind += (
                f"; behind in {name}, {cell(fit[name])} against {cell(other[name])} of {other['method']}"
            )
            behind += f" (noise: {cell(min(chance))} to {cell(max(chance))})"
        verdict = "no worse" if fit["error"] <= best["error"] else "WORSE"
        yield (
            f"{fit['model']} at {fit['of fp32']:.1%}: the fit is {verdict} ({fit['error']:.3g}; best other: "
            f"{best['method']} {best['error']:.3g}){behind}"
        )


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=list(TITLES), default=list(TITLES))
    parser.add_argument(
        "--bits", type=int, nargs="+", help="rounding that sets the sizes; 8 6 5 4 3 by default"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw error against bytes, .png or .svg")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write all rows as CSV")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    header = make_header("quality", options, argv)
    bits = options.bits or ((8,) if options.fast else BITS)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for bench in benches(options.models, Path(folder), options.seed, options.fast):
            rows += bench.rows(bits)
    verdicts = list(compare(rows))
    if options.json:
        show("quality against bytes", header, rows, verdicts, as_json=True)
    else:
        for model in dict.fromkeys(row["model"] for row in rows):
            mine = [row for row in rows if row["model"] == model and row["method"] != NOISE]
            show(
                TITLES[model],
                header,
                [{k: v for k, v in row.items() if k not in ("model", "size")} for row in mine],
                [v for v in verdicts if v.startswith(model)],
                as_json=False,
            )
    if options.plot:
        draw([row for row in rows if row["method"] != "original"], TITLES, options.plot)
    if options.csv:
        write_csv(options.csv, rows)


if __name__ == "__main__":
    main()
