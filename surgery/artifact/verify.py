"""Verifies an artifact: files against the manifest, members against their hashes and origins.

Files are compared with their recorded hashes; each member's state dict is rebuilt and its content hash
compared; and where a member's origin can still be loaded, its weights and outputs are compared with the
rebuilt member's.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from surgery.artifact.exported import exported
from surgery.artifact.folder import load
from surgery.artifact.manifest import NAME, Manifest, checksum_holds, read_manifest
from surgery.artifact.reading import read_stored, wrong_hashes
from surgery.artifact.recorded import TOGETHER, inputs_of, origin_of, replacements_of, small_files
from surgery.core.joint import JointModel
from surgery.core.replacing import make_again
from surgery.disk.records import wrong_files
from surgery.errors import ArtifactError, ConsentError, SurgeryError
from surgery.fitting.report import FitReport
from surgery.handles.state import LazyState, handles_of
from surgery.inputs.probes import outputs_over, probe_inputs, relative_error, unknown_in_probes
from surgery.members.member import Member, Origin, content_hash, whole_state
from surgery.members.occupancy import check_modules, check_unoccupied
from surgery.members.origins.bounded import bounded, by_file
from surgery.members.references import load_origin, ships
from surgery.members.replacement import Replacement
from surgery.permission import Permission
from surgery.slots.collapse import collapsed
from surgery.storage.states import lazy_state_of
from surgery.util.copies import duplicate
from surgery.util.showing import as_html, as_text
from surgery.util.text import one_line, shorten
from surgery.util.wording import more_than

ROUNDING = 1e-5  # relative: a kernel may add the terms of a block in another order than the recorded one
SAME_ERROR = (1e-4, 0.02)  # absolute and relative difference between two measurements of one output error


@dataclass(frozen=True)
class MemberCheck:
    """What was found about one member.

    Attributes:
        member: its name.
        ok: whether nothing is wrong.
        reasons: what is wrong, in sentences.
        rebuilt: whether its state dict has the recorded content hash.
        origin: `same` as recorded, `changed`, `found` (no hash was recorded), or why it was not compared.
        weight_difference: largest absolute difference of any weight from the origin's.
        error: relative L2 error of its outputs against the origin's, on the recorded probe inputs.
        recorded_error: what was measured when it was fitted.
        not_built: why its module was not built, so that its weights alone were compared; None where it was.
        not_compared: why its outputs were not compared with the recorded error; None where they were, or none is
            recorded.
    """

    member: str
    ok: bool
    reasons: tuple[str, ...]
    rebuilt: bool
    origin: str
    weight_difference: float | None = None
    error: float | None = None
    recorded_error: float | None = None
    not_built: str | None = None
    not_compared: str | None = None


@dataclass(frozen=True, repr=False)
class VerifyReport:
    """The outcome of `verify`: files that are wrong, by path with the reason, and a check of each member.

    Attributes:
        directory: the folder.
        files: what is wrong with files, by path.
        members: a check of each; none of an export that is no artifact.
        what: such an export is, in words.
    """

    directory: str
    files: Mapping[str, str]
    members: tuple[MemberCheck, ...] = field(default_factory=tuple)
    what: str | None = None

    @property
    def ok(self) -> bool:
        """Whether all files and all members are what they should be."""
        return not self.files and all(check.ok for check in self.members)

    def __repr__(self) -> str:
        rows = [f"{path}: {reason}" for path, reason in self.files.items()]
        return as_text(f"VerifyReport: {self._summary()}", rows + [": ".join(row) for row in self._rows()])

    def _repr_html_(self) -> str:
        wrong = [f"{path}: {reason}" for path, reason in self.files.items()]
        return as_html(self._summary(), ("member", "found"), self._rows(), wrong)

    def _summary(self) -> str:
        return f"{self.directory}: {'everything matches' if self.ok else 'does NOT match what was written'}"

    def _rows(self) -> list[list[str]]:
        return [
            [each.member, "; ".join(each.reasons) or f"as recorded; origin {each.origin}"]
            for each in self.members
        ]

    def to_json(self) -> dict[str, Any]:
        """All of it as plain JSON values."""
        return {"ok": self.ok, **asdict(self)}


def verify(
    directory: str | Path,
    *,
    origins: bool = False,
    modules: Mapping[str, nn.Module] | None = None,
    trust_remote_code: bool = False,
) -> VerifyReport:
    """Check an artifact, or the files of an export.

    Args:
        directory: the folder.
        origins: whether members are compared with their origins, where these can still be loaded: opens the folders,
            files and hub ids that the artifact names. Without it nothing outside of the folder is opened.
        modules: for members that were live modules: the original modules, weights included, to compare with.
        trust_remote_code: whether Python code that the artifact names may run: factories, and files that came
            with a transformers model.

    Returns:
        what was found; an origin that cannot be reached is said so and is no failure.

    Raises:
        ArtifactError: where the manifest cannot be read.

    Example:
        >>> surgery.verify("joint").ok
        True
    """
    folder = Path(directory).expanduser()
    if (found := _export(folder, origins)) is not None:
        return found
    manifest = read_manifest(folder)
    check_modules(modules, manifest.members)
    check_unoccupied({name: module for name, module in (modules or {}).items() if name in manifest.members})
    files = wrong_hashes(folder, manifest)
    if not checksum_holds(folder):
        files = {NAME: "is not the file that was written: its checksum is another one", **files}
    permission = Permission.of_artifact(trust_remote_code)
    spoilt = {name: [p for p in _files_of(manifest, name) if p in files] for name in manifest.members}
    sound = [name for name, paths in spoilt.items() if not paths]
    states, problem = _read_states(folder, manifest, sound)
    checks = []
    for name, paths in spoilt.items():
        if paths or problem:
            reason = f"it was not rebuilt: {', '.join(paths)} is damaged" if paths else problem
            checks.append(MemberCheck(name, False, (reason,), False, "not compared"))
        else:
            given = (modules or {}).get(name)
            origin, where = load_recorded(manifest, name, given, permission, origins)
            joint, failure, not_built = _load_member(folder, manifest, name, given, trust_remote_code)
            reasons = [failure] if failure else []
            check = _check(manifest, name, states(name), joint, reasons, origin, where)
            checks.append(replace(check, not_built=not_built))
    return VerifyReport(str(folder), files, tuple(checks))


def _export(folder: Path, origins: bool) -> VerifyReport | None:
    """A check of the files that an export wrote; None of an artifact, and of what nobody recorded."""
    if os.path.lexists(folder / NAME) or not folder.is_dir():
        return None
    what, files = exported(folder), wrong_files(folder)
    if what is None or files is None:
        return None
    if origins:
        raise ArtifactError(
            f"Origins are recorded in artifacts, but {folder} is {what}; leave out `origins` to have its files "
            "compared with those that were written."
        )
    return VerifyReport(str(folder), files, what=str(what))


def _read_states(
    folder: Path, manifest: Manifest, names: Sequence[str]
) -> tuple[Callable[[str], LazyState], str]:
    """How to rebuild the state dict of any of some members, and what is wrong where that cannot be."""
    if not names:
        return lambda _: LazyState({}), ""
    try:
        stored = read_stored(folder, manifest, names)
    except SurgeryError as error:
        return lambda _: LazyState({}), str(error)
    return partial(lazy_state_of, stored), ""


def _check(
    manifest: Manifest,
    name: str,
    state: LazyState,
    joint: JointModel | None,
    reasons: list[str],
    origin: Member | None,
    where: str,
) -> MemberCheck:
    """Compare a member's state dict with the record, its module with that, and both with the origin."""
    found = content_hash(state)
    recorded_hash = manifest.members[name].hash or found  # without one, its files are the state dict
    rebuilt = found == recorded_hash
    if not rebuilt:
        reasons.append(
            f"its rebuilt state dict must have the content hash {recorded_hash[:12]}…, but has {found[:12]}…"
        )
    moved = 0.0 if joint is None else _farthest(collapsed(joint, name), state, relative=True)
    if moved > ROUNDING:
        reasons.append(f"its module must hold its state dict, but differs by {moved:.1e}")
    report = manifest.report or FitReport()
    recorded = report.error(name)
    if origin is None:
        return MemberCheck(name, not reasons, tuple(reasons), rebuilt, where, recorded_error=recorded)
    original = whole_state(origin.module)
    before = content_hash(original)
    where, changed = _compare_hash(manifest, name, before, found)
    error, not_compared = None, None
    if joint is not None and before == found and not moved and type(joint[name]) is type(origin.module):
        error = 0.0  # one class with one set of weights: no forward pass could tell
    elif joint is not None:
        error, wrong, not_compared = _compare_outputs(manifest, origin, joint[name])
        reasons += wrong
    if replaced := replacements_of(manifest, name):
        shapes = {key: each.shape for key, each in handles_of(state).items()}
        original, failed = _replaced_state(name, origin.module, replaced, shapes)
        reasons += failed if joint is not None else []
    reasons += changed + _compare_dtypes(original, state)
    distance = _farthest(original, state)
    return MemberCheck(
        name,
        not reasons,
        tuple(reasons),
        rebuilt,
        where,
        distance,
        error,
        recorded,
        not_compared=not_compared,
    )


def _replaced_state(
    name: str,
    module: nn.Module,
    replacements: Sequence[Replacement],
    shapes: dict[str, tuple[int, ...]],
) -> tuple[dict[str, Any], list[str]]:
    """The state of a copy of an origin's module with the recorded replacements made again, or why there is none.

    Args:
        name: of the member.
        module: of its origin.
        replacements: as the artifact records them.
        shapes: of its stored tensors, which bound what may stand in the places of modules.
    """
    module = duplicate(module)
    try:
        with bounded(f"member '{name}'", **by_file(shapes)):
            make_again(name, module, replacements)
    except SurgeryError as error:
        return {}, [str(error)]
    return whole_state(module), []


def load_recorded(
    manifest: Manifest, name: str, given: nn.Module | None, permission: Permission, wanted: bool
) -> tuple[Member | None, str]:
    """The member as it was before it was joined, or why it cannot be had."""
    origin = origin_of(manifest, name)
    if given is not None:
        return Member(name, given.eval(), inputs_of(manifest, name), origin), "given"
    if origin.kind == "module" or origin.reference == origin.architecture.rpartition(".")[2]:
        return None, "not compared: it was a live module"
    if not wanted and not ships(origin):
        return None, "not asked for"
    try:
        recorded = inputs_of(manifest, name)
        found = load_origin(_pinned(origin), name=name, permission=permission, inputs=recorded)
    except ConsentError:
        return None, "not compared: its code may not run"
    except SurgeryError as error:
        return None, f"not reached: {error}"
    hashes = (manifest.report or FitReport()).hashes
    unknown = found.origin.seed is not None and origin.seed is None  # written before seeds were recorded
    if unknown and content_hash(whole_state(found.module)) != hashes.get(name):
        return None, "not compared: its weights were drawn at random, from a seed that was not recorded"
    return found, "found"


def _load_member(
    folder: Path, manifest: Manifest, name: str, given: nn.Module | None, trust: bool
) -> tuple[JointModel | None, str | None, str | None]:
    """The member from the artifact, ready to run; what is wrong where it cannot be had, or why it was not built."""
    modules = None if given is None else {name: duplicate(given)}
    if given is None and origin_of(manifest, name).kind == "module":
        return None, None, "it was a live module, which Python passes as modules="
    try:
        return load(folder, modules=modules, members=[name], trust_remote_code=trust), None, None
    except ConsentError:  # no fault of the artifact's
        return None, None, "its code needs `trust_remote_code`"
    except SurgeryError as error:
        return None, f"it cannot be rebuilt: {error}", None


def _compare_hash(manifest: Manifest, name: str, found: str, rebuilt: str) -> tuple[str, list[str]]:
    """Whether an origin of this content hash is as recorded, and what is wrong with that."""
    recorded = (manifest.report or FitReport()).hashes.get(name)
    if recorded is None:
        return ("same" if found == rebuilt else "found"), []
    if found == recorded:
        return "same", []
    return "changed", [
        f"its origin must have the content hash {recorded[:12]}…, but has {found[:12]}…: it changed"
    ]


def _compare_dtypes(original: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    other = [
        f"{name} ({original[name].dtype} for {each.dtype})".replace("torch.", "")
        for name, each in handles_of(state).items()
        if isinstance(original.get(name), Tensor) and original[name].dtype != each.dtype
    ]
    return [f"its origin must have tensors of the same dtypes, but has {shorten(other, 3)}"] if other else []


def _compare_outputs(
    manifest: Manifest, origin: Member, module: nn.Module
) -> tuple[float | None, list[str], str | None]:
    """How far a member's outputs are from its origin's, what is wrong with that, and why it was not compared.

    Args:
        manifest: says what a fit measured, and on what.
        origin: the member as it was.
        module: of the member as it is.
    """
    name, report = origin.name, manifest.report or FitReport()
    recorded = report.error(name)
    origin, unknown = _with_recorded_inputs(manifest, origin)
    probes = probe_inputs(origin, seed=_seed(manifest, name))
    try:
        expected = outputs_over(origin.module, probes)
    except Exception as error:  # of a user's module, on inputs like those that were recorded
        return None, [], f"made-up inputs do not run in it: {one_line(error)}"
    try:
        moved = relative_error(expected, outputs_over(module, probes))
    except Exception as error:
        return None, [f"it must run where its origin runs, but raises {one_line(error)}"], None
    if recorded is None:
        return moved, [], None
    if name in report.given:
        return moved, [], "that was measured on inputs that were given to the fit and are not kept"
    if name not in report.hashes:
        return moved, [], "the fit did not begin from its origin"
    absolute, relative = SAME_ERROR
    if moved <= recorded * (1 + relative) + absolute:
        return moved, [], None
    differ = f"differ by {more_than(moved, recorded, 4)}"
    if unknown:
        return (
            moved,
            [],
            f"its {unknown} were not kept: on others they {differ} where {recorded:.4g} was recorded",
        )
    return (
        moved,
        [f"its outputs must stay within the recorded error {recorded:.4g}, but {differ}"],
        None,
    )


def _with_recorded_inputs(manifest: Manifest, origin: Member) -> tuple[Member, str]:
    """An origin with the inputs that a fit's probe inputs were made like, as far as they are recorded, and what of
    them is not, in words."""
    recorded = replace(origin, inputs=inputs_of(manifest, origin.name))
    if not (recorded.inputs.args or recorded.inputs.kwargs):
        return origin, "example inputs"
    if unknown := unknown_in_probes(recorded):
        return origin, f"example inputs {shorten(unknown)}"  # its own are as good a guess
    return recorded, ""


@torch.no_grad()
def _farthest(one: Mapping[str, Tensor], other: Mapping[str, Tensor], relative: bool = False) -> float:
    """The largest difference between two state dicts, infinite where they do not have the same tensors."""
    mine, theirs = handles_of(one), handles_of(other)
    if {name: each.shape for name, each in mine.items()} != {name: t.shape for name, t in theirs.items()}:
        return float("inf")
    apart = (_distance(each.read(), theirs[name].read(), relative) for name, each in mine.items())
    return max(apart, default=0.0)


def _distance(one: Tensor, other: Tensor, relative: bool) -> float:
    """The largest difference of two tensors; equal infinities and NaN in both differ by 0, one alone by infinity."""
    if not one.numel() or torch.equal(one, other):
        return 0.0
    wide = torch.complex128 if one.is_complex() or other.is_complex() else torch.float64
    one, other = one.to(wide), other.to(wide)
    apart = (one - other).abs()
    apart[(one == other) | (one.isnan() & other.isnan())] = 0
    found = float(apart.nan_to_num(nan=torch.inf, posinf=torch.inf).max())
    finite = one[one.isfinite()].abs()
    scale = float(finite.max()) if relative and finite.numel() else 1.0
    return found / (scale or 1.0)


def _files_of(manifest: Manifest, name: str) -> list[str]:
    """Files that a member is read from."""
    lenders = {key.member for key in manifest.same_of(name).values()}
    folders = {manifest.folder_of(each) for each in (name, *lenders)} | {str(Path(TOGETHER).parent)}
    tensors = [path for path in manifest.files if path.endswith(".safetensors")]
    mine = [path for path in tensors if path.startswith("dictionary") or path.rpartition("/")[0] in folders]
    return [*mine, *small_files(manifest, name).values()]


def _pinned(origin: Origin) -> Origin:
    """The origin, its reference with the recorded commit where it is a hub id without one."""
    hub = (
        origin.kind == "transformers" and origin.revision and not Path(origin.reference).expanduser().exists()
    )
    head, mark, options = origin.reference.partition("?")
    if not hub or "@" in head:
        return origin
    return replace(origin, reference=f"{head}@{origin.revision}{mark}{options}")


def _seed(manifest: Manifest, member: str) -> int:
    seed = (manifest.report or FitReport()).probes_of(member).seed
    return manifest.seed or 0 if seed is None else seed
