"""How long `surgery --help` takes, and whether it imports torch: `python -m benchmarks.startup`.

Each run is a new process. A bare interpreter takes turns with it: what it needs is needed anyway. CPU seconds
stand beside the wall clock, since on a busy machine only they say what the command itself costs.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from statistics import median

from benchmarks.harness import judge, make_header, make_parser, show

LIMIT = 0.4  # seconds
COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "surgery --help": [sys.executable, "-c", "from surgery_cli.__main__ import main; main()", "--help"],
    "surgery merge --help": [
        sys.executable,
        "-c",
        "from surgery_cli.__main__ import main; main()",
        "merge",
        "--help",
    ],
}
HEAVY = ("torch", "transformers", "timm", "numpy", "matplotlib")


def run_once(command: Sequence[str]) -> tuple[float, float]:
    """Wall-clock and CPU seconds of one process."""
    before, start = os.times(), time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    wall, after = time.perf_counter() - start, os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return wall, cpu


def heavy_imports(command: Sequence[str]) -> list[str]:
    """Which of the heavy packages a command imports."""
    traced = [command[0], "-X", "importtime", *command[1:]]
    done = subprocess.run(traced, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    modules = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    return [package for package in HEAVY if package in modules]


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args(argv)
    rounds = 1 if options.fast else options.rounds
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in COMMANDS}
    for turn in range(rounds + 1):
        for name, command in COMMANDS.items():
            taken = run_once(command)
            if turn:  # the first turn warms up
                found[name].append(taken)
    results = []
    for name, taken in found.items():
        wall, cpu = zip(*taken, strict=True)
        results.append(
            {
                "command": name,
                "median s": median(wall),
                "fastest s": min(wall),
                "slowest s": max(wall),
                "CPU s": median(cpu),
                "imports": ", ".join(heavy_imports(COMMANDS[name])) or "none",
            }
        )
    verdicts = [
        judge("surgery --help", results[1]["median s"], LIMIT, " s"),
        f"surgery --help imports torch: {'YES' if 'torch' in results[1]['imports'] else 'no'}",
    ]
    title = f"starting up; imports of {', '.join(HEAVY)}"
    show(title, make_header("startup", options, argv), results, verdicts, options.json)


if __name__ == "__main__":
    main()
