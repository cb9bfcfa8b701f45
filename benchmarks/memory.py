"""Peak memory of merging two BERT-base-sized folders: `python -m benchmarks.memory`.

Two transformers folders of 0.11B random parameters each, the second a noisy copy of the first or a model of its own,
are merged by `surgery merge` in a process of its own, whose largest resident memory is read when it ends; so is that of
a process which only imports torch and transformers, so that what the merge itself holds is the difference. With
`--other FOLDER`, a checkout of another commit, each merge runs with the code of both, and what they write is compared.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.against import link
from benchmarks.harness import judge, make_header, make_parser, show

HERE = Path(__file__).resolve().parent.parent
LIMIT = 2 / 3  # of the other checkout's peak
SLOWER = 1.03
NOISE = 0.05  # standard deviation of a sibling's noise, in that of the tensor
CASES = {
    "max-error 0.05": ("one", "noisy", ()),
    "max-error 0": ("one", "noisy", ("--max-error", "0")),
    "budget 0.25": ("one", "noisy", ("--budget", "0.25")),
    "max-error 0.05, bfloat16": ("one-bfloat16", "noisy-bfloat16", ()),
    "max-error 0.05, unrelated": ("one", "unrelated", ()),
}
IMPORTS = "import torch, transformers; from transformers import BertModel"
MERGE = "import sys; from surgery_cli.__main__ import main; sys.exit(main())"


def make_models(folder: Path, seed: int, fast: bool) -> None:
    """Write the models that are merged.

    Args:
        folder: for a folder of each.
        seed: of their weights.
        fast: whether they are tiny.
    """
    import torch
    from transformers import BertConfig, BertModel

    size = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    config = BertConfig.from_dict(size | {"vocab_size": 999} if fast else {})
    generator = torch.Generator().manual_seed(seed + 1)
    for name in ("one", "noisy", "unrelated"):
        torch.manual_seed(seed + 2 * (name == "unrelated"))
        model = BertModel(config)
        if name == "noisy":
            with torch.no_grad():
                for p in model.parameters():
                    scale = NOISE * float(p.std()) or 1e-3
                    p.add_(torch.randn(p.shape, generator=generator), alpha=scale)
        model.save_pretrained(folder / name)
        if name != "unrelated":
            model.bfloat16().save_pretrained(folder / f"{name}-bfloat16")


def run(code: str, arguments: Sequence[str], links: Path, threads: int) -> dict[str, float]:
    """Run Python code in a new process: its largest resident memory, and the CPU time that it took."""
    environment = {**os.environ, "PYTHONPATH": str(links), "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-P", "-c", code, *arguments]
    start = time.perf_counter()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, cwd=links, env=environment, stdout=said, stderr=said)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if status:
            said.seek(0)
            raise RuntimeError(f"{' '.join(arguments)} failed:\n{said.read().decode()[-2000:]}")
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return {
        "peak MiB": usage.ru_maxrss / unit,
        "CPU s": usage.ru_utime + usage.ru_stime,
        "s": time.perf_counter() - start,
    }


def digest(folder: Path) -> str:
    """Of all tensor files of an artifact, and of what its manifest says of them and of the fit."""
    manifest = json.loads((folder / "manifest.json").read_text())
    kept = {key: each for key, each in manifest.items() if key not in ("files", "checksum", "versions")}
    found = hashlib.sha256(json.dumps(kept, sort_keys=True).encode())
    for file in sorted(folder.rglob("*.safetensors")):
        content = hashlib.sha256(file.read_bytes()).hexdigest()
        found.update(f"{file.relative_to(folder)}\0{content}\0".encode())
    return found.hexdigest()


def merge(case: str, models: Path, out: Path, links: Path, options: Any) -> dict[str, Any]:
    """Merge the models of a case: peak memory, also without imports, CPU time, and a digest of what is written."""
    first, second, target = CASES[case]
    seed = ("--seed", str(options.seed))
    arguments = ["merge", str(models / first), str(models / second), *target, *seed, "--out", str(out)]
    bare = run(IMPORTS, (), links, options.threads)["peak MiB"]
    found = run(MERGE, arguments, links, options.threads)
    return {"imports MiB": bare, "merge MiB": found["peak MiB"] - bare, **found, "digest": digest(out)}


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--other", type=Path, help="a checkout of another commit, to compare with")
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES), help="by default all")
    options = parser.parse_args(argv)
    results, verdicts = [], []
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        # In a process of its own: a child's peak is never below what its parent holds when it starts it.
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            pool.submit(make_models, work / "models", options.seed, options.fast).result()
        checkouts = {"this": HERE} | ({"other": options.other.resolve()} if options.other else {})
        links = {name: link(work / name, checkout) for name, checkout in checkouts.items()}
        for case in options.cases:
            found = {}
            for name in checkouts:  # into a folder of one name, which is part of what is written
                out = work / "joint"
                found[name] = merge(case, work / "models", out, links[name], options)
                out.rename(work / f"{name} {len(results)}")
                results.append({"case": case, "checkout": name, **found[name]})
            if "other" in found:
                now, before = found["this"], found["other"]
                for what, limit in (("peak MiB", LIMIT), ("CPU s", SLOWER)):
                    ratio = now[what] / before[what]
                    verdicts.append(judge(f"{case}: {what} against the other checkout", ratio, limit))
                verdicts.append(
                    f"{case}: files are {'equal' if now['digest'] == before['digest'] else 'OTHERS'}"
                )
    rows = [{**row, "digest": row["digest"][:8]} for row in results]
    show("memory of a merge", make_header("memory", options, argv), rows, verdicts, options.json)


if __name__ == "__main__":
    main()
