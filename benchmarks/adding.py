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

import torch

import surgery
from benchmarks.harness import judge, make_header, make_parser, show
from benchmarks.residency import fine_tunes

BOUND = 0.05
SLOWER = 1.5  # times the seconds of storing the new member alone that adding it to 20 may take
AT = 20


def cpu_seconds(run: Callable[[], object]) -> float:
    """Of one call."""
    start = time.process_time()
    run()
    return time.process_time() - start


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--members", nargs="+", type=int, default=[2, AT], metavar="N")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    counts = [2] if options.fast else sorted(options.members)
    rounds = 1 if options.fast else options.rounds
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        *others, new = fine_tunes(work, options.seed, options.fast, max(counts) + 1)

        def fitted(folders: Sequence[Path], out: Path) -> surgery.FitReport:
            joint = surgery.join([surgery.load_member(str(each)) for each in folders])
            surgery.save(surgery.fit(joint, max_error=BOUND, seed=options.seed, device="cpu"), out)
            assert joint.report is not None
            return joint.report

        def alone() -> None:
            shutil.rmtree(work / "alone", ignore_errors=True)
            fitted([new], work / "alone")

        def adding(joint: Path) -> surgery.AddedMember:
            shutil.rmtree(work / "copy", ignore_errors=True)
            copy = shutil.copytree(joint, work / "copy")
            start = time.process_time()
            (added,) = surgery.add(copy, {"new": str(new)}, max_error=BOUND, device="cpu")
            taken[joint].append(time.process_time() - start)
            return added

        joints = {count: work / f"joint-{count}" for count in counts}
        for count, joint in joints.items():
            fitted(others[:count], joint)
        cpu_seconds(alone)  # imports what is needed
        seconds, taken, added = [], {joint: [] for joint in joints.values()}, {}
        for _ in range(rounds):  # by turns, as other processes slow down all alike then
            seconds.append(cpu_seconds(alone))
            added = {count: adding(joint) for count, joint in joints.items()}
        least = min(seconds)
        rows = [
            {
                "joint model of": "none",
                "bytes": surgery.load(work / "alone").report.stored_bytes,
                "CPU s": least,
                "times alone": 1.0,
            }
        ]
        rows += [
            {
                "joint model of": count,
                "bytes": added[count].marginal_bytes,
                "CPU s": min(taken[joint]),
                "times alone": min(taken[joint]) / least,
            }
            for count, joint in joints.items()
        ]
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
