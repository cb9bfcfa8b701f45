"""Exports one member, as a folder for its own library or as an artifact of it alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from surgery.artifact.exportcard import write_export_card
from surgery.artifact.folder import load
from surgery.artifact.formats.checkpoint import check_kind
from surgery.artifact.formats.compressed_tensors import plan_packing, write_compressed_tensors
from surgery.artifact.formats.lora import check_base, write_lora
from surgery.artifact.formats.transformers import write_transformers
from surgery.artifact.manifest import read_manifest
from surgery.artifact.reading import check_hashes, read_stored
from surgery.artifact.rebuild import as_exported, as_saved
from surgery.artifact.recorded import origin_of, read_member, replacements_of
from surgery.artifact.reports import report_of, restrict_report
from surgery.artifact.resident import ResidentModel
from surgery.artifact.writing import write
from surgery.core.joint import JointModel
from surgery.core.registry import active_methods
from surgery.disk.claims import claim
from surgery.disk.folders import check_target, new_folder
from surgery.errors import ExportError, LoadError, PlanError, TrainingError
from surgery.members.member import Member, state_tensors
from surgery.members.references import local_path, write_plain
from surgery.settings.target import warn_of_percentage
from surgery.slots.extracting import dissolve
from surgery.storage.packed import REFUSED
from surgery.storage.states import module_of, state_of
from surgery.storage.stored import Stored, store
from surgery.storage.trim import on_cpu, restrict
from surgery.util.devices import cpu_by_default

if TYPE_CHECKING:
    from torch import nn

Format = Literal["plain", "compressed", "transformers", "compressed-tensors", "lora"]
"""Formats of an export."""

BARE_KINDS = ("module", "factory")
"""Origins whose plain form is a state dict, for which no class is needed."""


@cpu_by_default()
def export(
    source: str | Path | JointModel,
    member: str,
    out: str | Path,
    *,
    format: Format = "plain",
    harden: bool = False,
    tie_widths: bool = False,
    base: str | None = None,
    max_error: float | None = None,
    calibrate: Sequence[str | Path] = (),
    overwrite: bool = False,
    trust_remote_code: bool = False,
    say: Callable[[str], None] | None = None,
) -> Path:
    """Write one member as a folder of its own, for its own library, for servers, or as a small artifact.

    Args:
        source: the folder of an artifact, or a joint model.
        member: its name.
        out: the folder to write; it appears whole or not at all.
        format: `plain` is ordinary weights that transformers, timm or `load_state_dict` read without this
            package; `compressed` is the smallest artifact of this member, for `surgery.load`; `transformers` is
            compressed as well, for `AutoModel.from_pretrained` where `surgery` is imported; `compressed-tensors` has
            linear layers packed as integers, for transformers with that package, and for servers; `lora` is an adapter
            of peft for a base.
        harden: for members with routes: whether each task takes the one route that it likes best, as `surgery.harden`
            makes it; mixtures of routes have no plain form.
        tie_widths: for `compressed-tensors`: whether layers that servers merge into one, such as q, k and v, get one
            number of bits, 4 or 8.
        base: reference to the model that an adapter belongs to, such as the plain export of a relative; for `lora`.
        max_error: how far an adapter may move the member's outputs, 0.01 by default; for `lora`.
        calibrate: files with real inputs on which that is measured; without any, inputs are made up; for `lora`.
        overwrite: whether an earlier export or artifact that is already there is replaced.
        trust_remote_code: whether Python files that come with a transformers model may run.
        say: is called with lines for a user: for `compressed-tensors` what each kind of tensors becomes, for `lora`
            what the adapter is.

    Returns:
        the absolute path of the folder.

    Raises:
        PlanError: where there is no such member or format.
        ArtifactError: where the artifact is damaged.
        ExportError: where a module of the member was replaced and has no plain form, or the format is not one for
            the member.
        OutputError: where the folder exists, holds other files, cannot be written, or the disk is full.

    Example:
        >>> import surgery
        >>> surgery.export("joint", "text", "plain-text")
        PosixPath('/.../plain-text')
    """
    check_settings(source, format, tie_widths, base, max_error, calibrate)
    check_target(out, overwrite=overwrite, inputs=read_paths(source, base, calibrate))
    check_member(source, member, format, base)
    warn_of_percentage(max_error)
    with claim(out):
        if not isinstance(source, JointModel):
            _check_content(Path(source).expanduser(), member)
        if format == "lora":
            assert base is not None
            bound = 0.01 if max_error is None else max_error
            return _export_lora(
                source, member, out, base, bound, calibrate, overwrite, trust_remote_code, say
            )
        if format == "plain":
            return _export_plain(source, member, out, overwrite, trust_remote_code, harden)
        if harden:
            source = hardened(source, member, trust_remote_code)
        stored, described, report = one(source, member)
        if format == "compressed":
            return write(stored, [described], report, out, overwrite, None)
        if format == "transformers":
            with new_folder(out, overwrite=overwrite, need=stored.nbytes) as folder:
                write_transformers(folder, stored, described, trust_remote_code)
                write_export_card(folder, described, format, report)
            return Path(out).expanduser().resolve()
        packing, module = plan_packing(stored, described, tie_widths, trust_remote_code)
        _tell(say, packing.lines())
        with new_folder(out, overwrite=overwrite, need=sum(packing.sizes.values())) as folder:
            write_compressed_tensors(folder, packing, module, stored, described)
            write_export_card(folder, described, format, report, packing.lines())
        return Path(out).expanduser().resolve()


def _tell(say: Callable[[str], None] | None, lines: Sequence[str]) -> None:
    if say is not None:
        for line in lines:
            say(line)


def read_paths(source: Any, base: str | None, calibrate: Sequence[str | Path]) -> list[Path]:
    """The files and folders on this machine that an export reads, and so must not replace."""
    found = [] if isinstance(source, JointModel) else [Path(source)]
    found += [] if base is None else [path for path in (local_path(base),) if path]
    return [*found, *(Path(each) for each in calibrate)]


def _check_content(folder: Path, member: str) -> None:
    """Compare the files that are read with those that were written: an export has hashes of its own afterwards."""
    check_hashes(folder, read_manifest(folder), [member])


def check_settings(
    source: Any, format: str, tie_widths: bool, base: str | None, max_error: float | None, calibrate: Any
) -> None:
    """Whether settings of an export go together, and there is something to export.

    Raises:
        PlanError: where they do not.
        TrainingError: where the members of `source` stay packed.
        LoadError: where a file with real inputs does not exist.
    """
    if isinstance(source, ResidentModel):
        raise TrainingError(f"{REFUSED} An export takes the artifact's folder.")
    if not isinstance(source, (str, Path, JointModel)):
        raise PlanError(
            f"`source` must be the folder of an artifact or a joint model, found {type(source).__name__}; give one of "
            "these."
        )
    if format not in get_args(Format):
        raise PlanError(
            f"The format of an export is one of {', '.join(get_args(Format))}, found '{format}'; give one of these."
        )
    if tie_widths and format != "compressed-tensors":
        raise PlanError(f"`tie_widths` is for the format compressed-tensors, found {format}; leave it out.")
    if format == "lora" and base is None:
        raise PlanError("The format lora is an adapter of another model: give that as `base`.")
    if base is not None and (Path(base).expanduser() / "adapter_config.json").exists():
        raise PlanError(
            f"`base` must have weights of its own, which servers load before an adapter, but {base} is an adapter of "
            "peft itself; give the model that it belongs to, or the plain export of a member."
        )
    if format != "lora" and (base is not None or max_error is not None or calibrate):
        raise PlanError(
            f"`base`, `max_error` and `calibrate` are for the format lora, found {format}; leave them out."
        )
    if isinstance(calibrate, (str, Path)):
        raise PlanError(f"`calibrate` must be a list of files, found '{calibrate}'; give ['{calibrate}'].")
    for file in calibrate:
        if not Path(file).expanduser().exists():
            raise LoadError(f"`calibrate` must name readable files or folders, but {file} does not exist.")
    if max_error is not None and not 0 < max_error < math.inf:
        raise PlanError(f"`max_error` must be above 0, found {max_error:g}; an adapter is hardly ever exact.")


def check_member(source: str | Path | JointModel, member: str, format: str, base: str | None) -> None:
    """Whether there is such a member, and the format is one for it, before a weight is read.

    Raises:
        PlanError: where there is none.
        ExportError: where the format is not one for it, peft is missing, or the base of an adapter is not there.
    """
    if isinstance(source, JointModel):
        _check_name(member, source.names)
        origin, replaced = source.members[member].origin, len(source.members[member].replaced)
    else:
        manifest = read_manifest(Path(source).expanduser())
        _check_name(member, manifest.members)
        origin, replaced = origin_of(manifest, member), len(manifest.members[member].replacements)
    if format in ("transformers", "compressed-tensors"):
        check_kind(member, origin, replaced, format)
    if base is not None:
        check_base(base)


def _export_plain(
    source: str | Path | JointModel, member: str, out: str | Path, overwrite: bool, trust: bool, harden: bool
) -> Path:
    if harden:
        source = hardened(source, member, trust)
    if isinstance(source, JointModel):
        _check_name(member, source.names)
        module, report = source.extract(member), source.report
        described = as_exported(source.members[member], module)
    else:
        described, module = _read_plain(source, member, trust)
        report = read_manifest(Path(source).expanduser()).report
    size = sum(tensor.numel() * tensor.element_size() for tensor in state_tensors(module).values())
    with new_folder(out, overwrite=overwrite, need=size) as folder:
        write_plain(module, described.origin, described.files, folder)
        write_export_card(folder, described, "plain", report)
    return Path(out).expanduser().resolve()


def _export_lora(
    source: str | Path | JointModel,
    member: str,
    out: str | Path,
    base: str,
    max_error: float,
    calibrate: Sequence[str | Path],
    overwrite: bool,
    trust: bool,
    say: Callable[[str], None] | None,
) -> Path:
    if isinstance(source, JointModel):
        _check_name(member, source.names)
        joint = source
    else:
        joint = load(source, members=[member], trust_remote_code=trust)
    with new_folder(out, overwrite=overwrite) as folder:
        write_lora(
            folder, joint.members[member], joint.extract(member), base, max_error, trust, say, calibrate
        )
    return Path(out).expanduser().resolve()


def hardened(source: str | Path | JointModel, member: str, trust: bool) -> JointModel:
    """One member with what is soft in it made hard; a joint model that is given stays as it is."""
    if isinstance(source, JointModel):
        _check_name(member, source.names)
        joint = deepcopy(source)
    else:
        _check_name(member, read_manifest(Path(source).expanduser()).members)
        joint = load(source, members=[member], trust_remote_code=trust)
    methods = [method for method in active_methods(joint) if method.hardens]
    if not methods:
        raise PlanError(
            f"`harden` is for routes, but member '{member}' has nothing soft in it: leave it out."
        )
    for method in methods:
        method.harden(joint)
    return joint


def _read_plain(source: str | Path, member: str, trust: bool) -> tuple[Member, nn.Module]:
    """One member of an artifact and its module with ordinary weights."""
    manifest = read_manifest(Path(source).expanduser())
    _check_name(member, manifest.members)
    origin, replaced = origin_of(manifest, member), replacements_of(manifest, member)
    if replaced and origin.kind == "module":
        raise ExportError(
            f"Modules of member '{member}' were replaced, and only its architecture, which was a live module, can make "
            f"ordinary ones of them: load the artifact with modules={{'{member}': a module of it}} and export that."
        )
    if origin.kind in BARE_KINDS and not replaced:
        stored, described, _ = one(source, member)
        return described, module_of(state_of(stored, member))
    joint = load(source, members=[member], trust_remote_code=trust)
    if not replaced:
        return joint.members[member], dissolve(joint, member)
    described, module = joint.members[member], joint.extract(member)
    return as_exported(described, module), module


def one(source: str | Path | JointModel, member: str) -> tuple[Stored, Member, Any]:
    """What is stored of one member alone, the member (without a module where it was read), and its report."""
    if isinstance(source, JointModel):
        _check_name(member, source.names)
        whole = store(source)
        report = restrict_report(report_of(source, whole), [member], len(source) == 1)
        stored = restrict(on_cpu(whole), [member])
        return stored, as_saved(source.members[member], stored), report
    folder = Path(source).expanduser()
    manifest = read_manifest(folder)
    _check_name(member, manifest.members)
    stored = read_stored(folder, manifest, [member])
    report = restrict_report(manifest.report, [member], len(manifest.members) == 1)
    return stored, read_member(folder, manifest, member, module_of({})), report


def _check_name(member: str, names: Any) -> None:
    if member not in names:
        raise PlanError(f"`member` must be one of {', '.join(names)}, found '{member}'; give one of these.")
