"""Artifact: the folder that holds a joint model, and the joint model back from it.

    manifest.json            versions, members, plan, hashes and sizes of all files, measured errors
    records.json.gz          what the manifest says of members, banks and errors, where these are many
    dictionary.safetensors   banks: rows, alignment and contexts
    members/<name>/          weights.safetensors (private and plain tensors), config, tokenizer, preprocessor
    members/weights.safetensors   these of all members that have few bytes of them, where there are eight or more
    recipe.yaml              how it was made
    README.md, sharing.png   a model card, and a picture of who shares what

Writing the same joint model twice gives the same bytes, and so does writing what was loaded. An artifact is
at most 64 KiB larger than its members' own files, whatever they are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, get_args, overload

from torch import nn

from surgery.artifact.manifest import Manifest, read_manifest
from surgery.artifact.reading import decoded_from, read_stored
from surgery.artifact.rebuild import as_saved
from surgery.artifact.recorded import (
    alone_of,
    check_fit,
    hash_of,
    inputs_of,
    is_original,
    origin_of,
    read_small_files,
    replacements_of,
    stored_dtypes,
    stored_shapes,
)
from surgery.artifact.reports import TRAINING_LOG, report_of, restrict_report, trained_report
from surgery.artifact.resident import Resident, ResidentModel
from surgery.artifact.resident_weights import make_resident
from surgery.artifact.writing import write
from surgery.core.joint import JointModel
from surgery.core.known import Known
from surgery.core.replacing import made_again
from surgery.disk.mapped import MappedFile
from surgery.disk.places import out_of_artifact
from surgery.disk.untrusted import RECIPE_BYTES, UnreadableError, as_mapping, parse_yaml, read_regular
from surgery.errors import ArtifactError, PlanError
from surgery.members.member import Member
from surgery.members.occupancy import check_free, check_modules
from surgery.members.origins import origin_kind
from surgery.members.origins.bounded import bounded, by_file
from surgery.members.references import build_architecture
from surgery.permission import Permission
from surgery.settings.recipe import Recipe
from surgery.settings.resources import parse_bytes
from surgery.slots.slots import locate
from surgery.storage.ahead import Ahead
from surgery.storage.stored import Stored, compressed, expand, revive, store
from surgery.util.devices import cpu_by_default, pick_device


def save(
    joint: JointModel,
    out: str | Path,
    *,
    overwrite: bool = False,
    recipe: Recipe | Mapping[str, Any] | None = None,
    max_shard_size: int | str = "5GB",
    extras: Mapping[str, bytes] | None = None,
) -> Path:
    """Write a joint model as a folder, an *artifact*, which `load` reads.

    A member whose architecture changed after it was loaded, such as by another classifier or fewer layers, is saved
    with a configuration of what it is now. Where none describes it, it is saved as a live module, with a warning, and
    `load` needs a module of its architecture.

    Args:
        joint: joined, fitted or trained.
        out: the folder; it appears whole or not at all.
        overwrite: whether an artifact that is already there is replaced.
        recipe: how it was made, to be recorded; by default what the joint model knows itself, see `JointModel.recipe`.
        max_shard_size: the most bytes of one file of weights, as a number or as text such as `"5GB"`.
        extras: contents of further files by their path in the folder, such as the log of a training run.

    Returns:
        the absolute path of the folder.

    Raises:
        OutputError: where the folder exists, holds other files, cannot be written, the disk is full, or what was
            written cannot be loaded.
        PlanError: where a generated weight of a member was replaced by another tensor, or the recipe is not valid.

    Example:
        >>> import surgery
        >>> joint = surgery.join([surgery.load_member("text=./text"), surgery.load_member("vision=./vision")])
        >>> surgery.save(joint, "new-joint")
        PosixPath('/.../new-joint')
    """
    return _save(joint, out, overwrite, recipe, max_shard_size, extras or {}, {})


def save_fitted(
    joint: JointModel, out: str | Path, *, overwrite: bool = False, sources: Sequence[MappedFile] = ()
) -> Path:
    """`save` right after a fit, whose hashes of weights are those of the weights that are there.

    Args:
        joint: fitted.
        out: the folder.
        overwrite: whether an artifact that is already there is replaced.
        sources: files that weights are mapped from, as they were when they were loaded.

    Raises:
        LoadError: where one of these changed since; what is at `out` is then what it was.
    """
    return _save(joint, out, overwrite, None, "5GB", {}, joint.known.hashes, sources)


def _save(
    joint: JointModel,
    out: str | Path,
    overwrite: bool,
    recipe: Recipe | Mapping[str, Any] | None,
    max_shard_size: int | str,
    extras: Mapping[str, bytes],
    hashes: Mapping[str, str],
    sources: Sequence[MappedFile] = (),
) -> Path:
    """`save`, with content hashes of members, as far as these are known, and the files that weights lie in."""
    stored = store(joint)
    members = [as_saved(member, stored) for member in joint.members.values()]
    report = report_of(joint, stored, hashes)
    if recipe is None:
        given = joint.recipe
        # What was made of the artifact that is written over has lost what it was made of.
        holds = given is None or (report is not None and report.target and not _made_of(given, Path(out)))
    else:
        given, holds = recipe if isinstance(recipe, Recipe) else Recipe.of(recipe), True
    given = given if given is None or holds else given.without_target()
    training = None if TRAINING_LOG in extras else joint.known.training  # which says the same
    return write(
        stored, members, report, out, overwrite, given, max_shard_size, extras, training, hashes, sources
    )


@overload
def load(
    directory: str | Path,
    *,
    modules: Mapping[str, nn.Module] | None = None,
    members: Sequence[str] | None = None,
    trust_remote_code: bool = False,
    device: str = "cpu",
    resident: None = None,
) -> JointModel: ...


@overload
def load(
    directory: str | Path,
    *,
    modules: Mapping[str, nn.Module] | None = None,
    members: Sequence[str] | None = None,
    trust_remote_code: bool = False,
    device: str = "cpu",
    resident: Resident,
    cache: int | str = 0,
) -> ResidentModel: ...


@cpu_by_default()
def load(
    directory: str | Path,
    *,
    modules: Mapping[str, nn.Module] | None = None,
    members: Sequence[str] | None = None,
    trust_remote_code: bool = False,
    device: str = "cpu",
    resident: Resident | None = None,
    cache: int | str = 0,
) -> JointModel | ResidentModel:
    """Read an artifact, the folder that `save` and `merge` write.

    Args:
        directory: the folder.
        modules: for members that were live modules: a module of the architecture by member, which becomes part of the
            joint model and gets the stored weights. Those of members that are not read are left alone.
        members: names of those to read; all by default.
        trust_remote_code: whether Python code that the artifact names may run: factories, and files that came
            with a transformers model.
        device: where the weights go: `cpu`, `cuda:1`, ..., or `auto`.
        resident: to run members without training them, in little memory: weights stay packed as they are stored, what
            members have in common is held once, and each layer is decoded when it is used. `packed` takes at most 1.15
            times the stored bytes, `shared` 1.3 times, first of all for what members have in common. By default all
            weights are decoded, and members train.
        cache: with `resident`, bytes of decoded tensors that are kept besides, as a number or as text such as `50MB`;
            with `shared` of what members have in common, which serves all of them.

    Returns:
        the joint model, with the report and the recipe that the artifact holds; with `resident` a `ResidentModel`.

    Raises:
        ArtifactError: where files are missing or damaged, or do not match the manifest or the architecture.
        ConsentError: where a member needs Python code that may not run; with a module of it in `modules` none runs.
        LoadError: where an architecture cannot be built.
        PlanError: where `modules` names members that there are not, or the device is not there.

    Example:
        >>> import surgery, torch
        >>> joint = surgery.load("joint")
        >>> joint.names
        ('text', 'vision')
        >>> joint["vision"](torch.zeros(1, 3, 32, 32)).logits.shape
        torch.Size([1, 2])
    """
    if resident not in (None, *get_args(Resident)):
        raise PlanError(f"`resident` must be one of {', '.join(get_args(Resident))}, found {resident!r}.")
    cached = _cache_bytes(cache)
    if cached is None or (cached and resident is None):
        raise PlanError(
            f"`cache` must be a number of bytes or a size such as 50MB, beside `resident`, found {cache!r} beside "
            f"{resident!r}."
        )
    place = pick_device(device)
    folder = Path(directory).expanduser()
    manifest = read_manifest(folder)
    names = _chosen(manifest, members)
    check_modules(modules, manifest.members)
    permission = Permission.of_artifact(trust_remote_code)
    check_free({name: module for name, module in (modules or {}).items() if name in names})
    stored = read_stored(folder, manifest, names)
    decoding = Ahead(stored.tensors.values() if resident is None else ())
    with decoded_from(folder, manifest), decoding as ahead:
        found = [
            _member(folder, manifest, stored, name, (modules or {}).get(name), permission) for name in names
        ]
        if resident is not None:
            packed = make_resident(found, stored, resident, cached)
            return packed.to(place) if place.type != "cpu" else packed
        joint = revive(found, stored, _known(folder, manifest, stored, found), ahead.decode)
    return joint.to(place) if place.type != "cpu" else joint


def _cache_bytes(cache: int | str) -> int | None:
    """Bytes that a cache may take; None where it is no size."""
    try:
        found = parse_bytes(cache)
    except ValueError:
        return None
    return found if isinstance(found, int) and not isinstance(found, bool) and found >= 0 else None


def _made_of(recipe: Recipe, out: Path) -> bool:
    return any(
        Path(model.model).expanduser().resolve() == out.expanduser().resolve() for model in recipe.models
    )


def _known(folder: Path, manifest: Manifest, stored: Stored, members: Sequence[Member]) -> Known:
    """What an artifact says of the weights of some of its members."""
    names = [member.name for member in members]
    whole = len(names) == len(manifest.members)
    report = restrict_report(manifest.report, names, whole)
    hashes = {name: found for name in names if (found := hash_of(manifest, name)) is not None}
    original = frozenset(member.name for member in members if member.original)
    recipe = read_recipe(folder, manifest)
    recipe = None if recipe is None else recipe.of_members(names)
    forms, sources = compressed(stored.plan, expand(stored)), dict.fromkeys(names, str(folder))
    training = trained_report(folder, manifest) if whole else None
    return Known(report, training, hashes, original, forms, recipe=recipe, sources=sources)


def _member(
    folder: Path,
    manifest: Manifest,
    stored: Stored,
    name: str,
    given: nn.Module | None,
    permission: Permission,
) -> Member:
    """A member, still without weights; a module that was given is as it was where something does not fit."""
    files = read_small_files(folder, manifest, name)
    with ExitStack() as stack:
        with bounded(f"member '{name}'", **by_file(stored_shapes(stored, name))):
            module = _build(manifest, stored, name, files, permission) if given is None else given
            replaced = stack.enter_context(made_again(name, module, replacements_of(manifest, name)))
        origin, original = origin_of(manifest, name), is_original(manifest, name)
        inputs, alone = inputs_of(manifest, name), alone_of(manifest, name)
        member = Member(name, module.eval(), inputs, origin, files, original, replaced, alone)
        check_fit(stored, name, module)
    for owners in (*manifest.members[name].ties.values(), *(p.site.owners for p in stored.plan.of(name))):
        _tie(member.module, owners)
    return member


def _build(
    manifest: Manifest, stored: Stored, name: str, files: Mapping[str, bytes], permission: Permission
) -> nn.Module:
    """A member's architecture, without weights."""
    origin = origin_of(manifest, name)
    if origin.kind == "module":
        raise ArtifactError(
            f"Member '{name}' was a live module of class {origin.architecture}, which no file can build again; in "
            f"Python `surgery.load(FOLDER, modules={{'{name}': module}})` takes one of that architecture, and what it "
            "returns can be exported."
        )
    module = build_architecture(origin, files, permission=permission)
    take = getattr(origin_kind(origin.kind), "take_dtypes", None)
    return take(module, stored_dtypes(stored, name)) if take else module


def _tie(module: nn.Module, owners: Sequence[str]) -> None:
    """Give all owners one parameter or buffer, where an architecture does not tie them by itself."""
    holder, attribute = locate(module, owners[0])
    for owner in owners[1:]:
        at, name = locate(module, owner)
        for mine, theirs in ((holder._parameters, at._parameters), (holder._buffers, at._buffers)):
            if attribute in mine and name in theirs:
                theirs[name] = mine[attribute]  # pyright: ignore[reportArgumentType]


def _chosen(manifest: Manifest, members: Sequence[str] | None) -> list[str]:
    if isinstance(members, str) or not (members is None or isinstance(members, Iterable)):
        raise ArtifactError(f"`members` must be a list of names, found {members!r}; give [{members!r}].")
    unknown = [str(name) for name in members or () if name not in manifest.members]
    if unknown or (members is not None and not members):
        raise ArtifactError(
            f"`members` must be among {', '.join(manifest.members)}, but "
            f"{', '.join(unknown) or 'none'} was asked for; give names that it has."
        )
    return [name for name in manifest.members if members is None or name in members]


def read_recipe(folder: Path, manifest: Manifest) -> Recipe | None:
    """The recipe in an artifact, its relative paths those of the working directory; None where it has none.

    Raises:
        ArtifactError: where it cannot be read, or is no recipe.
    """
    entry = manifest.files.get("recipe.yaml")
    if entry is None:
        return None
    try:
        data = read_regular(folder / "recipe.yaml", RECIPE_BYTES)
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            raise UnreadableError("is not the file that was recorded")
        return Recipe.of(out_of_artifact(folder).recipe(as_mapping(parse_yaml(data.decode()))))
    except (UnreadableError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{folder / 'recipe.yaml'} {error}; copy the artifact again.") from None
    except PlanError as error:
        raise ArtifactError(
            f"{folder / 'recipe.yaml'} must be a recipe. {error} Copy the artifact again, or install the packages that "
            "it was written with."
        ) from None
