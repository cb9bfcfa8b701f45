"""Models that are larger than memory: `python -m benchmarks.scale --sizes 0.1 0.3 1.1`.

Makes folders of transformers models with random weights (`random_llamas`); runs `surgery` on them in processes of their
own, each of which samples its anonymous and mapped memory by stage; and says how memory grows with the bytes of the
files. mergekit merges the same folders beside it where it is installed, in this environment or in that of
`--mergekit PYTHON`.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.against import link
from benchmarks.harness import judge, make_header, make_parser, show
from benchmarks.random_llamas import LLAMA, llama, make_folder

HERE = Path(__file__).resolve().parent.parent
MIB = 2**20
EVERY = 0.02  # seconds between samples
ANONYMOUS = 1.5 * 2**10  # MiB of a lossless merge, of verify and of an export, at any size
EXPONENT = 0.2  # of memory's growth with the bytes of the files
SLOWER = 1.5  # times mergekit's CPU seconds

STAGES = {
    ("load_entry", "merge.py"): "load",
    ("_find_sites", "merge.py"): "find sites",
    ("join", "joining.py"): "join",
    ("fit", "fit.py"): "fit",
    ("save", "folder.py"): "write",
    ("wrong_hashes", "reading.py"): "hash files",
    ("load", "folder.py"): "load",
    ("_check", "verify.py"): "compare",
    ("load_recorded", "verify.py"): "load origin",
    ("export", "export.py"): "export",
}
"""Functions whose run is a stage, by name and file."""

CASES: dict[str, tuple[str, ...]] = {
    "merge, lossless": ("merge", "a={one}", "b={two}", "--max-error", "0", "--out", "{out}", "--overwrite"),
    "verify": ("verify", "{out}", "--origins"),
    "export plain": ("export", "{out}", "--member", "a", "--out", "{plain}", "--overwrite"),
    "merge, max-error 0.05": ("merge", "a={one}", "b={two}", "--out", "{fitted}", "--overwrite"),
    "merge, base and two fine-tunes": (
        *(
            "merge",
            "a={one}",
            "b={tuned}",
            "c={other}",
            "--budget",
            "0.5",
            "--out",
            "{fitted}",
            "--overwrite",
        ),
    ),
    "inspect": ("inspect", "{headers}"),
    "dry run": ("merge", "a={headers}", "b={headers}", "--dry-run"),
}


# -- one process -------------------------------------------------------------------------------------------


def memory() -> dict[str, float]:
    """MiB that this process holds: anonymous, and mapped from files."""
    found = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name in ("RssAnon", "RssFile"):
            found["anonymous" if name == "RssAnon" else "mapped"] = int(rest.split()[0]) / 1024
    return found


class Sampler:
    """Samples this process's memory by the stage that its main thread is in.

    Attributes:
        peaks: by stage, the largest anonymous and mapped memory, and seconds.
    """

    def __init__(self) -> None:
        self.peaks: dict[str, dict[str, float]] = {}
        self._main, self._done = threading.get_ident(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        last = time.perf_counter()
        while not self._done.wait(EVERY):
            now, found = time.perf_counter(), memory()
            stage = self.peaks.setdefault(self._stage(), {"anonymous": 0.0, "mapped": 0.0, "seconds": 0.0})
            stage["seconds"] += now - last
            for name, each in found.items():
                stage[name] = max(stage[name], each)
            last = now

    def _stage(self) -> str:
        """The outermost stage whose function runs."""
        frame, stage = sys._current_frames().get(self._main), "rest"
        while frame is not None:
            code = frame.f_code
            stage = STAGES.get((code.co_name, os.path.basename(code.co_filename)), stage)
            frame = frame.f_back
        return stage


def sampled(report: str, arguments: Sequence[str]) -> None:
    """Run the command line with memory sampled, and write what was found as JSON."""
    from surgery_cli.__main__ import main as surgery

    with Sampler() as sampler:
        try:
            status = surgery(list(arguments))
        except SystemExit as stop:
            status = stop.code
    Path(report).write_text(json.dumps(sampler.peaks))
    raise SystemExit(status)


def run(command: Sequence[str], cwd: Path, environment: Mapping[str, str]) -> dict[str, float]:
    """Run a command: seconds, CPU seconds, and the largest resident memory as the system has it."""
    start = time.perf_counter()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, cwd=cwd, env=dict(environment), stdout=said, stderr=said)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            raise RuntimeError(
                f"{' '.join(command)} ended with {process.returncode}:\n{said.read().decode()[-3000:]}"
            )
    cpu = usage.ru_utime + usage.ru_stime
    return {"s": time.perf_counter() - start, "CPU s": cpu, "resident MiB": usage.ru_maxrss / 1024}


def run_surgery(
    arguments: Sequence[str], links: Path, threads: int
) -> tuple[dict[str, float], dict[str, Any]]:
    """Run `surgery` of a checkout: what it took, and peaks by stage."""
    paths = os.pathsep.join([str(links), str(HERE)])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": str(threads)}
    code = "import sys; from benchmarks.scale import sampled; sampled(sys.argv[1], sys.argv[2:])"
    report = links / "report.json"
    found = run([sys.executable, "-P", "-c", code, str(report), *arguments], links, environment)
    peaks = json.loads(report.read_text())
    found["anonymous MiB"] = max(each["anonymous"] for each in peaks.values())
    found["mapped MiB"] = max(each["mapped"] for each in peaks.values())
    return found, peaks


def run_mergekit(python: str, one: Path, two: Path, out: Path, threads: int) -> dict[str, float] | None:
    """mergekit's linear merge of two folders; None where it is not installed."""
    asked = [python, "-c", "import mergekit.scripts.run_yaml"]
    if subprocess.run(asked, capture_output=True, check=False).returncode:
        return None
    recipe = out.with_suffix(".yaml")
    models = [{"model": str(each), "parameters": {"weight": 0.5}} for each in (one, two)]
    recipe.write_text(json.dumps({"merge_method": "linear", "dtype": "bfloat16", "models": models}))
    code = "from mergekit.scripts.run_yaml import main; main()"
    command = [python, "-c", code, str(recipe), str(out), "--no-copy-tokenizer", "--allow-crimes"]
    found = run(command, out.parent, {**os.environ, "OMP_NUM_THREADS": str(threads)})
    shutil.rmtree(out, ignore_errors=True)
    return found


# -- all of it ---------------------------------------------------------------------------------------------


def exponent(points: Sequence[tuple[float, float]]) -> float:
    """The power of growth of a quantity: the slope of its logarithm over that of the bytes, by least squares.

    Example:
        >>> round(exponent([(1, 3), (10, 30), (100, 300)]), 6)
        1.0
    """
    x, y = ([math.log(point[i]) for point in points] for i in (0, 1))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    moved = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return moved / sum((a - mean_x) ** 2 for a in x)


def make_folders(cases: Sequence[str], work: Path, size: str, seed: int) -> dict[str, Path]:
    """The folders that some cases need, by what commands call them."""
    needed = {
        name
        for case in cases
        for part in CASES[case]
        for name in ("one", "two", "tuned", "other", "headers")
        if f"{{{name}}}" in part
    }
    where = {
        name: work / name for name in ("one", "two", "tuned", "other", "headers", "out", "plain", "fitted")
    }
    for number, name in enumerate(("one", "two", "tuned", "other")):
        if name in needed:
            make_folder(
                where[name], size, seed + number, where["one"] if name in ("tuned", "other") else None
            )
    if "headers" in needed:
        make_folder(where["headers"], size, seed, sparse=True)
    return where


def run_size(size: str, options: Any, links: Path, work: Path) -> list[dict[str, Any]]:
    """The rows of all cases at one size."""
    where = make_folders(options.cases, work, size, options.seed)
    total = sum(tensor.nbytes for tensor in llama(size)[1])
    rows = []
    for case in options.cases:
        arguments = [part.format_map(where) for part in CASES[case]]
        arguments += ["--device", options.device] if "{fitted}" in CASES[case] else []
        found, peaks = run_surgery(arguments, links, options.threads)
        members = sum(part.startswith(("a=", "b=", "c=")) for part in arguments) or 1
        rows.append(_row(case, size, total * members, found, peaks))
    if "merge, lossless" in options.cases:
        python = options.mergekit or sys.executable
        if (
            found := run_mergekit(python, where["one"], where["two"], work / "mergekit", options.threads)
        ) is not None:
            rows.append(_row("mergekit linear", size, 2 * total, found, {}))
    shutil.rmtree(work)
    return rows


def _row(
    case: str, size: str, total: int, found: Mapping[str, float], peaks: Mapping[str, Any]
) -> dict[str, Any]:
    stages = ", ".join(
        f"{stage} {each['anonymous']:.0f}" for stage, each in peaks.items() if each["seconds"] > EVERY
    )
    return {
        "case": case,
        "size": size,
        "files MB": total / 1e6,
        "anonymous MiB": found.get("anonymous MiB"),
        "mapped MiB": found.get("mapped MiB"),
        "resident MiB": found["resident MiB"],
        "CPU s": found["CPU s"],
        "s": found["s"],
        "MB/s": total / 1e6 / found["s"],
        "anonymous by stage": stages,
    }


def verdicts_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What rows say of the bounds that are asked for."""
    said = []
    for case in dict.fromkeys(row["case"] for row in rows):
        mine = [row for row in rows if row["case"] == case and row["anonymous MiB"]]
        if case in ("merge, lossless", "verify", "export plain", "inspect"):
            said += [
                judge(f"{case}, {row['size']}: anonymous MiB", row["anonymous MiB"], ANONYMOUS)
                for row in mine
            ]
        if len(mine) > 1:
            grown = exponent([(row["files MB"], row["anonymous MiB"]) for row in mine])
            said.append(judge(f"{case}: exponent of memory", grown, EXPONENT))
    cpu = {(row["case"], row["size"]): row["CPU s"] for row in rows}
    for (case, size), seconds in cpu.items():
        if case == "merge, lossless" and ("mergekit linear", size) in cpu:
            said.append(
                judge(f"{case}, {size}: CPU against mergekit", seconds / cpu["mergekit linear", size], SLOWER)
            )
    return said


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--sizes", nargs="*", choices=LLAMA, default=["0.1", "0.3", "1.1"], help="billions of parameters"
    )
    parser.add_argument(
        "--cases", nargs="*", choices=CASES, default=["merge, lossless", "verify", "export plain"]
    )
    parser.add_argument("--device", default="cpu", help="where fits run, by default cpu")
    parser.add_argument("--checkout", type=Path, default=HERE, help="whose code runs, by default this one's")
    parser.add_argument(
        "--mergekit", metavar="PYTHON", help="a Python that has mergekit, by default this one"
    )
    parser.add_argument(
        "--work", type=Path, help="where folders are made and removed, by default a temporary folder"
    )
    options = parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=options.work) as temporary:
        links = link(Path(temporary) / "links", options.checkout.resolve())
        for size in ["fast"] if options.fast else options.sizes:
            rows += run_size(size, options, links, Path(temporary) / size)
    show("larger than memory", make_header("scale", options, argv), rows, verdicts_of(rows), options.json)


if __name__ == "__main__":
    main()
