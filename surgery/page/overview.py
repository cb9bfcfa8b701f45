"""Gathers what a page shows from an artifact, a run's log, or both."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgery.artifact.exported import exported, not_an_artifact, parts_of_artifact
from surgery.artifact.manifest import NAME as MANIFEST
from surgery.artifact.manifest import Manifest, read_manifest
from surgery.artifact.reading import decoded_from, read_stored
from surgery.artifact.recorded import alone_of, bytes_before
from surgery.artifact.shares import Shares, count_shares
from surgery.core.sizes import TensorReport, count_tensors, how_stored
from surgery.disk.untrusted import shown_text
from surgery.errors import ArtifactError, TrainingError
from surgery.fitting.report import FitReport
from surgery.members.replacement import count_replaced
from surgery.storage.stored import Stored
from surgery.training.report.log_lines import by_event
from surgery.training.report.runlog import find_log, first_validation, read_log

Line = dict[str, Any]


@dataclass(frozen=True)
class Layer:
    """One tensor of two or more axes in a member: how it is stored and with how many bits for each value."""

    name: str
    how: str
    bits: float
    nbytes: int


@dataclass(frozen=True)
class MemberView:
    """One member on a page.

    Attributes:
        name: of the member.
        origin: reference and architecture.
        parameters: alone, None where they were not recorded.
        before: bytes alone.
        after: bytes in the folder.
        kinds: bytes in the folder by how they are stored.
        error: of its output, None where it was not measured.
        layers: its matrices by name.
        replaced: modules in whose places others stand, by path with the method.
    """

    name: str
    origin: str
    parameters: int | None
    before: int
    after: int
    kinds: Mapping[str, int]
    error: float | None
    layers: tuple[Layer, ...] = ()
    replaced: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """A training run on a page, from its log.

    Attributes:
        start: the log's first line.
        generations: a line for each.
        end: the last line, None while the run goes on.
        first: scores of each task's first validation, as JSON.
    """

    start: Line
    generations: tuple[Line, ...]
    end: Line | None
    first: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Overview:
    """What a page tells.

    Attributes:
        title: the folder's name.
        members: of an artifact, else empty.
        shares: who shares what, None without an artifact.
        ways: number of tensors, bytes before and after, by how tensors are stored.
        report: of the fit, as the manifest has it.
        versions: of libraries that wrote it.
        run: the training run, None where there is none.
    """

    title: str
    members: tuple[MemberView, ...] = ()
    shares: Shares | None = None
    ways: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)
    report: FitReport = field(default_factory=FitReport)
    versions: Mapping[str, str] = field(default_factory=dict)
    run: Run | None = None


def look(source: str | Path) -> Overview:
    """Gather what there is of an artifact, of a run that became one, or of a run that still goes on.

    Raises:
        ArtifactError: where the folder is damaged, or holds neither.
        TrainingError: where a log cannot be read.
    """
    folder = Path(source).expanduser()
    run = _run(folder)
    if not (folder / MANIFEST).is_file():
        if run is None and folder.is_dir() and (parts_of_artifact(folder) or exported(folder) is not None):
            raise ArtifactError(not_an_artifact(folder, MANIFEST))
        if run is None:
            raise ArtifactError(
                f"{source} must be a folder that surgery merge or surgery train wrote or is writing, but there is "
                f"neither a {MANIFEST} nor a log of a run in it."
            )
        return Overview(folder.name, run=run)
    manifest = read_manifest(folder)
    stored = read_stored(folder, manifest, list(manifest.members))
    with decoded_from(folder, manifest):
        shares, rows = count_shares(stored, bytes_before(manifest)), count_tensors(stored)
    report = manifest.report or FitReport()
    return Overview(
        folder.resolve().name,
        tuple(_member(name, manifest, stored, shares, rows, report, run) for name in manifest.members),
        shares,
        _ways(stored, rows),
        report,
        manifest.versions,
        run,
    )


def _run(folder: Path) -> Run | None:
    try:
        log = find_log(folder)
    except TrainingError:
        return None
    lines = read_log(log)
    logged = by_event(lines)
    if logged.start is None:
        return None
    return Run(logged.start, tuple(logged.generations), logged.end, first_validation(lines))


def _member(
    name: str,
    manifest: Manifest,
    stored: Stored,
    shares: Shares,
    rows: tuple[TensorReport, ...],
    report: FitReport,
    run: Run | None,
) -> MemberView:
    origin = manifest.members[manifest.members[name].like or name].origin
    assert origin is not None  # the manifest was validated
    trained = ((run.start.get("sizes") if run else None) or {}).get("alone", {}).get(name, {})
    alone = alone_of(manifest, name)
    recorded = alone.parameters if alone else report.parameters.get(name, trained.get("parameters"))
    named = (
        origin.reference
        if origin.reference == origin.architecture
        else f"{origin.reference} ({origin.architecture})"
    )
    replaced = {shown_text(each.path): each.method for each in manifest.members[name].replacements}
    named += f", {count_replaced(list(replaced.values()))}" if replaced else ""
    return MemberView(
        name, named, recorded, shares.before[name], shares.after[name], shares.kinds[name],
        report.error(name), _layers(name, stored, rows), replaced,
    )  # fmt: skip


def _layers(member: str, stored: Stored, rows: tuple[TensorReport, ...]) -> tuple[Layer, ...]:
    """A member's tensors of two or more axes, in the order of their names with numbers as numbers."""
    shapes = {p.site.name: p.site.shape for p in stored.plan.of(member)}
    shapes |= {name: each.shape for name, each in stored.plain(member).items()}
    found = [
        Layer(row.name, row.how, row.nbytes * 8 / math.prod(shapes[row.name]), row.nbytes)
        for row in rows
        if row.member == member and len(shapes[row.name]) > 1 and math.prod(shapes[row.name])
    ]
    return tuple(sorted(found, key=lambda layer: _natural(layer.name)))


def _ways(stored: Stored, rows: tuple[TensorReport, ...]) -> dict[str, tuple[int, int, int]]:
    generated = {how_stored(bank.method) for bank in stored.plan.banks}
    ways: dict[str, tuple[int, int, int]] = {}
    for row in rows:
        tensors, before, after = ways.get(row.how, (0, 0, 0))
        ways[row.how] = (tensors + 1, before + row.original, after + row.nbytes)
    return dict(sorted(ways.items(), key=lambda item: (item[0] not in generated, -item[1][1])))


def _natural(name: str) -> list[tuple[int, int, str]]:
    return [(1, int(part), "") if part.isdecimal() else (0, 0, part) for part in re.split(r"(\d+)", name)]
