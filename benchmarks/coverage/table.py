"""Table: a CSV of rows as a Markdown page: totals, failures by name, then every model."""

from __future__ import annotations

import datetime
import math
import os
import statistics
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from benchmarks.coverage.row import LIBRARIES, Row


def page(rows: Sequence[Row], command: str) -> str:
    """The whole page."""
    tried = [library for library in LIBRARIES if any(row.library == library for row in rows)]
    parts = [
        "# Coverage",
        "",
        "Each architecture with random weights, one model for each distinct implementation: traced, joined, run, "
        "and collapsed. *Exact* means that a graph was recorded, that the joined model's outputs are the original "
        "ones bit for bit, and that the collapsed state dict is the original one bit for bit. Shares are of the "
        "parameters, by count. Example inputs are those that `surgery` makes up by itself (torchvision's are "
        "given, since its models do not tell). transformers' default configurations are shrunk.",
        "",
        f"Written by `{command}` on {datetime.date.today().isoformat()}, {os.cpu_count()} cores, one thread a "
        f"model; {_versions()}.",
        "",
        *_totals([row for row in rows], tried),
    ]
    for library in tried:
        own = sorted((r for r in rows if r.library == library), key=lambda r: r.model)
        parts += ["", f"## {library}", "", *_failures(own), *_skipped(own), *_models(own)]
    return "\n".join(parts) + "\n"


def totals(rows: Sequence[Row]) -> dict[str, float | int | str]:
    """The figures of one library."""
    real = [row for row in rows if row.status != "absent"]
    built = [row for row in real if not row.cause.startswith("build:")]
    traced = [row for row in built if row.traced]
    seconds = sorted(row.seconds for row in built if row.tier)
    numbers = sum(row.parameters for row in traced)
    accounted = sum(row.parameters * (row.sites + row.private) for row in traced)
    return {
        "tried": len(real),
        "built": len(built),
        "traced": len(traced),
        "exact": sum(row.status == "exact" for row in built),
        "accounted": accounted / numbers if numbers else 0.0,
        "least": min((row.sites + row.private for row in traced), default=0.0),
        "median": statistics.median(seconds) if seconds else 0.0,
        "p95": seconds[math.ceil(0.95 * len(seconds)) - 1] if seconds else 0.0,
    }


def _totals(rows: Sequence[Row], libraries: Sequence[str]) -> list[str]:
    lines = [
        "| library | models | built | traced to a graph | exact | parameters that are site or private "
        "(of all; least of any model) | trace, median | 95% |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for library in libraries:
        t = totals([row for row in rows if row.library == library])
        built = max(int(t["built"]), 1)
        lines.append(
            f"| {library} | {t['tried']} | {t['built']} | {t['traced']} ({int(t['traced']) / built:.1%}) | "
            f"{t['exact']} ({int(t['exact']) / built:.1%}) | {t['accounted']:.2%}; {t['least']:.1%} | "
            f"{t['median']:.2f} s | {t['p95']:.1f} s |"
        )
    return lines


def _failures(rows: Sequence[Row]) -> list[str]:
    failed = [row for row in rows if row.status == "failed"]
    absent = [row for row in rows if row.status == "absent"]
    lines = [f"- `{row.model}` ({row.implementation or '?'}): {_cell(row.cause)}" for row in failed]
    lines = ["Failures:" if failed else "No failures.", "", *lines] if failed else ["No failures."]
    if absent:
        causes = Counter(row.cause.partition(":")[2].strip().partition(":")[2].strip() for row in absent)
        for cause, count in causes.most_common():
            names = [row.model for row in absent if row.cause.endswith(cause)]
            shown = ", ".join(f"`{name}`" for name in names)
            lines += ["", f"Not counted, {_cell(cause)} ({count}): {shown}"]
    return [*lines, ""]


def _skipped(rows: Sequence[Row]) -> list[str]:
    """Models of which more than a hundredth is neither site nor private."""
    most = sorted((r for r in rows if r.traced and r.skipped > 0.01), key=lambda r: -r.skipped)
    if not most:
        return []
    lines = [f"- `{row.model}` {row.skipped:.1%}: {_cell(row.why_skipped)}" for row in most]
    return ["More than 1% of the parameters neither site nor private:", "", *lines, ""]


def _models(rows: Sequence[Row]) -> list[str]:
    tiers = Counter(row.tier for row in rows if row.tier)
    lines = ["Tiers: " + ", ".join(f"{tier} {count}" for tier, count in tiers.most_common()) + ".", ""]
    lines += [
        "<details><summary>Every model</summary>",
        "",
        "| model | class | parameters | tier | seconds | sites | private | skipped | outputs | state |",
        "| --- | --- | ---: | --- | ---: | ---: | ---: | ---: | --- | --- |",
    ]
    for row in rows:
        if row.status == "absent":
            continue
        lines.append(
            f"| {row.model} | {row.implementation} | {row.parameters / 1e6:.2f} M | {row.tier} | {row.seconds:.2f} | "
            f"{row.sites:.1%} | {row.private:.1%} | {row.skipped:.1%} | {row.outputs} | {row.state} |"
        )
    return [*lines, "", "</details>"]


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "/").split())[:240]


def _versions() -> str:
    found = []
    for library in ("torch", *LIBRARIES):
        try:
            found.append(f"{library} {version(library).partition('+')[0]}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)
