"""This package on a family, through its public functions alone: join, fit within a budget, save, load."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from torch import Tensor

import surgery
from benchmarks.frontier.families import Batch, Family
from surgery import Inputs, Member

BESIDE = ("README.md", "sharing.png")  # a card and its picture, for people; nothing is loaded from them
TRIES = 4
STEP = 0.002  # of the bytes: the least that a budget is lowered by, as choices come in steps


@dataclass(frozen=True)
class Merged:
    """An artifact of a family.

    Attributes:
        states: members' weights, as they are loaded again.
        nbytes: of all its files but the card and its picture.
        all_bytes: of all its files.
        marginal: bytes of tensors, and of parts of them, that one member has alone, on average.
        make: seconds of joining, fitting and writing.
        load: seconds until all members' weights are there.
        detail: what was asked, and what the report says.
    """

    states: dict[str, dict[str, Tensor]]
    nbytes: int
    all_bytes: int
    marginal: float
    make: float
    load: float
    detail: str


def merge_within(
    family: Family, size: int, folder: Path, seed: int, calibrated: bool, device: str = "cpu"
) -> Merged | str:
    """Fit a family to so many bytes of files; the budget is lowered until the files fit.

    Args:
        family: the members.
        size: bytes that all files may have.
        folder: for the artifacts.
        seed: of the fit.
        calibrated: whether it may measure on the calibration data, or makes up its inputs.
        device: that it is fitted on.

    Returns:
        the artifact, or why there is none.
    """
    said = ""
    budget = size / family.whole
    for number in range(TRIES):
        out = folder / f"try{number}"
        try:
            merged = merge(family, budget, out, seed, calibrated, device)
        except surgery.PlanError as error:  # not even its smallest fits
            return str(error)
        if merged.nbytes <= size:
            return merged
        said = f"budget {budget:.4f} gives {merged.nbytes:,} bytes of files"
        over = max(1.01 * (merged.nbytes - size), STEP * size)  # what the index and records take
        budget -= over / family.whole
    return said


def merge(
    family: Family, budget: float, out: Path, seed: int, calibrated: bool, device: str = "cpu"
) -> Merged:
    """Join, fit, save, and load again."""
    start = time.perf_counter()
    members = [_member(family, name) for name in family.states]
    plan = surgery.make_plan([surgery.discover(each, sites=family.sites or ()) for each in members])
    joint = surgery.join(members, plan)
    probes = None
    if calibrated:
        probes = {
            name: [_inputs(piece) for piece in task.calibration.split(64)]
            for name, task in family.tasks.items()
        }
    joint = surgery.fit(joint, budget=budget, probes=probes, seed=seed, device=device)
    surgery.save(joint, out)
    made = time.perf_counter() - start
    modules: dict[str, Any] = {name: family.build().eval() for name in family.states}
    start = time.perf_counter()
    loaded = surgery.load(out, modules=modules)
    states = {name: dict(loaded.collapse(name)) for name in family.states}
    seconds = time.perf_counter() - start
    files = [path for path in out.rglob("*") if path.is_file()]
    sizes = {path: path.stat().st_size for path in files}
    needed = sum(n for path, n in sizes.items() if path.name not in BESIDE)
    alone = [joint.report.stored_bytes]
    if len(members) > 1:
        alone = [surgery.remove(out, name, dry_run=True).stored_bytes for name in family.states]
    saved = joint.report.saved
    detail = f"budget {budget:.4f}; saved by " + ", ".join(
        f"{key} {value / 1e3:,.0f} kB" for key, value in saved.items()
    )
    return Merged(states, needed, sum(sizes.values()), mean(alone), made, seconds, detail)


def _member(family: Family, name: str) -> Member:
    return surgery.load_member(
        family.module(family.states[name]).requires_grad_(True),
        name=name,
        inputs=_inputs(family.tasks[name].calibration.rows(slice(0, 16))),
    )


def _inputs(batch: Batch) -> Inputs:
    return Inputs(batch.args, dict(batch.kwargs or {}))
