"""Add: one more member for an artifact whose other members stay as they are, and members taken out again."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.disk.claims import claim_of_first
from surgery.disk.files import bytes_below
from surgery.disk.folders import check_target
from surgery.errors import ArtifactError, PlanError, SurgeryWarning, shorten
from surgery.settings.recipe import Model, Recipe, Select
from surgery.settings.target import MAX_ERROR, Target, warn_of_percentage
from surgery.util.progress import task

if TYPE_CHECKING:
    from surgery.artifact.manifest import Manifest
    from surgery.fitting.adding import Addition
    from surgery.members.member import Inputs, Member
    from surgery.storage.stored import Stored


@dataclass(frozen=True)
class AddedMember:
    """A member that was added to an artifact.

    Attributes:
        name: its own.
        target: what was asked for, in words.
        met: whether it was met.
        error: measured relative L2 output error.
        original_bytes: of its tensors alone.
        marginal_bytes: of the tensors that it added.
        disk_bytes: by how much the folder grew, card, picture and records included, which may shrink; 0 where nothing
            was written.
        sites: how many of its tensors are stored as what others have in common and what is its own.
        same: how many are stored already.
        why: this target, where none was asked for.
        warning: what is to be said where its outputs hardly differ between inputs; empty where all is well.
    """

    name: str
    target: str
    met: bool
    error: float
    original_bytes: int
    marginal_bytes: int
    disk_bytes: int
    sites: int
    same: int
    why: str = ""
    warning: str = ""


@dataclass(frozen=True)
class RemovedMembers:
    """Members that were taken out of an artifact.

    Attributes:
        names: their own.
        stored_bytes: of the tensors that went.
        disk_bytes: by how much the folder shrank, card, picture and records included.
    """

    names: tuple[str, ...]
    stored_bytes: int
    disk_bytes: int


def add(
    directory: str | Path,
    members: Mapping[str, str | Member],
    *,
    max_error: float | None = None,
    budget: float | None = None,
    probes: Mapping[str, Sequence[Inputs]] | None = None,
    calibrate: Sequence[str] = (),
    device: str = "auto",
    dry_run: bool = False,
    trust_remote_code: bool = False,
    allow_nonfinite: bool = False,
) -> list[AddedMember]:
    """Add members to an artifact, one after another; all others stay as they are, bit for bit.

    Where a new member resembles others, it is stored as what they have in common and its own difference, and what is
    equal is not stored again. Time and memory do not depend on how many members there are.

    Args:
        directory: the artifact; it is replaced whole or not at all.
        members: by the names that they shall have, references as `load_member` takes them, or members.
        max_error: the most that their outputs may move, as relative L2 error; by default the bound to which the others
            were fitted, or else the largest error of these.
        budget: instead, the most bytes that each may add, as a fraction of its own.
        probes: inputs on which outputs are compared, by member; by default made up from a seed.
        calibrate: instead, files with real inputs: texts, pictures or arrays, each used where it suits.
        device: `auto`, `cpu`, `cuda`, ...
        dry_run: whether nothing is written.
        trust_remote_code: whether Python files that come with a model may run.
        allow_nonfinite: whether weights that are NaN or infinite are accepted.

    Returns:
        what came of each.

    Raises:
        SurgeryError: for bad input, a name that is taken, or a target that cannot be met; the folder is then what it
            was, with the members that were added before.

    Example:
        >>> import surgery
        >>> (added,) = surgery.add("joint", {"new": "./text-new"}, max_error=0.05)
        >>> added.met, added.marginal_bytes < added.original_bytes
        (True, True)
    """
    from surgery.artifact.manifest import read_manifest
    from surgery.util.devices import pick_device

    folder = Path(directory).expanduser()
    target = Target.of({"max_error": max_error, "budget": budget})
    warn_of_percentage(target.max_error)
    with claim_of_first(None if dry_run else folder):
        manifest = read_manifest(folder)
        _check_new(folder, manifest, members)
        if unknown := [
            str(name) for name in probes or () if name not in members and name not in manifest.members
        ]:
            raise PlanError(
                f"Probe inputs need members, found {', '.join(unknown)}; these are added: {', '.join(members)}."
            )
        pick_device(device)
        if not dry_run:
            check_target(folder, overwrite=True, inputs=_inputs(members, calibrate))
        done = []
        for name, given in members.items():
            asked = Adding(name, given, target, (probes or {}).get(name, ()), tuple(calibrate), device)
            with task(f"Adding {name}"):
                consent = trust_remote_code, allow_nonfinite
                done.append(_add(folder, manifest, asked, *consent, dry_run=dry_run))
            if len(done) < len(members) and not dry_run:
                manifest = read_manifest(folder)  # as the last one left it
        return done


@dataclass(frozen=True)
class Adding:
    """One member to be added, and how."""

    name: str
    given: str | Member
    target: Target
    probes: Sequence[Inputs]
    calibrate: tuple[str, ...]
    device: str


def _add(
    folder: Path, manifest: Manifest, asked: Adding, trust: bool, nonfinite: bool, *, dry_run: bool
) -> AddedMember:
    from surgery.artifact.amending import Amendment, amend
    from surgery.artifact.folder import read_recipe
    from surgery.artifact.reading import check_in_place, decoded_from, map_stored
    from surgery.artifact.rebuild import as_saved
    from surgery.artifact.reports import report_with

    check_in_place(folder, manifest)
    made = read_recipe(folder, manifest)
    select = Select() if made is None else made.select
    stored = map_stored(folder, manifest, list(manifest.members))
    with decoded_from(folder, manifest):
        _check_common(folder, manifest, stored)
        addition, member = fit_one(
            asked, _recipe_of_one(manifest, asked, nonfinite), select, manifest, stored, trust,
            None if dry_run else folder,
        )  # fmt: skip
    before = bytes_below(folder)
    if not dry_run:
        member = as_saved(member, addition.stored)
        report = report_with(manifest.report, addition.report)
        amend(Amendment(folder, manifest, stored, addition.whole, report, member))
    more = addition.report.added[asked.name]
    return AddedMember(
        asked.name,
        more.target,
        more.met,
        addition.report.errors[asked.name],
        addition.report.original_bytes[asked.name],
        more.stored_bytes,
        bytes_below(folder) - before,
        addition.sites,
        addition.same,
        _target(asked.target, manifest)[1],
        addition.report.faint,
    )


def fit_one(
    asked: Adding,
    recipe: Recipe,
    select: Select,
    manifest: Manifest,
    stored: Stored,
    trust: bool,
    folder: Path | None = None,
) -> tuple[Addition, Member]:
    """Load a member and fit it to what is stored of others; a large fit that is killed goes on where it was.

    Args:
        asked: which, and to what target.
        recipe: of the one member.
        select: which tensors of the others were chosen.
        manifest: of the artifact.
        stored: what it holds.
        trust: whether Python files that come with the member may run.
        folder: of the artifact, held by this process; without one everything is kept in memory.
    """
    from surgery.fitting.adding import fit_addition
    from surgery.members.member import content_hash, state_tensors, whole_state
    from surgery.pipeline.going_on import digest_of, going_on
    from surgery.pipeline.merge import input_paths, load_entry, plan_members, read_probes

    if isinstance(asked.given, str):
        found = load_entry(recipe.models[0], None, recipe, trust)
        ((member, _),) = found if len(found) == 1 else ((None, None),)
        if member is None:
            raise PlanError(
                f"A member to be added is one model, but {asked.given} has {len(found)}; name it as it is named there."
            )
    else:
        member = replace(asked.given, name=asked.name)
    _, plan = plan_members(
        recipe.model_copy(update={"select": _select_for(member, select, manifest)}), [member]
    )
    probes = list(asked.probes) or read_probes(recipe, [member]).get(asked.name, [])
    target, _ = _target(asked.target, manifest)
    was = content_hash(whole_state(member.module))
    warn_of_same(asked.name, was, manifest)

    def subject() -> dict[str, Any]:
        return {
            "recipe": {**recipe.resolved(), "target": target.model_dump(mode="json")},
            "weights": was,
            "probes": digest_of({member.name: probes}),
            "artifact": {path: entry.sha256 for path, entry in manifest.files.items()},
        }

    with going_on(folder, [*state_tensors(member.module).values()], subject, input_paths(recipe)):
        addition = fit_addition(
            member, plan, stored, target, seed=recipe.seed, probes=probes, device=asked.device, was=was
        )
    return addition, member


def warn_of_same(name: str, was: str, manifest: Manifest) -> None:
    """Warn of a model that is a member already: what is its own in banks is stored for one member only.

    Args:
        name: that it shall have.
        was: content hash of its weights.
        manifest: of the artifact, which knows the hashes of members as they were before a fit.
    """
    known = {each: entry.hash for each, entry in manifest.members.items() if entry.hash}
    known |= manifest.report.hashes if manifest.report is not None else {}
    if same := [each for each, found in known.items() if found == was]:
        warnings.warn(
            f"'{name}' is the same model as member {shorten(same)}, weight for weight: under another name it takes "
            "bytes of its own again, but for tensors that are stored once for all.",
            SurgeryWarning,
            stacklevel=2,
        )


def _check_common(folder: Path, manifest: Manifest, stored: Stored) -> None:
    """Look at the values of what new members may share, whatever others have besides.

    Raises:
        ArtifactError: naming what no bank can be made of.
    """
    from surgery.artifact.reading import raise_wrong_parts
    from surgery.core.registry import find_method
    from surgery.core.tensor_method import TensorMethod

    for bank in stored.plan.banks:
        method, parts = find_method(bank.method, TensorMethod), stored.parts(bank.key)
        if method.common(bank, parts) is not None:
            first = next(p for p in stored.plan.placements if p.bank == bank.key)
            smaller, _, few = method.restrict(bank, [first], parts)
            raise_wrong_parts(folder, manifest, method.wrong_parts(smaller, few))


def _select_for(member: Member, select: Select, manifest: Manifest) -> Select:
    """Selectors of the others that mean a tensor of a new member too."""
    from surgery.anatomy.selectors import matches
    from surgery.members.member import state_tensors

    names = list(state_tensors(member.module))

    def holds(selector: str) -> bool:
        limited = ":" in selector and selector.partition(":")[0] in manifest.members
        return not limited and any(matches(selector, name) for name in names)

    chosen = select.model_dump(exclude={"stacks"})
    return Select.model_validate({key: tuple(filter(holds, each)) for key, each in chosen.items()})


def _recipe_of_one(manifest: Manifest, asked: Adding, nonfinite: bool) -> Recipe:
    """How a member is loaded and measured: with the seed of the others."""
    report = manifest.report
    seed = None if report is None else report.probes.seed
    model = {"model": asked.given if isinstance(asked.given, str) else asked.name, "name": asked.name}
    return Recipe.of(
        {
            "models": [model],
            "calibrate": list(asked.calibrate),
            "seed": manifest.seed or 0 if seed is None else seed,
            "allow_nonfinite": nonfinite,
            "device": asked.device,
        }
    )


def _target(asked: Target, manifest: Manifest) -> tuple[Target, str]:
    """What is asked for, or else what the others were held to, and why that is."""
    from surgery.fitting.report import FitReport

    report = manifest.report or FitReport()
    if asked.given():
        return asked, ""
    if report.target == "lossless" or report.bound:
        return Target.of({"max_error": report.bound or 0.0}), "as for the others"
    if worst := report.largest_error:
        made = f", which were made with {report.target}" if report.target else ""
        return Target.of({"max_error": worst}), f"the largest error of the others{made}"
    return Target.of({"max_error": MAX_ERROR}), "the default, as no error of the others is known"


def remove(directory: str | Path, names: str | Sequence[str], *, dry_run: bool = False) -> RemovedMembers:
    """Take members out of an artifact; what others use of theirs stays, and all others are what they were, bit for bit.

    A member that was added last leaves the folder that there was before, byte for byte.

    Args:
        directory: the artifact; it is replaced whole or not at all.
        names: of members.
        dry_run: whether nothing is written.

    Returns:
        what went.

    Raises:
        SurgeryError: for a name that it does not have, or where no member would be left; the folder is then as it was.

    Example:
        >>> import surgery
        >>> surgery.remove("joint", "text").names
        ('text',)
    """
    from surgery.artifact.amending import Amendment, amend
    from surgery.artifact.manifest import read_manifest
    from surgery.artifact.reading import check_in_place
    from surgery.artifact.reports import report_without
    from surgery.storage.grafting import give_back
    from surgery.storage.trim import drop_costly_banks, restrict

    folder, gone = Path(directory).expanduser(), (names,) if isinstance(names, str) else tuple(names)
    with claim_of_first(None if dry_run else folder):
        manifest = read_manifest(folder)
        unknown = [name for name in gone if name not in manifest.members]
        if unknown or not gone:
            raise ArtifactError(
                f"The members to remove must be among {', '.join(manifest.members)}, but "
                f"{', '.join(unknown) or 'none'} was asked for; give names that it has."
            )
        kept = [name for name in manifest.members if name not in gone]
        if not kept:
            raise ArtifactError(
                f"An artifact has at least one member, but all of {folder} would be removed: "
                f"{', '.join(gone)}; delete the folder instead."
            )
        if not dry_run:
            check_target(folder, overwrite=True)
        check_in_place(folder, manifest, kept)
        stored, unread = _readable(folder, manifest, kept)
        after = drop_costly_banks(give_back(restrict(stored, kept)))
        before = bytes_below(folder)
        if not dry_run:
            report = report_without(manifest.report, kept, after.nbytes)
            with task(f"Removing {', '.join(gone)}"):
                amend(Amendment(folder, manifest, stored, after, report))
        return RemovedMembers(gone, stored.nbytes - after.nbytes + unread, before - bytes_below(folder))


def _readable(folder: Path, manifest: Manifest, kept: Sequence[str]) -> tuple[Stored, int]:
    """What an artifact holds, and what files of members that go take that cannot be read: these need not be whole."""
    from surgery.artifact.reading import map_stored, tensor_files

    try:
        return map_stored(folder, manifest, list(manifest.members)), 0
    except ArtifactError:
        unread = tensor_files(manifest, manifest.members) - tensor_files(manifest, kept)
        return map_stored(folder, manifest, kept), sum(manifest.files[path].bytes for path in unread)


def named(references: Sequence[str]) -> dict[str, str]:
    """References by the names of their members: given in front, those that a joint folder has, or made of the text.

    Raises:
        PlanError: where two have one name.

    Example:
        >>> named(["new=timm:resnet18", "timm:resnet34"])
        {'new': 'timm:resnet18', 'resnet34': 'timm:resnet34'}
    """
    from surgery.artifact.manifest import read_manifest
    from surgery.disk.records import artifact_files
    from surgery.members.member import check_names
    from surgery.members.references import parse_reference, reference_name

    found: list[tuple[str, str]] = []
    for name, rest in map(parse_reference, references):
        folder = Path(rest).expanduser()
        if name is None and folder.is_dir() and artifact_files(folder):
            found += [(each, rest) for each in read_manifest(folder).members]
        else:
            found.append((name or reference_name(rest), rest))
    check_names(name for name, _ in found)
    return dict(found)


def _check_new(folder: Path, manifest: Manifest, members: Mapping[str, str | Member]) -> None:
    from surgery.members.member import check_names
    from surgery.members.references import check_name, check_references

    if not members:
        raise PlanError("At least one member must be added, found none: give name and reference.")
    if taken := [name for name in members if name in manifest.members]:
        raise PlanError(
            f"A member to be added needs a name of its own, but {folder} has {', '.join(taken)} already; choose "
            "another, or remove that member first."
        )
    check_names([*manifest.members, *members])
    for name in members:
        check_name(name)
    check_references(each for each in members.values() if isinstance(each, str))


def _inputs(members: Mapping[str, str | Member], calibrate: Sequence[str]) -> list[Path]:
    """Files and folders that are read, which must not be replaced."""
    from surgery.pipeline.merge import input_paths

    models = tuple(Model(model=each) for each in members.values() if isinstance(each, str))
    return input_paths(Recipe(models=models, calibrate=tuple(calibrate)))
