"""The frontier of families: output error, score kept, bytes and seconds of every method at every size.

    python -m benchmarks.frontier --family vit --csv vit.csv --plot vit.png
    python -m benchmarks.frontier --family sentiment --methods surgery rounding GPTQ

Sizes are of the members' float32 bytes, in bytes of files. Settings of peers are chosen on validation data.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import torch

from benchmarks.frontier.cells import Cell, Run, contest_of, rows_in_processes
from benchmarks.frontier.families import FAMILIES
from benchmarks.frontier.peers.all import PEERS
from benchmarks.frontier.picture import draw
from benchmarks.frontier.spectra import spectra
from benchmarks.frontier.table import CALIBRATED, FRACTIONS, OURS, PLAIN, Row
from benchmarks.harness import make_header, make_parser, show, write_csv

KNOWN = (*(peer.name for peer in PEERS), *OURS)


def verdicts(rows: Sequence[Row]) -> list[str]:
    """At each size the method with the least error, and how far this package is from it."""
    said = []
    for within in dict.fromkeys(row["within"] for row in rows):
        here = [row for row in rows if row["within"] == within and row["error"] is not None]
        mine = [row for row in here if row["method"] in OURS]
        peers = [row for row in here if row["method"] not in OURS]
        if not peers:
            continue
        best = min(peers, key=lambda row: row["error"])
        text = f"{within}: best peer {best['method']}, error {best['error']:.3f}, kept {best['kept']:.1%}"
        if mine:
            own = min(mine, key=lambda row: row["error"])
            verdict = "met" if own["error"] <= best["error"] else "MISSED"
            text += f"; {own['method']} {own['error']:.3f}, kept {own['kept']:.1%}: never worse: {verdict}"
        said.append(text)
    return said


def options_of(argv: Sequence[str] | None) -> argparse.Namespace:
    """What was asked for."""
    parser = make_parser(__doc__)
    parser.add_argument("--family", choices=FAMILIES, default="vit")
    parser.add_argument("--members", type=int, help="how many members at most; all by default")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="members, of those")
    parser.add_argument(
        "--methods", nargs="+", metavar="NAME", help=f"of {', '.join(KNOWN)}; surgery is both"
    )
    parser.add_argument(
        "--sizes", nargs="+", type=float, default=FRACTIONS, help="fractions of the float32 bytes"
    )
    parser.add_argument(
        "--finalists", type=int, default=3, help="settings of a peer that are run at each size"
    )
    parser.add_argument("--longer", type=int, default=1, help="times the epochs of every fine-tune")
    parser.add_argument("--cache", type=Path, help="folder of trained families; the user's cache by default")
    parser.add_argument("--train-device", default="cpu", help="that members are trained on")
    parser.add_argument("--device", default="cpu", help="that members are fitted on")
    parser.add_argument("--jobs", type=int, default=1, help="processes, each with --threads")
    parser.add_argument("--minutes", type=float, help="begin nothing after so many")
    parser.add_argument("--csv", type=Path, help="write the table there")
    parser.add_argument("--plot", type=Path, help="draw error against size there, .png or .svg")
    options = parser.parse_args(argv)
    if unknown := sorted(set(options.methods or ()) - set(KNOWN)):
        sys.exit(f"Methods are {', '.join(KNOWN)}; found {', '.join(unknown)}.")
    return options


def cells_of(options: argparse.Namespace) -> list[Cell]:
    """Methods at sizes, size by size."""
    named = options.methods or KNOWN
    methods = [
        name for each in named for name in (OURS if each == PLAIN and CALIBRATED not in named else [each])
    ]
    fractions = options.sizes[:1] if options.fast and options.sizes is FRACTIONS else options.sizes
    return [(method, fraction) for fraction in fractions for method in dict.fromkeys(methods)]


def main(argv: Sequence[str] | None = None) -> None:
    options = options_of(argv)
    torch.set_num_threads(options.threads)
    run = Run(
        options.family, options.cache, options.seed, options.fast, options.members, options.longer,
        options.only and tuple(options.only), options.train_device, options.device, options.finalists,
        options.threads,
    )  # fmt: skip
    family, cells = run.make(), cells_of(options)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        contest = contest_of(run, family, Path(folder))
        if options.jobs > 1:
            found = rows_in_processes(run, cells, options.jobs, options.minutes)
        else:
            end = float("inf") if options.minutes is None else time.monotonic() + 60 * options.minutes
            found = (contest.row_of(*cell) for cell in cells if time.monotonic() < end)
        for row in found:
            rows.append(row)
            if not options.json:
                error = "-" if row["error"] is None else f"{row['error']:.4f}"
                print(
                    f"{row['within']:>4} {row['method']}: {error} ({row['setting']})",
                    file=sys.stderr,
                    flush=True,
                )
            if options.csv:
                write_csv(options.csv, rows)
        scores = contest.judge.scores()
        spectrum = spectra(contest.scene)
    sizes = [f"{fraction:.0%}" for fraction in options.sizes]
    rows.sort(key=lambda row: (sizes.index(row["within"]), KNOWN.index(row["method"])))
    for row in spectrum:
        row[family.measure] = scores.get(row["member"])
    if options.plot:
        draw(rows, options.plot)
    header = make_header("frontier", options, argv)
    said = [
        f"{len(family.states)} members, {family.whole:,} bytes in float32, mean {family.measure} "
        f"{mean(scores.values()):.4f}; trained in {family.seconds:.0f} s (0: from the cache)",
        *verdicts(rows),
    ]
    if not options.json:
        show("Members, and where the energy of their differences lies", header, spectrum, [], False)
    show(f"Frontier of the family {family.name}", header, rows, said, options.json)


if __name__ == "__main__":
    main()
