"""Refit: an artifact to which members were added, or from which some went, fitted anew from where its members came."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.disk.claims import claim_of_first
from surgery.disk.folders import check_target
from surgery.errors import LoadError
from surgery.fitting.report import FitReport
from surgery.settings.recipe import Model, Recipe
from surgery.settings.target import Target
from surgery.util.progress import task, track

if TYPE_CHECKING:
    from torch import nn

    from surgery.artifact.manifest import Manifest
    from surgery.core.joint import JointModel
    from surgery.members.member import Inputs, Member


@dataclass(frozen=True)
class Refit:
    """What an artifact takes fitted anew, beside what it takes as it is.

    Attributes:
        target: what was asked for, in words.
        met: whether it was met.
        before: bytes of tensors as they are.
        after: bytes of tensors fitted anew.
        errors_before: measured output error of each member as it is, where it is known.
        errors: of each member fitted anew.
        original_bytes: of all members' tensors alone.
        written: whether the artifact is now the new one.
        warning: what is to be said of members whose outputs hardly differ between inputs; empty where all is well.
    """

    target: str
    met: bool
    before: int
    after: int
    errors_before: Mapping[str, float | None]
    errors: Mapping[str, float]
    original_bytes: int
    written: bool
    warning: str = ""

    @property
    def saved(self) -> int:
        """Bytes that the new one takes less."""
        return self.before - self.after


def refit(
    directory: str | Path,
    *,
    max_error: float | None = None,
    budget: float | None = None,
    modules: Mapping[str, nn.Module] | None = None,
    probes: Mapping[str, Sequence[Inputs]] | None = None,
    calibrate: Sequence[str] = (),
    device: str = "auto",
    dry_run: bool = False,
    trust_remote_code: bool = False,
) -> Refit:
    """Fit an artifact anew, all of its members together, from the models that they came from.

    Args:
        directory: the artifact; it is replaced whole or not at all.
        max_error: the new target; by default that of the fit, and of an error bound the smallest that any member has;
            where members of the fit are gone, the largest error of those that are left.
        budget: instead, a fraction of the members' bytes.
        modules: members that were live modules, with the weights that they had, by name; they are used up.
        probes: inputs to measure on, by member.
        calibrate: files with real inputs, as a recipe has them.
        device: `auto`, `cpu`, `cuda`, ...
        dry_run: whether nothing is written: what a refit would save is found by doing it.
        trust_remote_code: whether Python code that the artifact names may run.

    Returns:
        what it takes before and after.

    Raises:
        SurgeryError: where a member's origin cannot be reached or is another one by now, or a target cannot be met; the
            folder is then as it was.

    Example:
        >>> import surgery
        >>> made = surgery.refit("joint", dry_run=True)
        >>> made.written, made.saved == made.before - made.after
        (False, True)
    """
    from surgery.artifact.folder import read_recipe
    from surgery.artifact.manifest import read_manifest
    from surgery.artifact.reading import check_in_place, map_stored
    from surgery.members.occupancy import check_modules
    from surgery.util.devices import pick_device

    folder, asked = Path(directory).expanduser(), Target.of({"max_error": max_error, "budget": budget})
    with claim_of_first(None if dry_run else folder):
        manifest = read_manifest(folder)
        check_modules(modules, manifest.members)
        if not dry_run:
            check_target(folder, overwrite=True)
        recipe = _recipe(read_recipe(folder, manifest), manifest, asked, calibrate, device)
        pick_device(recipe.device)
        check_in_place(folder, manifest)
        before = map_stored(folder, manifest, list(manifest.members)).nbytes
        members = _members(folder, manifest, modules or {}, trust_remote_code)
        joint = _fit_and_save(recipe, members, probes or {}, None if dry_run else folder)
    known, found = manifest.report or FitReport(), joint.report
    assert isinstance(found, FitReport)  # of the fit
    return Refit(
        found.target,
        found.met,
        before,
        found.stored_bytes,
        {name: known.error(name) for name in manifest.members},
        dict(found.errors),
        sum(found.original_bytes.values()),
        not dry_run,
        found.faint,
    )


def _recipe(
    made: Recipe | None, manifest: Manifest, asked: Target, calibrate: Sequence[str], device: str
) -> Recipe:
    """The recipe of all members, added ones too, to the target that is asked for."""
    from surgery.artifact.recorded import origin_of

    made, report = made or Recipe(), manifest.report or FitReport()
    entries = {model.name: model for model in made.models}
    models = [
        entries.get(name) or Model(model=origin_of(manifest, name).reference, name=name)
        for name in manifest.members
    ]
    parameters = made.parameters
    bounds = [bound for name in manifest.members if (bound := report.bound_of(name)) is not None]
    if asked.given():
        target = {name: getattr(asked, name) for name in asked.given()}
    elif report.target == "lossless":
        target = {"max_error": 0.0}
    elif report.bound is None and parameters.given():
        target = {name: getattr(parameters, name) for name in parameters.given()}
    elif bounds:
        target = {"max_error": min(bounds)}
    else:  # what is left of a fit of which no target is known
        target = {} if report.largest_error is None else {"max_error": report.largest_error}
    none = dict.fromkeys(parameters.given())
    return made.model_copy(
        update={
            "models": tuple(models),
            "parameters": parameters.model_copy(update={**none, **target}),
            "calibrate": tuple(calibrate) or made.calibrate,
            "device": device,
            "train": None,
            "out": None,
        }
    )


def _members(folder: Path, manifest: Manifest, modules: Mapping[str, nn.Module], trust: bool) -> list[Member]:
    """All members as they were before they were joined.

    Raises:
        LoadError: naming those that cannot be had, and why.
    """
    from surgery.artifact.recorded import read_small_files
    from surgery.artifact.verify import load_recorded
    from surgery.members.member import content_hash, whole_state
    from surgery.permission import Permission

    permission, found, bad = Permission.of_artifact(trust), [], []
    hashes = (manifest.report or FitReport()).hashes
    for name in track(list(manifest.members), "Loading members"):
        if manifest.members[name].replacements:
            bad.append(f"modules of {name} were replaced, which a merge by its recipe does anew")
            continue
        if name not in hashes:
            bad.append(f"the weights of {name} were changed since they came from there, as by training")
            continue
        member, why = load_recorded(manifest, name, modules.get(name), permission, True)
        if member is None:
            bad.append(f"{name} was {why.removeprefix('not ').replace('compared', 'not loaded')}")
        elif content_hash(whole_state(member.module)) != hashes[name]:
            bad.append(f"{name} has other weights now than those that were joined")
        elif name in modules:
            found.append(replace(member, files=read_small_files(folder, manifest, name)))
        else:
            found.append(member)
    if bad:
        raise LoadError(
            f"A refit of {folder} needs all members as they were before, but {'; '.join(bad)}. Bring these back, pass "
            "live modules as `modules`, or leave the artifact as it is: members can be added and removed without."
        )
    return found


def _fit_and_save(
    recipe: Recipe, members: list[Member], probes: Mapping[str, Sequence[Inputs]], folder: Path | None
) -> JointModel:
    """All members fitted, and written where there is a folder; a large run that is killed goes on where it was."""
    from surgery.artifact import save
    from surgery.core.joining import join
    from surgery.fitting.fit import fit
    from surgery.members.member import state_tensors
    from surgery.pipeline.going_on import digest_of, going_on
    from surgery.pipeline.merge import Prepared, input_paths, plan_members, read_probes

    anatomies, plan = plan_members(recipe, members)
    measured = {**read_probes(recipe, members), **probes}
    prepared = Prepared(recipe, tuple(members), tuple(anatomies), plan, measured)
    tensors = [t for member in members for t in state_tensors(member.module).values()]

    def subject() -> dict[str, Any]:
        from surgery.members.member import content_hash, whole_state

        hashes = {member.name: content_hash(whole_state(member.module)) for member in members}
        return {"recipe": prepared.resolved(), "weights": hashes, "probes": digest_of(probes)}

    with going_on(folder, tensors, subject, input_paths(recipe)) as run, task(run.fitting) as work:
        joint = fit(
            join(members, plan),
            **{name: getattr(recipe.parameters, name) for name in Target.model_fields},
            probes=measured or None,
            seed=recipe.seed,
            device=recipe.device,
        )
        joint.recipe = Recipe.of(prepared.resolved())
        if folder is not None:
            work.describe(f"Writing {folder}")
            save(joint, folder, overwrite=True)
    return joint
