"""Recording: the recipe of what a fit did, where that is known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from surgery.anatomy.plan import Plan
from surgery.core.known import Known
from surgery.core.registry import find_method
from surgery.core.tensor_method import TensorMethod
from surgery.errors import PlanError
from surgery.members.member import Member
from surgery.settings.recipe import Model, Recipe
from surgery.settings.target import Target
from surgery.util.randomness import member_seed


def recipe_of_fit(
    known: Known,
    members: Mapping[str, Member],
    plan: Plan,
    asked: Target,
    *,
    seed: int,
    device: str,
    measured: bool,
    fixed: bool,
) -> Recipe | None:
    """The recipe by which a merge does again what a fit did.

    A member is named by its origin while its weights are the origin's, and by the artifact that it was loaded from
    where they are those of the artifact. Where neither is so, weights came about in a way that no recipe says: the
    recipe that there was is kept, without a target.

    Args:
        known: of the joint model before the fit.
        members: of it.
        plan: by which the fit was made.
        asked: the target.
        seed: of the fit.
        device: that it ran on.
        measured: whether the fit was given inputs to measure on, which recipes read from files.
        fixed: whether settings of the method fix what is made, so that no error is the target by default.
    """
    before = known.recipe or known.joined
    if before is None:
        return None
    entries = {model.name: model for model in before.models}
    models = []
    for name, member in members.items():
        # Weights that a merge would not draw.
        drawn = member.origin.seed not in (None, member_seed(seed, name))
        models.append(_entry(name, entries, known, drawn or before.train is not None))
    recorded = [model for model in models if model is not None]
    lost = None if known.recipe is None else known.recipe.without_target()
    if known.recipe is None and (measured or asked.block != before.parameters.block):
        return None  # measured on what no file holds, or joined by other blocks than a merge would take
    if len(recorded) < len(models):
        return lost
    given = asked.model_dump(include={*Target.model_fields}, exclude_defaults=True)
    document = {
        **before.document(),
        "models": [model.model_dump(exclude_unset=True) for model in recorded],
        "parameters": given,
        "settings": _settings(before, plan),
        "calibrate": before.calibrate if measured else (),
        "seed": seed,
        "device": device,
        "train": None,
    }
    try:
        return Recipe.of(document).recorded(fixed=fixed)
    except PlanError:  # a recipe of another method than that of the plan
        return lost


def _settings(before: Recipe, plan: Plan) -> Mapping[str, Any]:
    """The settings of a recipe's method by which the plan is made again; of one that replaces modules, those before."""
    method = find_method(before.method)
    if not isinstance(method, TensorMethod):
        return before.settings
    own = plan.of_method(method.name)
    return method.told_by(own) if own.banks else {}


def _entry(name: str, entries: dict[str | None, Model], known: Known, made: bool) -> Model | None:
    """How a recipe names a member, by its origin unless it was `made` of that in another way; None where it cannot."""
    entry, folder = entries.get(name), known.sources.get(name)
    if name in known.stale:
        return None
    if entry is not None and name in known.original and not made:
        return entry
    if folder is not None:
        named = {"model": folder, "name": name}
        return (entry or Model(model=folder)).model_copy(update=named)
    return None
