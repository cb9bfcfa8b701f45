"""This checkout against another one: `python -m benchmarks.against FOLDER step joint_step fit`.

FOLDER is a checkout of another commit (`git worktree add FOLDER COMMIT`). Each benchmark runs in both by turns, in
processes of its own, each with the code and the benchmark of its checkout; rows are matched by what they are of, and
each of their times is given as the median of the rounds' ratios. Most benchmarks time something beside ours, such as
plain models: *relative* is a ratio over the ratio of these in the same round, so that a process that had a slower
machine does not count. Options after `--` go to every benchmark.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.harness import judge, make_header, make_parser, show

HERE = Path(__file__).resolve().parent.parent
NAMES = ("kernel", "step", "joint_step", "fit", "load", "startup")
LIMIT = 1.03
PACKAGES = {"surgery": "surgery", "surgery_cli": "cli", "surgery_recipes": "recipes"}
TIMES = ("ms", "seconds", "s")
"""What the name of a column of times ends with."""
KERNELS = ("copy", "forward", "generate", "prepared", "embedding_bag", "padded_bmm", "gather_bmm")
"""Columns of times in the kernel's table."""
CONTROLS = ("plain", "from_pretrained", "python -c pass", "copy", "embedding_bag", "padded_bmm", "gather_bmm")
"""Rows and columns of what is not ours: how far their ratios lie from 1 is how far the machine's do."""
Key = tuple[str, str, str]
"""Benchmark, what a row is of, and the column."""


def run(checkout: Path, links: Path, name: str, arguments: Sequence[str]) -> list[dict[str, Any]]:
    """The rows that a benchmark of a checkout prints as JSON."""
    paths = [str(links), str(checkout), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-P", "-m", f"benchmarks.{name}", "--json", *arguments]
    made = subprocess.run(command, cwd=links, env=environment, capture_output=True, text=True, check=False)
    if made.returncode:
        raise SystemExit(f"{name} in {checkout} ended with {made.returncode}: {made.stderr[-2000:]}")
    return json.loads(made.stdout[made.stdout.index("{") :])["results"]


def fast(name: str, wanted: bool) -> list[str]:
    """The options that make a benchmark short."""
    if not wanted:
        return []
    return ["--locations", "1000", "--rounds", "1"] if name == "kernel" else ["--fast"]


def times_of(row: Mapping[str, Any]) -> dict[str, float]:
    """The columns of a row that are times; of several of one thing the fastest, on which a machine has least say."""
    found = {name: float(value) for name, value in row.items() if _is_time(name, value)}
    fastest = {name for name in found if name.startswith("fastest")}
    return {name: value for name, value in found.items() if not fastest or name in fastest}


def name_of(row: Mapping[str, Any]) -> str:
    """What a row is of: its words, and its whole numbers where they come before the first time."""
    words = []
    for name, value in row.items():
        if _is_time(name, value):
            break
        words.append(f"{name} {value}" if isinstance(value, int) else str(value))
    return ", ".join(words)


def _is_time(column: str, value: Any) -> bool:
    """Of the kernel's table every number that is no ratio is one, and has no unit in its name."""
    return isinstance(value, float) and (column.split()[-1] in TIMES or column in KERNELS)


def is_control(key: Key) -> bool:
    """Whether a time is of what is not ours."""
    return key[1].split(", ")[-1] in CONTROLS or key[2] in CONTROLS


def beside(key: Key, ratios: Mapping[Key, float]) -> float:
    """The ratio of what is not ours beside a row: at the same size where there is such a row, else in the benchmark."""
    controls = {each: ratio for each, ratio in ratios.items() if is_control(each)}
    near = [ratio for each, ratio in controls.items() if _size(each) == _size(key)]
    return median(near or controls.values()) if controls else 1.0


def _size(key: Key) -> str:
    """What a row says before the name of what it times; of the kernel's table the name is the column's."""
    return key[1] if key[2] in KERNELS else key[1].rpartition(", ")[0]


def link(folder: Path, checkout: Path) -> Path:
    """A folder from which the packages of a checkout are imported, whatever is installed."""
    folder.mkdir()
    for package, source in PACKAGES.items():
        (folder / package).symlink_to(checkout / source)
    return folder


def take_round(
    folders: Mapping[Path, Path], turn: int, options: Any, common: Sequence[str]
) -> dict[Key, tuple[float, float, float]]:
    """Each benchmark once in both checkouts, which take turns to be first.

    Returns:
        by what was timed: its seconds here, relative to the other checkout's, and that relative to what is not ours.
    """
    other = next(iter(folders))
    order = list(folders.items()) if turn % 2 == 0 else list(folders.items())[::-1]
    taken: dict[Key, tuple[float, float, float]] = {}
    for name in options.names:
        found = {
            checkout: run(checkout, links, name, [*common, *fast(name, options.fast)])
            for checkout, links in order
        }
        seconds: dict[Key, float] = {}
        ratios: dict[Key, float] = {}
        for before, now in zip(found[other], found[HERE], strict=True):
            for column, value in times_of(now).items():
                key = name, name_of(now), column
                seconds[key], ratios[key] = value, value / before[column]
        taken |= {key: (seconds[key], ratio, ratio / beside(key, ratios)) for key, ratio in ratios.items()}
    return taken


def summarise(rounds: Sequence[Mapping[Key, tuple[float, float, float]]]) -> list[dict[str, Any]]:
    """A row for everything that was timed, over all rounds."""
    rows = []
    for key in dict.fromkeys(key for each in rounds for key in each):
        seconds, ratios, relative = zip(*(each[key] for each in rounds if key in each), strict=True)
        rows.append(
            {
                **dict(zip(("benchmark", "of", "what"), key, strict=True)),
                "now": median(seconds),
                "ratio": median(ratios),
                "least": min(ratios),
                "most": max(ratios),
                "relative": median(relative),
            }
        )
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    given = list(sys.argv[1:] if argv is None else argv)
    given, passed = (
        (given[: given.index("--")], given[given.index("--") + 1 :]) if "--" in given else (given, [])
    )
    parser = make_parser(__doc__)
    parser.add_argument("other", type=Path, help="a checkout of another commit")
    parser.add_argument(
        "names", nargs="*", default=NAMES, help=f"of benchmarks; by default {', '.join(NAMES)}"
    )
    parser.add_argument("--rounds", type=int, default=3, help="how often each runs in both")
    options = parser.parse_args(given)
    common = ["--threads", str(options.threads), *passed]
    with tempfile.TemporaryDirectory() as temporary:
        other = options.other.expanduser().resolve()
        folders = {
            other: link(Path(temporary, "other"), other),
            HERE: link(Path(temporary, "this"), HERE),
        }
        rounds = [take_round(folders, turn, options, common) for turn in range(options.rounds)]
    results = summarise(rounds)
    ours = [r for r in results if not is_control((r["benchmark"], r["of"], r["what"]))]
    controls = [r["ratio"] for r in results if r not in ours]
    verdicts = [f"what is not ours: {min(controls):.3g} to {max(controls):.3g}"] if controls else []
    for name in options.names:
        found = [r["relative"] for r in ours if r["benchmark"] == name]
        verdicts.append(judge(f"{name}, the middle row against before", median(found), LIMIT))
        verdicts.append(judge(f"{name}, the slowest row against before", max(found), LIMIT))
    show("against another checkout", make_header("against", options, argv), results, verdicts, options.json)


if __name__ == "__main__":
    main()
