"""What one more member costs: `surgery add` to joint models of few and of many, against storing it alone.

Fine-tunes of one vision transformer (as in `benchmarks.residency`), each joint model and the new member alone within
one error bound on made-up inputs. CPU seconds by turns, as a busy machine changes these least, the least of all rounds.

    python -m benchmarks.adding --members 2 20 80
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import surgery
from benchmarks.harness import judge, make_header, make_parser, show
from benchmarks.residency import BOUND, fine_tunes, fitted

SLOWER = 1.5  # times the seconds of storing the new member alone that adding it to 20 may take
AT = 20


def cpu_seconds(run: Callable[[], object]) -> float:
    """Of one call."""
    start = time.process_time()
    run()
    return time.process_time() - start


def measured(work: Path, counts: Sequence[int], rounds: int, options: Any) -> list[dict[str, Any]]:
    """A row of the new member alone, and one of it added to each joint model: least seconds, in turns."""
    *others, new = fine_tunes(work, options.seed, options.fast, max(counts) + 1)
    joints = {count: work / f"joint-{count}" for count in counts}
    for count, joint in joints.items():
        fitted(others[:count], joint, options.seed)

    def alone() -> None:
        shutil.rmtree(work / "alone", ignore_errors=True)
        fitted([new], work / "alone", options.seed)

    seconds, taken, added = [], {count: [] for count in counts}, {}

    def adding(count: int) -> None:
        shutil.rmtree(work / "copy", ignore_errors=True)
        copy = shutil.copytree(joints[count], work / "copy")
        start = time.process_time()
        (added[count],) = surgery.add(copy, {"new": str(new)}, max_error=BOUND, device="cpu")
        taken[count].append(time.process_time() - start)

    cpu_seconds(alone)  # imports what is needed
    for _ in range(rounds):  # by turns, as other processes slow down all alike then
        seconds.append(cpu_seconds(alone))
        for count in counts:
            adding(count)
    sizes = {"none": surgery.load(work / "alone").report.stored_bytes}
    sizes |= {count: each.marginal_bytes for count, each in added.items()}
    least = {"none": min(seconds), **{count: min(each) for count, each in taken.items()}}
    return [
        {"joint model of": of, "bytes": size, "CPU s": least[of], "times alone": least[of] / least["none"]}
        for of, size in sizes.items()
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--members", nargs="+", type=int, default=[2, AT], metavar="N")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    counts = [2] if options.fast else sorted(options.members)
    with tempfile.TemporaryDirectory() as temporary:
        rows = measured(Path(temporary), counts, 1 if options.fast else options.rounds, options)
    said = [
        judge(
            f"adding to {AT} takes at most {SLOWER} times as long as storing alone", r["times alone"], SLOWER
        )
        for r in rows
        if r["joint model of"] == AT
    ]
    show("One more member", make_header("adding", options, argv), rows, said, options.json)


if __name__ == "__main__":
    main()
