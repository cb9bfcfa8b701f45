"""How a plan and the outcome of a merge are shown."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import console

if TYPE_CHECKING:
    from surgery.joint import JointModel
    from surgery.merging import Prepared
    from surgery.plan import BankPlan, Plan
    from surgery.recipe import Recipe

PRECISION = "fewer bits for each number: rounding, not sharing"
SHARING = "what members or layers have in common, stored once"
KEPT_APART = "as many templates as layers: fewer do not pay here"
NO_SHARING = "nothing that these members have in common pays for its index"


def plan_json(prepared: Prepared) -> dict[str, Any]:
    """A plan as plain JSON values."""
    plan, recipe = prepared.plan, prepared.recipe
    return {
        "recipe": recipe.resolved(),
        "out": recipe.out,
        "members": member_rows(prepared),
        "banks": [
            {
                "key": b.key,
                "block": list(b.block),
                "dtype": b.dtype,
                "locations": b.locations,
                "stack": b.stack or None,
            }
            for b in plan.banks
        ],
        "sites": [
            {
                "member": p.site.member,
                "name": p.site.name,
                "kind": p.site.kind,
                "shape": list(p.site.shape),
                "stack_out_in": list(p.site.view.shape),
                "bank": p.bank,
                "locations": p.grid.locations,
            }
            for p in plan.placements
        ],
        "left_alone": [
            {"member": each.member, "name": each.name, "role": each.role, "reason": each.reason}
            for each in plan.left_alone
        ],
    }


def member_rows(prepared: Prepared) -> list[dict[str, Any]]:
    """For each member its size, and how much of it is sites."""
    from surgery.member import owners_of

    rows = []
    for member in prepared.members:
        state = member.module.state_dict()
        tensors = [state[first] for first in owners_of(member.module)]
        placed = prepared.plan.of(member.name)
        rows.append(
            {
                "name": member.name,
                "reference": member.origin.reference,
                "architecture": member.origin.architecture,
                "parameters": sum(tensor.numel() for tensor in tensors),
                "bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors),
                "sites": len(placed),
                "site_parameters": sum(state[p.site.name].numel() for p in placed),
                "locations": sum(p.grid.locations for p in placed),
                "tensors_left_alone": sum(each.member == member.name for each in prepared.plan.left_alone),
                "real_inputs": member.name in prepared.probes,
            }
        )
    return rows


def print_plan(prepared: Prepared, *, verbose: bool) -> None:
    """What would be done."""
    recipe, plan = prepared.recipe, prepared.plan
    rows = member_rows(prepared)
    table = console.table(
        "member", ">parameters", ">size", ">sites", ">in sites", ">locations", "~architecture"
    )
    for row in rows:
        table.add_row(
            row["name"],
            console.count(row["parameters"]),
            console.size(row["bytes"]),
            str(row["sites"]),
            console.percent(row["site_parameters"] / (row["parameters"] or 1)),
            f"{row['locations']:,}",
            console.clipped(row["architecture"]),
        )
    console.heading("Plan (a dry run: nothing is written)")
    console.out.print(table)
    _print_stacks(plan)
    banks = console.table("bank", "block", "numbers", ">locations", ">size as it is")
    for bank in plan.banks:
        if not bank.stack:
            banks.add_row(
                bank.key,
                console.shape(bank.block),
                bank.dtype,
                f"{bank.locations:,}",
                console.size(_size(bank)),
            )
    if banks.row_count:
        console.out.print(banks)
    if recipe.train is None:
        _say_fit(prepared, rows)
    else:
        _say_training(recipe)
    console.say(
        f"Output folder {recipe.out}: can be written." if recipe.out else "No output folder was given."
    )
    if verbose:
        sites = console.table("member", "site", "kind", "~stack x out x in", ">locations")
        for p in plan.placements:
            view = console.shape(p.site.view.shape)
            sites.add_row(p.site.member, p.site.name, p.site.kind, view, f"{p.grid.locations:,}")
        console.out.print(sites)


def _say_fit(prepared: Prepared, rows: list[dict[str, Any]]) -> None:
    """The target of a merge, and what errors would be measured on."""
    recipe = prepared.recipe
    name, value = recipe.target
    chosen = "as given" if recipe.parameters.block else "chosen by the fit where rows are shared"
    words = f"{name.replace('_', '-')} {value:g}"
    if recipe.method == "templates":
        chosen = f"{chosen}, mixtures {recipe.parameters.mixture}"
        if name == "templates":
            chosen = f"outside stacks left as they are, mixtures {recipe.parameters.mixture}"
        elif recipe.parameters.templates:
            words += f" with {recipe.parameters.templates} templates for each stack"
        else:
            words += ", which decides the number of templates too"
    real = [row["name"] for row in rows if row["real_inputs"]]
    console.say(f"Would be fitted: {words}, blocks {chosen}, seed {recipe.seed}.")
    console.say(
        f"Errors would be measured on {'real inputs for ' + ', '.join(real) if real else 'made-up inputs'}."
    )


def _say_training(recipe: Recipe) -> None:
    """The tasks of a training run, and how long it would be."""
    assert recipe.train is not None
    table = console.table("task of", "~data", ">batch", "loss", "metric", ">weight")
    for model in recipe.models:
        for task in model.tasks:
            loss = (
                task.loss
                if isinstance(task.loss, str)
                else " + ".join(f"{w:g} {n}" for n, w in task.loss.items())
            )
            cells = (model.name or "", console.clipped(task.data), str(task.batch), loss)
            table.add_row(*cells, task.metric or "-", f"{task.weight:g}")
    if table.row_count:
        console.out.print(table)
    train, parameters = recipe.train, recipe.parameters
    block = "chosen for the members" if parameters.block is None else console.shape(parameters.block)
    console.say(
        f"Would be trained: {train.total} generations ({train.burn_in} burn-in, {train.generations} evolution, "
        f"{train.final} final) of {train.steps} steps, {train.optimizer.name} at {train.optimizer.lr:g}, blocks "
        f"{block}, seed {recipe.seed}."
    )


def _print_stacks(plan: Plan) -> None:
    """Stacks whose layers take templates, with what one template has."""
    if not plan.stacks:
        return
    table = console.table("stack", ">layers", ">tensors of each", ">numbers of each", ">size as it is", "~of")
    for name, keys in plan.stacks.items():
        banks = [bank for bank in plan.banks if bank.key in keys]
        layers = [p.site for p in plan.placements if p.bank == keys[0]]
        members = ", ".join(dict.fromkeys(site.member for site in layers))
        table.add_row(
            name,
            str(banks[0].locations),
            str(len(banks)),
            console.count(sum(bank.block[1] for bank in banks)),
            console.size(sum(map(_size, banks))),
            console.clipped(members),
        )
    console.out.print(table)


def _size(bank: BankPlan) -> int:
    """Bytes of all blocks of a bank."""
    return bank.locations * bank.block[0] * bank.block[1] * bytes_of(bank.dtype)


def bytes_of(dtype: str) -> int:
    """Bytes of one number."""
    from surgery.plan import torch_dtype

    return torch_dtype(dtype).itemsize


def result_json(joint: JointModel, folder: Path) -> dict[str, Any]:
    """The outcome of a merge as plain JSON values."""
    return {
        "out": str(folder),
        "disk_bytes": disk_bytes(folder),
        "members": outcome_rows(joint),
        "report": joint.report.to_json(),
    }


def outcome_rows(joint: JointModel) -> list[dict[str, Any]]:
    """For each member its size before and after, and how far its output moved."""
    report = joint.report
    return [
        {
            "name": name,
            "parameters": sum(joint_numel(joint, name)),
            "sites": sum(p.site.member == name for p in joint.plan.placements),
            "bytes_before": report.original_bytes[name],
            "bytes_after": sum(row.nbytes for row in report.detail if row.member == name),
            "output_error": report.errors.get(name),
        }
        for name in joint.names
    ]


def joint_numel(joint: JointModel, name: str) -> list[int]:
    """Number of values in each of a member's tensors, tied ones once."""
    state = joint.collapse(name)
    return [state[first].numel() for first in joint.owners[name]]


def disk_bytes(folder: Path) -> int:
    """True size of a folder's files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def print_result(joint: JointModel, folder: Path, *, verbose: bool) -> None:
    """What a merge did: members, what saved how much, how tensors are stored."""
    report = joint.report
    before, weights = sum(report.original_bytes.values()), report.stored_bytes
    disk = disk_bytes(folder)
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
    console.out.print(table)
    given = report.probes.get("given") or []
    inputs = f"real inputs for {', '.join(given)}, made-up ones for the rest" if given else "made-up inputs"
    if set(given) == set(joint.names):
        inputs = "the real inputs given"
    console.say(f"Target {report.target}: {'met' if report.met else 'NOT met'}, measured on {inputs}.")
    print_means(joint)
    _print_templates(joint)
    if verbose:
        rows = console.table("member", "tensor", "~stored as", ">before", ">after")
        for each in report.detail:
            rows.add_row(
                each.member, each.name, each.how, console.size(each.original), console.size(each.nbytes)
            )
        console.out.print(rows)


def _print_templates(joint: JointModel) -> None:
    """How many templates each stack's layers come from, and what these take."""
    table = console.table("stack", ">layers", ">templates", ">before", ">after", "~")
    for name, stack in joint.report.stacks.items():
        note = KEPT_APART if stack.templates == stack.layers else ""
        sizes = console.size(stack.original), console.size(stack.nbytes)
        table.add_row(name, str(stack.layers), str(stack.templates), *sizes, note)
    if table.row_count:
        console.out.print(table)


def print_means(joint: JointModel) -> None:
    """What each means saved, and how many tensors are stored in which way."""
    report = joint.report
    saved = console.table("saved by", ">bytes", "~")
    sharing, precision = report.saved["sharing"], report.saved["precision"]
    saved.add_row("precision", console.size(precision), PRECISION)
    saved.add_row("sharing", console.size(sharing), SHARING if sharing else NO_SHARING)
    console.out.print(saved)
    ways: dict[str, list[int]] = {}
    for each in report.detail:
        way = ways.setdefault(each.how, [0, 0, 0])
        for place, amount in enumerate((1, each.original, each.nbytes)):
            way[place] += amount
    table = console.table("stored as", ">tensors", ">before", ">after", "~")
    for how, (tensors, original, stored) in sorted(ways.items(), key=lambda item: -item[1][1]):
        note = "left alone" if how == "native" else ""
        table.add_row(how, str(tensors), console.size(original), console.size(stored), note)
    console.out.print(table)


def print_next(joint: JointModel, folder: Path) -> None:
    """The commands that are likely to come next."""
    name, where = joint.names[0], shlex.quote(str(folder))
    console.heading("Next")
    console.command(f"surgery verify {where}")
    console.command(f"surgery export {where} --member {name} --format plain --out {name}-plain")


def score_cells(score: Mapping[str, Any] | None) -> list[str]:
    """A task's loss and metric as a table shows them, from a score as JSON."""
    found = score or {}
    loss, metric, name = (found.get(key) for key in ("loss", "metric", "measure"))
    return [
        "-" if loss is None else f"{loss:.4g}",
        "-" if metric is None else f"{metric:.4g} {name or ''}".strip(),
    ]


def adapted_words(adapted: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What was adapted, a sentence for each task, from a report as JSON."""
    return [
        f"{name} adapted by {' and '.join(told['by'])}, without labels: the features that reach '{told['part']}', to "
        f"those of {told['examples']} examples of {told.get('source', 'the source')}."
        for name, told in adapted.items()
    ]
