"""What a method of `joint_tables` makes of a recipe, and runs of it in processes, whose results are kept in a file."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.crossmodal import METHODS
from benchmarks.crossmodal import changes as changes_of_methods
from benchmarks.harness import in_processes
from benchmarks.recipe_runs import document_of

RECIPE = "crossmodal_small"
WIDTHS = {"lenet": 16, "lstm": 64, "deepbind": 64}
SMALLER = {
    "lenet": "surgery_recipes.nets:lenet?width={width}",
    "lstm": "surgery_recipes.nets:word_model?words=2000&width={width}",
    "deepbind": "surgery_recipes.nets:deepbind?width={width}",
}
Job = dict[str, Any]
"""What identifies a run: its table, and method, members, seed and rates, or recipe, targets and seed."""


def known_method(text: str) -> str:
    """The name of a method, or ValueError."""
    kind, _, number = text.partition("=")
    priced = kind in ("price", "own", "rewards") and float(number) >= 0
    atoms = kind == "atoms" and number.isdecimal() and int(number) > 0
    if text in METHODS or priced or atoms or (kind == "smaller" and 0 < float(number) <= 1):
        return text
    raise ValueError(
        f"a method is price=P, own=P, rewards=P, atoms=C, smaller=S or one of {', '.join(METHODS)}; found {text}"
    )


def changes_of(method: str, members: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """What a method changes in the recipe, and settings that it overrides besides."""
    kind, _, number = method.partition("=")
    if kind in ("price", "own", "rewards"):
        best = {"best": "regret" if kind == "price" else "member"}
        contests = {"fraction": None, "alpha": None}  # as they are by default
        judged = {"judge": "rewards"} if kind == "rewards" else {}
        return {"train": {"evolution": {"price": float(number), **contests, **judged}, "stopping": best}}, []
    if kind == "atoms":
        mixed = {"start": "atoms", "change": "none"}
        return {"train": {"evolution": mixed}, "parameters": {"context": int(number)}}, []
    if kind == "smaller":
        nets = [SMALLER[name].format(width=width_of(method, name)) for name in members]
        own = [f"models.{n}.model={net}" for n, net in enumerate(nets)]
        return dict(changes_of_methods()["single"]), own
    return dict(changes_of_methods()[method]), []


def width_of(method: str, name: str) -> int:
    """The width of a net whose sites have a share of their parameters, which grow with its square."""
    return round(WIDTHS[name] * float(method.partition("=")[2]) ** 0.5)


def crossmodal_job(method: str, members: Sequence[str], seed: int, rates: Mapping[str, float]) -> Job:
    """One run of the cross-modal recipe, with a learning rate for every member."""
    own = {name: float(f"{rates[name]:.3g}") for name in members}
    return {"table": "crossmodal", "method": method, "members": list(members), "seed": seed, "rates": own}


def run_here(job: Job) -> dict[str, Any]:
    """The run itself."""
    import torch

    torch.set_num_threads(1)
    if job["table"] == "synthetic":
        from benchmarks.synthetic import run

        return run(job["setting"], job["noisy"], job["seed"], None)
    method, overridden = changes_of(job["method"], job["members"])
    changes = [f"models.{number}.lr={job['rates'][name]}" for number, name in enumerate(job["members"])]
    changes += [*overridden, *job.get("changes", [])]
    document = document_of(job.get("recipe", RECIPE), method, job["members"], job["seed"], changes)
    return run_document(document, job.get("device", "cpu"), job.get("fast", False))


def run_document(document: Mapping[str, Any], device: str, fast: bool) -> dict[str, Any]:
    """A recipe's run; on a CUDA device steps are captured where members allow it.

    Returns:
        What the report says, all parameters that members have by themselves, and whether steps were captured.
    """
    from surgery.core.sizes import parameters_alone
    from surgery.errors import PlanError, TrainingError
    from surgery.pipeline.train import train_recipe
    from surgery.settings.recipe import Recipe

    captured = device != "cpu"
    while True:
        own = {**document, "train": {**document["train"], "capture": captured}}
        try:
            joint, report = train_recipe(Recipe.of(own), cpu=device == "cpu", fast_run=fast)
        except (PlanError, TrainingError) as error:
            if not captured or "`capture`" not in str(error):
                raise
            print(f"not captured: {error}", file=sys.stderr, flush=True)
            captured = False
            continue
        said = report.document()
        names = ("scores", "tests", "numbers", "seconds", "best", "hypermodules")
        alone = sum(parameters_alone(joint).values())
        return {**{name: said[name] for name in names}, "parameters": alone, "captured": captured}


class Runs:
    """Runs in processes with one thread each, and the file of their results.

    Args:
        path: of the results, a line each.
        jobs: processes at a time.
        minutes: after which no more runs begin.
        always: what jobs have besides: a recipe, a device, and whether runs go through every phase in seconds.
    """

    def __init__(self, path: Path, jobs: int, minutes: float, always: Mapping[str, Any] | None = None):
        self.path, self.jobs, self.end = path, jobs, time.monotonic() + 60 * minutes
        self.always = dict(always or {})
        self.found: dict[str, dict[str, Any]] = {}
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                entry = json.loads(line)
                self.found[_key(entry["job"])] = entry["result"]

    def of(self, job: Job) -> dict[str, Any] | None:
        """The result of a run, where there is one."""
        return self.found.get(_key({**job, **self.always}))

    def run(self, jobs: Iterable[Job]) -> None:
        """Run what has no result yet, in this order."""
        left = [({**job, **self.always},) for job in jobs if self.of(job) is None]
        for (job,), result in in_processes(run_here, left, self.jobs, self.end):
            self.found[_key(job)] = result
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"job": job, "result": result}) + "\n")
            print(f"{_key(job)} {result.get('seconds', 0):.0f} s", file=sys.stderr, flush=True)


def _key(job: Job) -> str:
    return json.dumps(job, sort_keys=True)
