"""What an export would write: what becomes of every tensor and how many bytes it takes, before anything is written."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from surgery.artifact.export import Format, check_member, check_settings, export, hardened, one
from surgery.artifact.exportcard import make_export_card
from surgery.artifact.formats.checkpoint import architecture, checkpoint_names
from surgery.artifact.formats.compressed_tensors import METHOD, Packing, in_short, plan_packing
from surgery.core.joint import JointModel
from surgery.errors import ExportError
from surgery.members.member import Member
from surgery.members.origins.licences import CARD
from surgery.safetensors.reading import tensors_in_file
from surgery.storage.states import lazy_state_of
from surgery.storage.stored import Stored
from surgery.storage.trim import trim
from surgery.util.devices import cpu_by_default
from surgery.util.showing import as_html, as_text, plural
from surgery.util.wording import size

AS_IT_IS = "as it is"


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of an export.

    Attributes:
        name: as it is written.
        shape: of what it stands for.
        dtype: of that.
        stored: how the artifact holds it: a precision, or what generates it.
        becomes: what it is written as.
        nbytes: that it takes.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    stored: str
    becomes: str
    nbytes: int


@dataclass(frozen=True, repr=False)
class ExportPlan:
    """What an export would write.

    Attributes:
        member: that is exported.
        format: of the export.
        tensors: all that are written, by name.
        files: small files that come along, bytes by path.
        notes: what else there is to say, such as the error of an adapter.
    """

    member: str
    format: str
    tensors: tuple[PlannedTensor, ...]
    files: Mapping[str, int]
    notes: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, headers of files not counted."""
        return sum(each.nbytes for each in self.tensors)

    def lines(self) -> list[str]:
        """Tensors by what becomes of them, for people, then everything else."""
        found: dict[str, list[PlannedTensor]] = {}
        for each in self.tensors:
            found.setdefault(each.becomes, []).append(each)
        return [
            f"{becomes} ({plural(len(mine), 'tensor')}, {size(sum(each.nbytes for each in mine))}): "
            f"{', '.join(in_short(each.name for each in mine))}"
            for becomes, mine in found.items()
        ] + [*self.notes, f"with {', '.join(self.files)}" if self.files else "without small files"]

    def to_json(self) -> dict[str, Any]:
        """All of it as plain JSON values."""
        tensors = [{**asdict(each), "shape": list(each.shape)} for each in self.tensors]
        return {
            "member": self.member, "format": self.format, "nbytes": self.nbytes, "tensors": tensors,
            "files": dict(self.files), "notes": list(self.notes),
        }  # fmt: skip

    def __repr__(self) -> str:
        return as_text(self._title(), self.lines())

    def _repr_html_(self) -> str:
        rows = [
            [each.name, str([*each.shape]), each.stored, each.becomes, size(each.nbytes)]
            for each in self.tensors
        ]
        return as_html(self._title(), ("tensor", "shape", "stored", "becomes", "bytes"), rows)

    def _title(self) -> str:
        return f"ExportPlan of {self.member}, {self.format}: tensors of {size(self.nbytes)}"


@cpu_by_default()
def plan_export(
    source: str | Path | JointModel,
    member: str,
    *,
    format: Format = "plain",
    harden: bool = False,
    tie_widths: bool = False,
    base: str | None = None,
    max_error: float | None = None,
    calibrate: Sequence[str | Path] = (),
    trust_remote_code: bool = False,
) -> ExportPlan:
    """What `export` would write with the same settings; nothing is written.

    An adapter is made to be measured, in a temporary folder.

    Args:
        source: an artifact, or a joint model.
        member: its name.
        format: as of `export`.
        harden: as of `export`.
        tie_widths: as of `export`.
        base: as of `export`.
        max_error: as of `export`.
        calibrate: as of `export`.
        trust_remote_code: as of `export`.

    Raises:
        PlanError: where there is no such member or format.
        ArtifactError: where the artifact is damaged.
        ExportError: where the format is not one for the member.

    Example:
        >>> import surgery
        >>> print(surgery.plan_export("joint", "text"))
        ExportPlan of text, plain: tensors of ...
          ...
    """
    check_settings(source, format, tie_widths, base, max_error, calibrate)
    check_member(source, member, format, base)
    if format == "lora":
        return _of_adapter(source, member, base, max_error, calibrate, trust_remote_code)
    if harden:
        source = hardened(source, member, trust_remote_code)
    stored, described, report = one(source, member)
    files = {name: len(content) for name, content in sorted(described.files.items())}
    lines: list[str] = []
    if format == METHOD:
        packing, module = plan_packing(stored, described, tie_widths, trust_remote_code)
        tensors, lines = _packed(stored, described, packing, module), packing.lines()
    elif format == "plain":
        tensors = _decoded(stored, described)
    else:
        if format == "transformers":
            architecture(described, stored, format, trust_remote_code)
        tensors = _coded(trim(stored), described)
    if format != "compressed":
        nbytes = sum(each.nbytes for each in tensors)
        files[CARD] = len(make_export_card(described, format, report, nbytes, lines).encode())
    return ExportPlan(member, format, tuple(sorted(tensors, key=lambda each: each.name)), files)


def _decoded(stored: Stored, member: Member) -> list[PlannedTensor]:
    """Ordinary tensors, one for all names that are tied."""
    if member.replaced:
        raise ExportError(
            f"What an export of '{member.name}' writes is known when its replaced modules are ordinary ones again; "
            "export it, which says what is wrong before it writes anything."
        )
    found: list[PlannedTensor] = []
    for name, how, shape, dtype, nbytes in _state(stored, member):
        becomes = AS_IT_IS if how == "native" else f"decoded, {dtype}"
        becomes = f"generated, {dtype}" if how == GENERATED else becomes
        found.append(PlannedTensor(name, shape, dtype, how, becomes, nbytes))
    return found


def _coded(stored: Stored, member: Member) -> list[PlannedTensor]:
    """Tensors as they are stored, and what banks hold."""
    plain, found = stored.plain(member.name), []
    for name, how, shape, dtype, _ in _state(stored, member):
        if how == GENERATED:
            found.append(PlannedTensor(name, shape, dtype, how, "generated from the rows below", 0))
        else:
            becomes = AS_IT_IS if how == "native" else f"codes, {plain[name].precision.shown}"
            found.append(PlannedTensor(name, shape, dtype, how, becomes, plain[name].nbytes))
    for bank in stored.plan.banks:
        for part, each in stored.parts(bank.key).items():
            name, dtype = f"{bank.key}/{part}", str(each.dtype).removeprefix("torch.")
            how = str(each.precision)
            found.append(PlannedTensor(name, each.shape, dtype, how, "rows and codes of banks", each.nbytes))
    return found


def _packed(stored: Stored, member: Member, packing: Packing, module: Any) -> list[PlannedTensor]:
    """Linear layers as packed integers, everything else as it is."""
    kept, found = {*checkpoint_names(module)}, []
    for name, how, shape, dtype, nbytes in _state(stored, member):
        if name not in kept:
            continue
        packed = packing.packed.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        becomes = f"packed, {packed.bits} bits, a scale for {packed.group} values" if packed else AS_IT_IS
        if reason := packing.plain.get(name):
            becomes = f"{AS_IT_IS}, {reason}"
        found.append(PlannedTensor(name, shape, dtype, how, becomes, packing.sizes.get(name, nbytes)))
    return found


GENERATED = "generated"


def _state(stored: Stored, member: Member) -> list[tuple[str, str, tuple[int, ...], str, int]]:
    """Name, stored form, shape, dtype and bytes of a member's tensors, one of those that are tied."""
    plain, ties = stored.plain(member.name), stored.ties.get(member.name, {})
    sites = {p.site.name: p.site.owners for p in stored.plan.of(member.name)}
    again = {name for first, names in {**ties, **sites}.items() for name in names if name != first}
    return [
        (
            name,
            str(plain[name].precision) if name in plain else GENERATED,
            handle.shape,
            str(handle.dtype).removeprefix("torch."),
            handle.nbytes,
        )
        for name, handle in lazy_state_of(stored, member.name).handles.items()
        if name not in again
    ]


def _of_adapter(
    source: str | Path | JointModel,
    member: str,
    base: str | None,
    max_error: float | None,
    calibrate: Sequence[str | Path],
    trust: bool,
) -> ExportPlan:
    """An adapter as it was written somewhere else: its ranks and its error follow from measurements."""
    notes: list[str] = []
    with tempfile.TemporaryDirectory() as place:
        folder = export(
            source, member, Path(place) / "adapter", format="lora", base=base, max_error=max_error,
            calibrate=calibrate, trust_remote_code=trust, say=notes.append,
        )  # fmt: skip
        written = tensors_in_file(folder / "adapter_model.safetensors")
        files = {
            path.name: path.stat().st_size
            for path in sorted(folder.iterdir())
            if path.suffix != ".safetensors" and not path.name.startswith(".")
        }
    tensors = []
    for name, each in written.items():
        becomes = "a product's factor or bias" if ".lora_" in name else "saved whole"
        becomes = "rows of a table" if ".token_adapter." in name else becomes
        dtype = str(each.dtype).removeprefix("torch.")
        tensors.append(PlannedTensor(name, each.shape, dtype, "", becomes, each.nbytes))
    return ExportPlan(member, "lora", tuple(tensors), files, tuple(notes))
