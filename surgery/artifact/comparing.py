"""Compares a member of an artifact with its record and with its origin: hashes, dtypes, weights and outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from surgery.artifact.manifest import Manifest
from surgery.artifact.recorded import inputs_of, replacements_of
from surgery.core.joint import JointModel
from surgery.core.replacing import make_again
from surgery.errors import SurgeryError
from surgery.fitting.report import FitReport
from surgery.handles.state import LazyState, handles_of
from surgery.inputs.probes import outputs_over, probe_inputs, relative_error, unknown_in_probes
from surgery.members.member import Member, content_hash, whole_state
from surgery.members.origins.bounded import bounded, by_file
from surgery.members.replacement import Replacement
from surgery.slots.collapse import collapsed
from surgery.util.copies import duplicate
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


def compare(
    manifest: Manifest,
    name: str,
    state: LazyState,
    joint: JointModel | None,
    reasons: list[str],
    origin: Member | None,
    where: str,
) -> MemberCheck:
    """Compare a member's state dict with the record, its module with that, and both with the origin.

    Args:
        manifest: of the artifact.
        name: of the member.
        state: as it was rebuilt from the files.
        joint: the member as a load gives it; None where it was not built.
        reasons: what is wrong already, in sentences.
        origin: the member as it was before it was joined; None where it cannot be had.
        where: why that is so, or where it came from.
    """
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


def _seed(manifest: Manifest, member: str) -> int:
    seed = (manifest.report or FitReport()).probes_of(member).seed
    return manifest.seed or 0 if seed is None else seed
