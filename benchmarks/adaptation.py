"""Domain adaptation by mixtures alone: a net that knows digits, and the same digits sheared, shrunk or in shot noise.

An isometric CNN of eight layers from eight templates learns MNIST. A twin on the same frozen templates then sees 2,000
corrupted digits without labels; only its mixtures are trained. Test error on corrupted digits, mean and standard error
over seeds:

    source       the net as it is
    statistics   running statistics of its batch norms follow the new digits; nothing is trained
    moments      mixtures match the first two moments of its features to the source's (M3SDA)
    adversary    mixtures fool a discriminator of features (ADDA)
    labels       mixtures are trained with the labels: what they could reach
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from functools import partial
from statistics import mean, stdev
from typing import Any

from benchmarks.harness import make_header, make_parser, show

CORRUPTIONS = ("shear", "scale", "shot")
WAYS = ("source", "statistics", "moments", "adversary", "labels")
TEMPLATES = {"count": 8, "mixing": "softmax", "start": "uniform", "lr": 0.03}


def source_model(seed: int, fast: bool) -> Any:
    """A joint model of a trained net and its twin, on the same templates."""
    import torch
    from surgery_recipes.isometric import cnn
    from surgery_recipes.mnist import mnist

    import surgery

    torch.manual_seed(seed)
    net, inputs = cnn()
    alone = join_on_templates([surgery.load_member(net, name="source", inputs=inputs)])
    data = mnist(batch=32, seed=seed)
    task = surgery.Task("digits", "source", data["train"], metric="accuracy", validation=data["validation"])
    config = {
        "steps": 2 if fast else 100, "generations": 1 if fast else 8, "final": 0,
        "optimizer": {"lr": 0.003}, "evolution": {"codes": "ones", "change": "none"}, "templates": TEMPLATES,
    }  # fmt: skip
    surgery.train(alone, [task], config, seed=seed, cpu=True)
    nets = {name: deepcopy(alone.extract("source")) for name in ("source", "target")}
    return join_on_templates([surgery.load_member(n, name=name, inputs=inputs) for name, n in nets.items()])


def join_on_templates(members: Sequence[Any]) -> Any:
    """Members joined, their blocks to be mixtures of shared templates."""
    import surgery

    return surgery.join(members, surgery.plan_templates([surgery.discover(member) for member in members]))


def adapt(joint: Any, way: str, corruption: str, seed: int, fast: bool) -> float:
    """The twin after adaptation: its error on corrupted test digits."""
    from surgery_recipes.mnist import mnist

    import surgery
    from surgery.training.adaptation import Adversary, Moments, features_of
    from surgery.training.losses import LOSSES
    from surgery.training.validation import evaluate

    joint = deepcopy(joint)
    seen = mnist(batch=64, seed=seed, view=corruption, train=128 if fast else 2000)
    if way != "source":
        known = features_of(joint, "source", mnist(batch=64, seed=seed, train=2000)["train"], "head")
        target = joint["target"]
        losses = {
            "statistics": lambda output, batch: output.sum() * 0,
            "moments": Moments(target, "head", known) if way == "moments" else None,
            "adversary": Adversary(target, "head", known, seed=seed) if way == "adversary" else None,
            "labels": "cross_entropy",
        }
        task = surgery.Task("adapt", "target", seen["train"], loss=losses[way])
        config = {
            "steps": 2 if fast else 60, "generations": 1 if fast else 5, "final": 0, "freeze": ["re:.*"],
            "optimizer": {"lr": 0.003}, "evolution": {"codes": "ones", "change": "none"},
            "templates": {**TEMPLATES, "start": "fit", "freeze": True, "lr": 0.01}, "stopping": {"keep": "last"},
        }  # fmt: skip
        surgery.train(joint, [task], config, seed=seed, cpu=True)
    test = surgery.Task("test", "target", seen["train"], metric="accuracy", test=seen["test"])
    score = evaluate(joint, [test], {"test": LOSSES["cross_entropy"]}, "test", seed)["test"]
    return 1 - float(score.metric or 0.0)


def run(seed: int, fast: bool) -> dict[tuple[str, str], float]:
    """All ways and corruptions of one seed."""
    joint = source_model(seed, fast)
    one = partial(adapt, joint, seed=seed, fast=fast)
    return {(corruption, way): one(way, corruption) for corruption in CORRUPTIONS for way in WAYS}


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args(argv)
    import torch

    torch.set_num_threads(options.threads)
    seeds = range(options.seed, options.seed + (1 if options.fast else options.seeds))
    found = [run(seed, options.fast) for seed in seeds]
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
