"""Checks whether a run's target already holds what its recipe trains."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from surgery.artifact.folder import read_recipe
from surgery.artifact.manifest import read_manifest
from surgery.disk.claims import claim
from surgery.disk.places import into_artifact
from surgery.disk.records import MANIFEST, remove_owned
from surgery.members.references import parse_reference
from surgery.settings.recipe import Recipe
from surgery.training.report.report import TrainReport
from surgery.training.report.runlog import NAME as LOG
from surgery.training.report.runlog import read_log

FOLDER = "training"


def run_folder(out: str | Path) -> Path:
    """Where a run that will write `out` keeps its log and its state while it goes on."""
    out = Path(out).expanduser()
    return out.with_name(f"{out.name}.{FOLDER}")


def going_on(recipe: Recipe) -> Recipe:
    """The same recipe for members that are trained already: from what they have."""
    assert recipe.train is not None
    return recipe.model_copy(update={"train": recipe.train.going_on()})


def finished_run(recipe: Recipe, *, fast_run: bool = False) -> TrainReport | None:
    """What a run reached that is done already: `recipe.out` is what this very recipe was trained to; else None.

    What a run that was killed at its very end left of its state is removed.
    """
    if recipe.out is None or recipe.train is None or fast_run:
        return None
    out = Path(recipe.out).expanduser()
    log = out / FOLDER / LOG
    if not (out / MANIFEST).is_file() or not log.is_file():
        return None
    manifest, lines = read_manifest(out), read_log(log)
    trained, start, end = read_recipe(out, manifest), lines[0] if lines else {}, lines[-1] if lines else {}
    if end.get("event") != "end" or trained is None:
        return None
    config, given = start.get("config", {}), recipe.train.model_dump(mode="json")
    if any(
        config.get(key) != given[key] for key in ("steps", "generations", "burn_in", "final")
    ):  # a fast run
        return None
    names = [model.name for model in trained.models]
    places = into_artifact(out)
    if not any(
        places.recipe(_plain(each, names)) == places.recipe(trained.resolved())
        for each in (recipe, going_on(recipe))
    ):
        return None
    if os.environ.get("RANK", "0") == "0":
        with claim(out):
            remove_owned(run_folder(out))
    return TrainReport.of(end)


def _plain(recipe: Recipe, names: Sequence[str | None]) -> dict[str, Any]:
    """What an artifact records of a recipe whose members get these names, as it is read back."""
    models = recipe.models
    if len(models) == len(names):
        models = tuple(
            model.model_copy(update={"model": parse_reference(model.model)[1], "name": model.name or name})
            for model, name in zip(models, names, strict=True)
        )
    return yaml.safe_load(recipe.model_copy(update={"models": models}).to_yaml())
