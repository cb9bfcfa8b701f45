"""Domain adaptation by mixtures alone: a net that knows digits, and the same digits sheared, shrunk or in shot noise.

The recipe digits: an isometric CNN of eight layers from eight templates learns MNIST. The recipe adaptation: on the
same frozen templates it then sees 2,000 corrupted digits without labels; only its mixtures are trained. Test error on
corrupted digits, mean and standard error over seeds:

    source       the net as it is
    statistics   running statistics of its batch norms follow the new digits; nothing is trained
    moments      mixtures match the first two moments of its features to the source's (M3SDA)
    adversary    mixtures fool a discriminator of features (ADDA)
    labels       mixtures are trained with the labels: what they could reach
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

from benchmarks.harness import make_header, make_parser, show
from benchmarks.nine_tasks import train

CORRUPTIONS = ("shear", "scale", "shot")
WAYS = ("source", "statistics", "moments", "adversary", "labels")


def unadapted(source: Path, corruption: str, seed: int, fast: bool) -> float:
    """The net as it is: its error on corrupted test digits."""
    from surgery_recipes.mnist import mnist

    import surgery
    from surgery.training.tasks.parts import First
    from surgery.training.tasks.validation import evaluate

    test = mnist(batch=64, seed=seed, view=corruption)["test"]
    task = surgery.Task("test", "digits", [], metric="accuracy", test=First(test) if fast else test)
    score = evaluate(surgery.load(source), [task], {}, "test", seed)["test"]
    return 1 - float(score.metric or 0.0)


def adapted(source: Path, way: str, corruption: str, seed: int, fast: bool) -> float:
    """The recipe adaptation by one way: its error on corrupted test digits."""
    changes = [
        f"train.templates.source={source}",
        f"models.0.tasks.0.options.view={corruption}",
        f"models.0.tasks.0.loss={'cross_entropy' if way == 'labels' else way}",
        f"models.0.tasks.0.labels={str(way == 'labels').lower()}",
    ]
    report = train("adaptation", source.with_name(f"{way}-{corruption}-{seed}"), seed, fast, changes)[1]
    return 1 - float(report.tests["digits"].metric or 0.0)


def run(seed: int, folder: Path, fast: bool) -> dict[tuple[str, str], float]:
    """All ways and corruptions of one seed."""
    source = folder / f"digits-{seed}"
    train("digits", source, seed, fast)
    return {
        (corruption, way): unadapted(source, corruption, seed, fast)
        if way == "source"
        else adapted(source, way, corruption, seed, fast)
        for corruption in CORRUPTIONS
        for way in WAYS
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args(argv)
    import torch

    torch.set_num_threads(options.threads)
    seeds = range(options.seed, options.seed + (1 if options.fast else options.seeds))
    with tempfile.TemporaryDirectory() as folder:
        found = [run(seed, Path(folder), options.fast) for seed in seeds]
    rows = []
    for corruption in CORRUPTIONS:
        for way in WAYS:
            errors = [each[corruption, way] for each in found]
            error = stdev(errors) / len(errors) ** 0.5 if len(errors) > 1 else None
            rows.append(
                {
                    "digits": corruption,
                    "way": way,
                    "test error": mean(errors),
                    "standard error": error,
                    "seeds": len(errors),
                }
            )
    show("adaptation of digits", make_header("adaptation", options, argv), rows, [], options.json)


if __name__ == "__main__":
    main()
