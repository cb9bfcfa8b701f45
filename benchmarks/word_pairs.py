"""One encoder at equal bytes, calibrated on several sets of texts: output error, and similarities of words.

all-MiniLM-L6-v2, alone, with three sets of calibration texts, 128 each, from three domains of sentiment. The fit, GPTQ
and rounding get the same bytes of files, and the first two the same texts; settings of the others are chosen on
validation texts, among those with a width for each matrix in groups of 64. What is measured are test texts of the
domain, and word pairs with human judgement (WordSim-353, SimLex-999), which nothing has seen. A task figure is missed
by how far its mean over the sets is below the best method's. Needs `pip install --no-deps gensim`.

    python -m benchmarks.word_pairs --jobs 3 --kept word_pairs.jsonl
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from benchmarks.frontier.families import Family, Task
from benchmarks.frontier.families.sentiment import (
    CALIBRATION,
    TEST,
    VALIDATION,
    build,
    made_up,
    pretrained,
    texts_of,
)
from benchmarks.frontier.ours import merge_within
from benchmarks.frontier.packing import read
from benchmarks.frontier.peers.all import PEERS
from benchmarks.frontier.peers.base import Setting
from benchmarks.frontier.scene import Scene
from benchmarks.frontier.table import CALIBRATED, Contest
from benchmarks.harness import make_header, make_parser, run_cells, show, write_csv
from benchmarks.tasks import BATCH, PAIRS, rank_correlation, read_pairs

SETS = ("tweets", "movies", "nyt")
# Of the float32 bytes: what rounding to 3, 4, 5, 6 and 8 bits takes.
SIZES = (0.102, 0.133, 0.165, 0.196, 0.259)
METHODS = (CALIBRATED, "GPTQ", "rounding")
LIMIT = 0.01  # that a mean may be below the best method's
NAME = "minilm"


def encoder(domain: str, fast: bool) -> Family:
    """The encoder as a family of one, with the texts of a domain."""
    parts = made_up(domain) if fast else texts_of(domain)
    task = Task(
        parts["train"].rows(slice(0, CALIBRATION)), parts["validation"].rows(slice(0, VALIDATION)),
        parts["test"].rows(slice(0, TEST)), None,
    )  # fmt: skip
    return Family(domain, lambda: build(fast), {NAME: pretrained(fast)}, None, {NAME: task}, "none")


@cache
def _contest(domain: str, seed: int, fast: bool, device: str) -> Contest:
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="word-pairs-"))
    return Contest(encoder(domain, fast), folder, seed, device=device)


def run_cell(method: str, size: float, domain: str, seed: int, fast: bool, device: str) -> dict[str, Any]:
    """One method at one size with one set of texts."""
    contest = _contest(domain, seed, fast, device)
    family = contest.family
    nbytes = int(size * family.whole)
    row: dict[str, Any] = {"of fp32": size, "method": method, "texts": domain, "bytes": None, "error": None}
    if method == CALIBRATED:
        folder = contest.folder / f"{size}"
        merged = merge_within(family, nbytes, folder, seed, calibrated=True, device=device)
        if isinstance(merged, str):
            return {**row, "setting": f"out of reach: {merged}"}
        states, row["bytes"], setting = merged.states, merged.nbytes, merged.detail
    else:
        (peer,) = [each for each in PEERS if each.name == method]
        tried = contest.best_of(replace(peer, settings=partial(of_width, peer.settings)), nbytes)
        if tried is None:
            return {**row, "setting": "out of reach"}
        states, row["bytes"], setting = read(tried.path).states(), tried.nbytes, tried.words
    row["error"] = contest.judge.judge(states, "test").error
    return {**row, **figures(family.module(states[NAME]), fast), "setting": setting}


def of_width(
    settings: Callable[[Scene, int], Iterator[Setting]], scene: Scene, size: int
) -> Iterator[Setting]:
    """Settings of a peer in groups of 64 with a width for each matrix, which are the best ones on families too."""
    yield from (each for each in settings(scene, size) if "groups of 64, mixed" in each[0])


def figures(module: nn.Module, fast: bool) -> dict[str, float]:
    """Spearman's correlation of similarities with human judgement, by set of pairs; nothing without gensim."""
    pairs = {
        name: found[: 6 if fast else None] for name, file in PAIRS.items() if (found := read_pairs(file))
    }
    words = sorted({word for found in pairs.values() for pair in found for word in pair[:2]})
    vectors = dict(zip(words, embedded(module, words, fast), strict=True)) if words else {}
    return {
        name: rank_correlation([float(vectors[a] @ vectors[b]) for a, b, _ in found], [human for *_, human in found])
        for name, found in pairs.items()
    }  # fmt: skip


@torch.no_grad()
def embedded(module: nn.Module, words: Sequence[str], fast: bool) -> list[Tensor]:
    """Of each word, of length 1."""
    from transformers import AutoTokenizer

    from benchmarks.zoo import minilm_folder

    tokenizer = AutoTokenizer.from_pretrained(minilm_folder())
    found: list[Tensor] = []
    for start in range(0, len(words), BATCH):
        batch = tokenizer(list(words[start : start + BATCH]), padding=True, return_tensors="pt")
        ids = batch["input_ids"] % 200 if fast else batch["input_ids"]
        found += normalize(module(input_ids=ids, attention_mask=batch["attention_mask"]), dim=1).unbind()
    return found


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """By size and method, means over the sets and how far they spread."""
    made = []
    for size, method in dict.fromkeys((row["of fp32"], row["method"]) for row in rows):
        here = [r for r in rows if (r["of fp32"], r["method"]) == (size, method) and r["error"] is not None]
        if not here:
            continue
        line: dict[str, Any] = {"of fp32": size, "method": method, "sets": len(here)}
        line["error"] = mean(r["error"] for r in here)
        for name in PAIRS:
            values = [r[name] for r in here if name in r]
            line[name] = mean(values) if values else None
            line[f"{name} ±"] = stdev(values) if len(values) > 1 else None
        made.append(line)
    return sorted(made, key=lambda line: (-line["of fp32"], METHODS.index(line["method"])))


def verdicts(lines: Sequence[dict[str, Any]]) -> list[str]:
    """By size and figure, how far the fit's mean is below the best method's."""
    said = []
    for size in dict.fromkeys(line["of fp32"] for line in lines):
        here = {line["method"]: line for line in lines if line["of fp32"] == size}
        if CALIBRATED not in here or len(here) < 2:
            continue
        for name in PAIRS:
            own = here[CALIBRATED][name]
            best = max(
                (m for m in here if here[m][name] is not None), key=lambda m: here[m][name], default=None
            )
            if own is not None and best is not None:
                behind = here[best][name] - own
                said.append(
                    f"{size:.1%} {name}: {own:.3f}, best {best} {here[best][name]:.3f}: behind by {behind:.3f}, "
                    f"at most {LIMIT:g}: {'met' if behind <= LIMIT else 'MISSED'}"
                )
        error = min((each["error"], name) for name, each in here.items() if name != CALIBRATED)
        verdict = "met" if here[CALIBRATED]["error"] <= error[0] else "MISSED"
        said.append(
            f"{size:.1%} error: {here[CALIBRATED]['error']:.4f}, {error[1]} {error[0]:.4f}: {verdict}"
        )
    return said


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--sizes", nargs="+", type=float, default=SIZES, help="fractions of the float32 bytes"
    )
    parser.add_argument("--sets", nargs="+", choices=SETS, default=SETS, help="domains of calibration texts")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--device", default="cpu", help="that the encoder is fitted on")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--minutes", type=float, help="begin nothing after so many")
    parser.add_argument("--kept", type=Path, help="where finished cells are kept, and not run again from")
    parser.add_argument("--csv", type=Path, help="write all rows there")
    options = parser.parse_args(argv)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that it starts
    sizes = options.sizes[:1] if options.fast else options.sizes
    sets = options.sets[:1] if options.fast else options.sets
    cells = [
        (method, size, domain, options.seed, options.fast, options.device)
        for size in sizes for domain in sets for method in options.methods
    ]  # fmt: skip
    rows = list(run_cells(run_cell, cells, options.jobs, options.kept, options.minutes).values())
    lines = summary(rows)
    if options.csv:
        write_csv(options.csv, rows)
    if not lines:
        raise SystemExit("Nothing is within these sizes.")
    show(
        "One encoder, three sets of texts",
        make_header("word_pairs", options, argv),
        lines,
        verdicts(lines),
        options.json,
    )


if __name__ == "__main__":
    main()
