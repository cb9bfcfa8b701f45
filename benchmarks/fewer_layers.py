"""MiniLM's six layers from fewer: layers as mixtures of K templates, or as K tied ones, against dropping layers.

All are distilled on texts of the Brown corpus without labels, for the same number of steps: the student's sentence
embedding learns to point where the original's does. At each K all keep the same numbers, K layers of six (mixtures
themselves are a few dozen more); word embeddings are frozen. On texts that were not trained on:

    distance    1 - cosine between the student's and the original's embedding, mean
    order kept  Spearman correlation of the similarities of pairs of texts, the student's with the original's

    mixtures    six layers, linear mixtures of K templates, begun by the best fit to the six
    tied        six layers of which each takes one of K templates, begun by clustering the six
    spread      six layers of which neighbours take one template: layers 1 1 2 2 3 3, begun from the first K layers
    dropped     K of the six layers, evenly spaced, the first and the last among them; for K = 5 the best of
                the six choices after a tenth of the steps each
    routed      K of the six layers, those that are missed most when layers are left out one by one on two batches
                before the first step, as routes begin; or, with `--learn`, learned from there over a share of the steps
    tried       the same, and of choices of the last layer that are close each is trained for a tenth of the steps
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.harness import make_header, make_parser, show

LAYERS = 6
WAYS = ("mixtures", "tied", "spread", "dropped", "routed", "tried")
ROUTES = ("routed", "tried")
_WORDS, _TEST = 24, 512  # words of a text, texts that are tested on


def texts(documents: Sequence[Sequence[str]], seed: int, count: int) -> tuple[list[str], list[str]]:
    """`count` pieces of nine tenths of the documents to train on, and 512 of the others to test on."""
    draw = random.Random(seed)
    documents = list(documents)
    draw.shuffle(documents)
    cut = len(documents) // 10

    def pieces(of: Sequence[Sequence[str]], wanted: int) -> list[str]:
        every = [
            " ".join(words[at : at + _WORDS])
            for words in ([word for word in each if word != "<eos>"] for each in of)
            for at in range(0, len(words) - _WORDS + 1, _WORDS)
        ]
        return draw.sample(every, wanted)

    return pieces(documents[cut:], count), pieces(documents[:cut], _TEST)


def embedder(keep: Sequence[int] | None = None) -> Any:
    """MiniLM, or some of its layers, as a module that gives sentence embeddings of length one."""
    from surgery_recipes.pretrained import minilm_regressor
    from torch import nn
    from torch.nn.functional import normalize

    class Embedder(nn.Module):
        def __init__(self, encoder: nn.Module):
            super().__init__()
            self.encoder = encoder

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
            return normalize((hidden * mask).sum(1) / mask.sum(1).clamp_min(1), dim=1)

    regressor, inputs = minilm_regressor()
    encoder: Any = regressor.get_submodule("encoder")
    if keep is not None:
        encoder.encoder.layer = nn.ModuleList([encoder.encoder.layer[number] for number in keep])
        encoder.config.num_hidden_layers = len(keep)
    return Embedder(encoder), inputs


def distance(output: Any, batch: Any) -> Any:
    """1 - cosine of embeddings of length one, mean over the batch."""
    return 1 - (output * batch.target).sum(1).mean()


@cache
def given(seed: int, steps: int, batch: int) -> tuple[list[Any], list[Any]]:
    """Batches to train on and to test on: tokens, and where the original's embeddings point."""
    import torch
    from surgery_recipes.brown import read_texts
    from surgery_recipes.packages import find_files
    from surgery_recipes.pretrained import minilm_folder

    from surgery.training.tasks.sources_text import load_tokenizer

    teacher = embedder()[0].eval()
    tokenizer = load_tokenizer(minilm_folder())

    @torch.no_grad()
    def batches(of: Sequence[str]) -> list[tuple[dict[str, Any], Any]]:
        made = []
        for at in range(0, len(of), batch):
            found = tokenizer(
                of[at : at + batch], padding=True, truncation=True, max_length=48, return_tensors="pt"
            )
            inputs = {key: found[key] for key in ("input_ids", "attention_mask")}
            made.append((inputs, teacher(**inputs)))
        return made

    documents = read_texts(find_files("brown", None)[0])
    train, test = texts(documents, seed, steps * batch)
    return batches(train), batches(test)


def student(way: str, templates: int, keep: Sequence[int] | None, trials: int) -> Any:
    """A joint model of the student alone, before it learns anything.

    Args:
        way: one of `WAYS`.
        templates: layers that are kept.
        keep: their numbers, where they are chosen.
        trials: steps of each choice that is tried.
    """
    import surgery

    module, inputs = embedder(keep)
    member = surgery.load_member(module, name="student", inputs=inputs)
    if way in ROUTES:
        how = {"layers": templates, "trials": trials if way == "tried" else 0}
        return surgery.join([member], surgery.plan_modules([member], "routes", how))
    mixture = "linear" if way == "mixtures" else "one-hot"
    found = [surgery.discover(member)]
    plan = None if keep else surgery.plan_templates(found, templates=templates, mixture=mixture)
    return surgery.join([member], plan)


def training_of(way: str, steps: int, lr: float, learn: float) -> dict[str, Any]:
    """How a student is distilled."""
    config: dict[str, Any] = {
        "steps": steps, "generations": 1, "final": 0, "freeze": ["re:.*embeddings.*"],
        "optimizer": {"name": "adamw", "lr": lr, "schedule": "linear", "warmup": steps // 10},
        "evolution": {"codes": "ones", "change": "none", "start": "own"},
        "stopping": {"keep": "last"},
    }  # fmt: skip
    if way in ROUTES:  # in parts, so many of which learn; the route is hard in the others
        learning = round(20 * learn) if steps >= 20 else 0
        parts = 20 if learning else 1
        config |= {"steps": steps // parts, "generations": learning, "final": parts - learning}
    elif way != "dropped":
        config["templates"] = {"start": "sequential" if way == "spread" else "fit", "lr": 1e-3}
    return config


def figures(joint: Any, test: Sequence[tuple[dict[str, Any], Any]]) -> tuple[float, float]:
    """The student's distance from the original, and how much of the order of similarities it kept."""
    import torch
    from scipy.stats import spearmanr

    module = joint["student"].eval()
    place = next(module.parameters()).device
    with torch.no_grad():
        made = torch.cat([module(**{key: t.to(place) for key, t in x.items()}).cpu() for x, _ in test])
        wanted = torch.cat([target for _, target in test])
        pairs = torch.triu_indices(len(made), len(made), 1)
        kept = spearmanr((made @ made.t())[*pairs], (wanted @ wanted.t())[*pairs]).statistic
        return float(1 - (made * wanted).sum(1).mean()), float(kept)


def routes_of(report: Any) -> tuple[list[list[str]], int]:
    """Layers of each route that was chosen, and forward passes in which choices were measured."""
    found = report.methods.get("routes", {})
    kept = [[name for (name,) in own] for route in found.get("chosen", {}).values() for own in route.values()]
    passes = (own["passes"] for route in found.get("measured", {}).values() for own in route.values())
    return kept, sum(passes)


def run(
    way: str,
    templates: int,
    seed: int,
    steps: int,
    batch: int,
    lr: float = 3e-4,
    learn: float = 0.0,
    device: str = "cpu",
) -> dict[str, Any]:
    """One student, as it begins and distilled."""
    import torch

    import surgery

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    train, test = given(seed, steps, batch)
    keep = torch.linspace(0, LAYERS - 1, templates).round().int().tolist() if way == "dropped" else None
    few = max(steps // 10, 1)
    task = surgery.Task("distilled", "student", train, distance)
    config = training_of(way, steps, lr, learn)

    def distilled(joint: Any, **changes: Any) -> Any:
        return surgery.train(joint, [task], {**config, **changes}, seed=seed, cpu=device == "cpu")

    tried: dict[tuple[int, ...], float] = {}
    if way == "dropped" and templates == LAYERS - 1:
        for gone in range(LAYERS):
            some = tuple(number for number in range(LAYERS) if number != gone)
            trial = student(way, templates, some, few)
            distilled(trial, steps=few)
            tried[some] = figures(trial, test)[0]
        keep = list(min(tried, key=lambda some: tried[some]))
    begun, joint = student(way, templates, keep, few), student(way, templates, keep, few)
    distilled(begun, steps=1, optimizer={"lr": 1e-12})  # the start alone
    before = figures(begun, test)
    report = distilled(joint)
    after = figures(joint, test)
    kept, passes = routes_of(report)
    return {
        "layers": kept[0] if kept else keep, "way": way, "K": templates, "seed": seed, "seconds": report.seconds,
        "distance before": before[0], "distance": after[0], "order kept before": before[1], "order kept": after[1],
        "lr": lr, "steps besides": len(tried) * few + passes / (3 * templates),
    }  # fmt: skip


def tabulate(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds, and standard errors of what is left after distillation."""
    rows = []
    for templates, way, lr in sorted({(-r["K"], r["way"], r["lr"]) for r in found}):
        mine = [r for r in found if (r["way"], r["K"], r["lr"]) == (way, -templates, lr)]
        row: dict[str, Any] = {"K": -templates, "way": way, "lr": lr}
        columns = (
            "distance before",
            "distance",
            "order kept before",
            "order kept",
            "seconds",
            "steps besides",
        )
        for name in columns:
            row[name] = mean(r[name] for r in mine)
        for name in ("distance", "order kept"):
            spread = stdev(r[name] for r in mine) / len(mine) ** 0.5 if len(mine) > 1 else None
            row[f"{name}, standard error"] = spread
        chosen = [[n for n in r.get("layers") or () if n != "identity"] for r in mine]
        rows.append(
            {**row, "seeds": len(mine), "layers": "; ".join(" ".join(map(str, own)) for own in chosen)}
        )
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--templates", nargs="+", type=int, default=[4, 3, 2], metavar="K")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", nargs="+", type=float, default=[3e-4])
    parser.add_argument(
        "--learn", type=float, default=0.0, help="share of the steps in which routes are learned"
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="of students; the original stays on the CPU"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--kept", type=Path, default=Path("fewer_layers.jsonl"), help="where finished runs are kept"
    )
    options = parser.parse_args(argv)
    steps = 2 if options.fast else options.steps
    seeds = range(options.seed, options.seed + (1 if options.fast else options.seeds))
    cells = [
        (way, k, seed, steps, options.batch, lr, options.learn, options.device)
        for seed, lr, k, way in product(seeds, options.lr, options.templates, options.ways)
    ]
    done: dict[str, Any] = {}
    if options.kept.exists():
        done = {key: result for key, result in map(json.loads, options.kept.read_text("utf-8").splitlines())}
    left = [cell for cell in cells if str(cell) not in done]
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        for cell, result in zip(left, pool.map(run, *zip(*left, strict=True)) if left else (), strict=True):
            done[str(cell)] = result
            with options.kept.open("a", encoding="utf-8") as file:
                file.write(json.dumps([str(cell), result]) + "\n")
            print(f"{result['way']} of {result['K']}: {result['seconds']:.0f} s", file=sys.stderr, flush=True)
    rows = tabulate([done[str(cell)] for cell in cells])
    show("MiniLM from fewer layers", make_header("fewer_layers", options, argv), rows, [], options.json)


if __name__ == "__main__":
    main()
