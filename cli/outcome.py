"""Shows the outcome of a merge or of a training run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.disk.files import bytes_below
from surgery.errors import first_few

from . import console

if TYPE_CHECKING:
    from surgery.core.joint import JointModel
    from surgery.fitting.report import FitReport

PRECISION = "fewer bits for each number: rounding, not sharing"
SHARING = "what members or layers have in common, stored once"
ROWS = 24  # members listed one by one
Scores = Mapping[str, Mapping[str, Any] | None]
REAL_INPUTS = "Real inputs can move outputs twice as far: give yours with --calibrate."
REPLACING = "modules of members in whose places others stand"
LARGER = "what stands in the places of modules takes more than they did"
NO_SHARING = "nothing that these members have in common pays for its index"


def result_json(joint: JointModel, folder: Path) -> dict[str, Any]:
    """The outcome of a merge as plain JSON values."""
    report = fit_report(joint)
    return {
        "out": str(folder),
        "disk_bytes": bytes_below(folder),
        "members": outcome_rows(joint),
        "report": report.to_json(),
        "warning": report.faint,
    }


def fit_report(joint: JointModel) -> FitReport:
    """What a fit met whose weights are as it made them."""
    from surgery.fitting.report import FitReport

    assert isinstance(joint.report, FitReport)
    return joint.report


def outcome_rows(joint: JointModel) -> list[dict[str, Any]]:
    """For each member its size before and after, and how far its output moved."""
    report = fit_report(joint)
    return [
        {
            "name": name,
            "parameters": report.parameters[name],
            "sites": sum(p.site.member == name for p in joint.plan.placements),
            "bytes_before": report.original_bytes[name],
            "bytes_after": sum(row.nbytes for row in report.detail if row.member == name),
            "output_error": report.error(name),
        }
        for name in joint.names
    ]


def print_result(joint: JointModel, folder: Path, *, verbose: bool, advise: bool = True) -> None:
    """What a merge did: members, what saved how much, how tensors are stored.

    Args:
        joint: as it was fitted.
        folder: that it was written to.
        verbose: whether every tensor is listed.
        advise: whether real inputs could be given and are asked for.
    """
    report = fit_report(joint)
    before, weights = sum(report.original_bytes.values()), report.stored_bytes
    disk = bytes_below(folder)
    members = "1 member" if len(joint.names) == 1 else f"{len(joint.names)} members"
    console.heading(f"{folder}: {members}, {console.size(disk)} on disk")
    console.say(
        f"Weights {console.size(weights)}, {console.percent(weights / before)} of the {console.size(before)} "
        f"that they take apart; tokenizers, configurations and records {console.size(disk - weights)}."
    )
    table = console.table("member", ">parameters", ">before", ">after", ">output moved by")
    for row in outcome_rows(joint):
        table.add_row(
            row["name"],
            console.count(row["parameters"]),
            console.size(row["bytes_before"]),
            console.size(row["bytes_after"]),
            console.percent(row["output_error"], digits=2),
        )
    console.show(table)
    given = report.given
    inputs = f"real inputs for {', '.join(given)}, made-up ones for the rest" if given else "made-up inputs"
    if set(given) == set(joint.names):
        inputs = "the real inputs given"
    console.say(
        f"Target {report.target}: {'met' if report.met else 'NOT met'}, measured on {inputs}.{hint(report) * advise}"
    )
    print_means(joint)
    _print_stacks(joint)
    if verbose:
        rows = console.table("member", "tensor", "~stored as", ">before", ">after")
        for each in report.detail:
            rows.add_row(
                each.member, each.name, each.how, console.size(each.original), console.size(each.nbytes)
            )
        console.show(rows)


def hint(report: FitReport) -> str:
    """What to do where a member's error was measured on made-up inputs; empty where all were measured on real ones."""
    moved = any((report.error(name) or 0) > 0 for name in report.errors if name not in report.given)
    return " " + REAL_INPUTS if moved else ""


def _print_stacks(joint: JointModel) -> None:
    """What each stack's layers are made of, and what that takes."""
    from surgery.fitting.report import StackReport

    table = console.table("stack", ">layers", ">made of", ">before", ">after", "~")
    for name, stack in fit_report(joint).stacks.items():
        if isinstance(stack, StackReport):
            sizes = console.size(stack.original), console.size(stack.nbytes)
            table.add_row(name, str(stack.layers), stack.made_of, *sizes, stack.note)
    if table.row_count:
        console.show(table)


def print_means(joint: JointModel) -> None:
    """What each means saved, and how many tensors are stored in which way."""
    report = fit_report(joint)
    saved = console.table("saved by", ">bytes", "~")
    sharing, precision = report.saved["sharing"], report.saved["precision"]
    saved.add_row("precision", console.size(precision), PRECISION)
    saved.add_row("sharing", console.size(sharing), SHARING if sharing else NO_SHARING)
    if "replacing" in report.saved:
        replacing = report.saved["replacing"]
        saved.add_row("replacing", console.size(replacing), REPLACING if replacing >= 0 else LARGER)
    console.show(saved)
    ways: dict[str, list[int]] = {}
    for each in report.detail:
        way = ways.setdefault(each.how, [0, 0, 0])
        for place, amount in enumerate((1, each.original, each.nbytes)):
            way[place] += amount
    table = console.table("stored as", ">tensors", ">before", ">after", "~")
    for how, (tensors, original, stored) in sorted(ways.items(), key=lambda item: -item[1][1]):
        note = "left alone" if how == "native" else ""
        table.add_row(how, str(tensors), console.size(original), console.size(stored), note)
    console.show(table)


def print_next(joint: JointModel, folder: Path, trust: bool = False) -> None:
    """The commands that are likely to come next."""
    from surgery.pipeline.train import is_foreign

    name = joint.names[0]
    consent = ["--trust-remote-code"] * trust
    own = any(is_foreign(member.origin) for member in joint.members.values())
    console.heading("Next")
    console.command("surgery", "verify", folder, "--origins", *(["--trust-remote-code"] if own else consent))
    console.command(
        "surgery", "export", folder, "--member", name, "--format", "plain", "--out", f"{name}-plain", *consent
    )


def score_cells(score: Mapping[str, Any] | None) -> list[str]:
    """A task's loss and metric as a table shows them, from a score as JSON."""
    found = score or {}
    loss, metric, name = (found.get(key) for key in ("loss", "metric", "measure"))
    return [
        "-" if loss is None else f"{loss:.4g}",
        "-" if metric is None else f"{metric:.4g} {name or ''}".strip(),
    ]


def print_scores(first: Scores, kept: Scores, tests: Scores) -> None:
    """Loss and metric of every task: of the first validation, of the state that was kept, and on test data."""
    table = console.table("task", "measure", ">first validation", ">kept", ">test")
    for name in dict.fromkeys([*kept, *tests]):
        scores = [part.get(name) or {} for part in (first, kept, tests)]
        measure = next((score["measure"] for score in scores if score.get("measure")), None)
        rows = [(name, "loss", "loss"), ("", measure or "metric", "metric")]
        for title, words, key in rows:
            values = [score.get(key) for score in scores]
            if any(value is not None for value in values):
                table.add_row(title, words, *("-" if value is None else f"{value:.4g}" for value in values))
    if table.row_count:
        console.show(table)


def print_sizes(sizes: Mapping[str, Mapping[str, Mapping[str, int]]]) -> None:
    """Members alone, in the joint model as it began, and as it is: parameters and bytes."""
    from surgery.training.report.comparison import total

    if not sizes:
        return
    table = console.table("member", "", ">alone", ">start", ">joint", ">of alone")

    def add(name: str, of: str, amounts: Sequence[int], style: str | None = None) -> None:
        words = console.count if of == "parameters" else console.size
        share = console.percent(amounts[2] / amounts[0]) if amounts[0] else "-"
        table.add_row(name, of, *map(words, amounts), share, style=style)

    states = ("alone", "start", "joint")
    names = list(sizes["alone"])
    for name in names[:ROWS]:
        for title, of in ((name, "parameters"), ("", "bytes")):
            add(title, of, [sizes[state][name][of] for state in states])
    if len(names) > ROWS:
        table.add_row(first_few(names, ROWS)[-1], *[""] * 5)
    if len(names) > 1:
        for title, of in (("together", "parameters"), ("", "bytes")):
            add(title, of, [total(sizes[state], of) for state in states], "bold")
    console.show(table)


def adapted_words(adapted: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What was adapted, a sentence for each task, from a report as JSON."""
    return [
        f"{name} adapted by {' and '.join(facts['by'])}, without labels: the features that reach '{facts['part']}', to "
        f"those of {facts['examples']} examples of {facts.get('source', 'the source')}."
        for name, facts in adapted.items()
    ]
