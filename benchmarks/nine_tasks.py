"""Nine tasks on shared templates: what their mixtures have in common, and transfer to a tenth task.

The recipe nine_tasks: three data sets in three augmentations, an isometric CNN for each, private mixtures of eight
shared templates. First table: the correlation of two tasks' mixtures, layer by layer, where they share the
augmentation, the data set, or neither; a layer's mean mixture over the tasks is taken away first, so that chance is
-1/8. Second table: a tenth task of 1,000 pictures (inverted digits), test error:

    mixtures   the templates of the nine tasks frozen; mixtures, norms and head are trained, from the best source task's
    head       the same, and mixtures stay the source task's: norms and head are trained
    scratch    a net of its own, everything trained
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.harness import make_header, make_parser, show

TRANSFERS: Mapping[str, Sequence[str]] = {
    "mixtures": (),
    "head": ("train.templates.learn=false",),
    "scratch": (
        "train.templates.source=null", "train.templates.freeze=false", "train.freeze=[]",
        "settings.templates=null",
    ),
}  # fmt: skip


def train(name: str, out: Path, seed: int, fast: bool, changes: Sequence[str] = ()) -> Any:
    """One recipe from end to end; its joint model and its report."""
    from surgery.pipeline.train import train_recipe
    from surgery.settings.documents import override, read_document
    from surgery.settings.recipe import Recipe

    document = override(read_document(name), [f"out={out}", f"seed={seed}", *changes])
    return train_recipe(Recipe.of(document), fast_run=fast, cpu=True, trust_remote_code=True)


def correlations(mixtures: Any, names: Sequence[str]) -> list[dict[str, float]]:
    """By layer, the mean correlation of tasks that share the augmentation, the data set, or neither.

    Args:
        mixtures: `[tasks, layers, K]`.
        names: of the tasks, as `data_augmentation`.
    """
    import torch

    centred = mixtures - mixtures.mean(0)
    unit = torch.nn.functional.normalize(centred, dim=2)
    rows = []
    for layer in range(mixtures.shape[1]):
        groups: dict[str, list[float]] = {"augmentation": [], "data": [], "neither": []}
        for one, other in combinations(range(len(names)), 2):
            (data, view), (data2, view2) = names[one].split("_"), names[other].split("_")
            kind = "data" if data == data2 else "augmentation" if view == view2 else "neither"
            groups[kind].append(float(unit[one, layer] @ unit[other, layer]))
        rows.append({kind: mean(values) for kind, values in groups.items()})
    return rows


def run(seed: int, folder: Path, fast: bool) -> tuple[list[dict[str, float]], dict[str, Any]]:
    """One seed: the nine tasks, then the tenth in every way."""
    nine = folder / f"nine-{seed}"
    joint, report = train("nine_tasks", nine, seed, fast)
    key = joint.plan.stacks["stack0"][0]
    mixtures = (
        joint.dictionary[key].coefficients.detach().view(len(joint.names), -1, joint.dictionary[key].context)
    )
    found = correlations(mixtures, joint.names)
    tenth: dict[str, Any] = {"nine": 1 - mean(score.metric for score in report.tests.values())}
    for way, changes in TRANSFERS.items():
        source = [] if way == "scratch" else [f"train.templates.source={nine}"]
        out = folder / f"{way}-{seed}"
        _, reached = train("transfer", out, seed, fast, [*source, *changes])
        tenth[way] = 1 - reached.tests["inverted"].metric
        tenth[f"{way} numbers"] = reached.trained
    return found, tenth


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args(argv)
    import torch

    torch.set_num_threads(options.threads)
    seeds = range(options.seed, options.seed + (1 if options.fast else options.seeds))
    work = Path(tempfile.mkdtemp())
    try:
        results = [run(seed, work, options.fast) for seed in seeds]
    finally:
        shutil.rmtree(work, ignore_errors=True)
    layers = [
        {"layer": layer + 1, **{f"same {k}" if k != "neither" else k: mean(r[0][layer][k] for r in results)
                                for k in results[0][0][layer]}}
        for layer in range(len(results[0][0]))
    ]  # fmt: skip
    header = make_header("nine_tasks", options, argv)
    show("correlation of mixtures", header, layers, [], options.json)
    rows = []
    for way in TRANSFERS:
        errors = [tenth[way] for _, tenth in results]
        rows.append(
            {
                "tenth task": way,
                "numbers trained": results[0][1][f"{way} numbers"],
                "test error": mean(errors),
                "standard error": stdev(errors) / len(errors) ** 0.5 if len(errors) > 1 else None,
                "seeds": len(errors),
            }
        )
    show("transfer to inverted digits", header, rows, [], options.json)


if __name__ == "__main__":
    main()
