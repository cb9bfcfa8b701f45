"""Time and memory of fitting MiniLM: `python -m benchmarks.fit`.

Each target runs in a process of its own, whose peak resident memory is read at its end. Seconds are those of
`surgery.fit` alone; loading, discovering and joining come on top, in the second column.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import judge, make_header, make_parser, show

MOST_SECONDS, MOST_MEMORY = 180.0, 4.0  # on two cores; gibibytes
TARGETS = ({"budget": 0.5}, {"max_error": 0.05}, {"hypermodules": 1000})
WORKER = "benchmarks.fit"


def run_target(target: dict[str, Any], seed: int, threads: int, fast: bool) -> dict[str, Any]:
    """Fit in a new process.

    Args:
        target: keyword arguments of `surgery.fit`.
        seed: of the fit.
        threads: of PyTorch.
        fast: whether a tiny model is fitted instead of MiniLM.
    """
    request = json.dumps({"target": target, "seed": seed, "threads": threads, "fast": fast})
    command = [sys.executable, "-m", WORKER, "--worker", request]
    folder = Path(__file__).resolve().parent.parent
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"fitting to {target} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def work(request: dict[str, Any]) -> dict[str, Any]:
    """Fit here and now, and say what it took."""
    import tempfile

    import torch

    import surgery
    from benchmarks import zoo

    torch.set_num_threads(request["threads"])
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        member = zoo.tiny_text(Path(folder), request["seed"]) if request["fast"] else zoo.minilm()
    joint = surgery.join([member])
    joined, before = time.perf_counter(), peak_memory()
    report = surgery.fit(joint, **request["target"], seed=request["seed"], device="cpu").report
    return {
        "target": report.target,
        "fit s": time.perf_counter() - joined,
        "load and join s": joined - start,
        "peak GiB": peak_memory(),
        "before GiB": before,
        "bytes": report.stored_bytes,
        "of original": report.stored_bytes / sum(report.original_bytes.values()),
        "error": max(report.errors.values()),
        "met": report.met,
    }


def peak_memory() -> float:
    """The most resident memory that this process has had, in GiB."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would also count the process that started this one
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--budget", type=float, help="only this target: a fraction of the bytes")
    parser.add_argument("--max-error", type=float, help="only this target: a relative output error")
    parser.add_argument("--hypermodules", type=int, help="only this target: a bank of K")
    parser.add_argument("--worker", metavar="REQUEST", help="fit in this process; what the others start")
    options = parser.parse_args(argv)
    if options.worker:
        print(json.dumps(work(json.loads(options.worker))))
        return
    chosen = [
        {name: value}
        for name in ("budget", "max_error", "hypermodules")
        if (value := getattr(options, name)) is not None
    ]
    targets = chosen or (TARGETS[:1] if options.fast else TARGETS)
    results = [run_target(t, options.seed, options.threads, options.fast) for t in targets]
    verdicts = [
        judge("slowest fit", max(r["fit s"] for r in results), MOST_SECONDS, " s"),
        judge("most memory", max(r["peak GiB"] for r in results), MOST_MEMORY, " GiB"),
    ]
    model = "a tiny BERT" if options.fast else "all-MiniLM-L6-v2"
    show(f"fitting {model}", make_header("fit", options, argv), results, verdicts, options.json)


if __name__ == "__main__":
    main()
