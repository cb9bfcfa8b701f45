"""Shows the plan of a merge or of a training run for `--dry-run`, before anything is changed."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from . import console
from .outcome import REAL_INPUTS

if TYPE_CHECKING:
    from surgery.anatomy.plan import BankPlan, Plan
    from surgery.pipeline.merge import Prepared
    from surgery.settings.recipe import Recipe


def plan_json(prepared: Prepared) -> dict[str, Any]:
    """A plan as plain JSON values."""
    plan, recipe = prepared.plan, prepared.recipe
    return {
        "recipe": prepared.resolved(),
        "out": recipe.out,
        "members": member_rows(prepared),
        "banks": [
            {
                "key": b.key,
                "block": list(b.block),
                "dtype": b.dtype,
                "locations": b.locations,
                "stack": b.stack or None,
                "method": b.method,
                "settings": dict(b.settings),
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
        "replacements": [asdict(each) for each in plan.replacements],
        "left_alone": [
            {"member": each.member, "name": each.name, "role": each.role, "reason": each.reason}
            for each in plan.left_alone
        ],
    }


def member_rows(prepared: Prepared) -> list[dict[str, Any]]:
    """For each member its size, and how much of it is sites."""
    from surgery.core.sizes import bytes_of_module, parameters_of_module

    rows = []
    for member in prepared.members:
        placed = prepared.plan.of(member.name)
        rows.append(
            {
                "name": member.name,
                "reference": member.origin.reference,
                "architecture": member.origin.architecture,
                "parameters": parameters_of_module(member.module),
                "bytes": bytes_of_module(member.module),
                "sites": len(placed),
                "site_parameters": sum(math.prod(p.site.shape) for p in placed),
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
    console.show(table)
    _print_replacements(plan)
    _print_stacks(plan)
    banks = console.table("bank", "block", "dtype", ">locations", ">size as it is")
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
        console.show(banks)
    if recipe.train is None:
        _say_fit(prepared, rows)
    else:
        _say_training(recipe, plan)
    console.say(
        f"Output folder {recipe.out}: can be written." if recipe.out else "No output folder was given."
    )
    if verbose:
        sites = console.table("member", "site", "kind", "~stack x out x in", ">locations")
        for p in plan.placements:
            view = console.shape(p.site.view.shape)
            sites.add_row(p.site.member, p.site.name, p.site.kind, view, f"{p.grid.locations:,}")
        console.show(sites)


def _say_fit(prepared: Prepared, rows: list[dict[str, Any]]) -> None:
    """The target of a merge, and what errors would be measured on."""
    from surgery.core.registry import find_method
    from surgery.core.tensor_method import TensorMethod

    recipe, parameters = prepared.recipe, prepared.recipe.parameters
    method = find_method(prepared.plan.method, TensorMethod)
    name, value = recipe.target
    asked = ", ".join(prepared.asked.values())
    asked += " for each stack" if asked and prepared.plan.stacks else ""
    chosen = "blocks as given" if parameters.block else "blocks chosen by the fit where rows are shared"
    words = f"{name.replace('_', '-')} {value:g}"
    if asked and parameters.max_error is None and parameters.budget is None:
        words, chosen = asked, "everything else as it is"
    elif asked:
        words += f" with {asked}"
    elif method.claims and method.lever:
        words += f", which decides the number of {method.lever} too"
    if method.claims:
        said = {n: v for n, v in recipe.settings.items() if n != method.lever and v not in (None, False)}
        chosen += "".join(f", {n} {v}" for n, v in said.items() if f"{n} {v}" not in asked)
    real = [row["name"] for row in rows if row["real_inputs"]]
    console.say(f"Would be fitted: {words}, {chosen}, seed {recipe.seed}.")
    on = f"real inputs for {', '.join(real)}" if real else "made-up inputs"
    console.say(f"Errors would be measured on {on}.{f' {REAL_INPUTS}' * (len(real) < len(rows))}")


def _say_training(recipe: Recipe, plan: Plan) -> None:
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
            table.add_row(*cells, _metric(task.metric), f"{task.weight:g}")
    if table.row_count:
        console.show(table)
    from surgery.core.registry import find_method, methods_of
    from surgery.settings.names import DEFAULT_METHOD
    from surgery.util.showing import plural

    train, parameters = recipe.train, recipe.parameters
    replacing = [find_method(name) for name in dict.fromkeys(each.method for each in plan.replacements)]
    phases = "; ".join(filter(None, [each.phases(train) for each in (*methods_of(plan), *replacing)]))
    generations = plural(train.total, "generation") + (f" ({phases})" if phases else "")
    block = "chosen for the members" if parameters.block is None else console.shape(parameters.block)
    cut = f"blocks {block}, " if any(bank.method == DEFAULT_METHOD for bank in plan.banks) else ""
    console.say(
        f"Would be trained: {generations} of {train.steps} steps, {train.optimizer.name} at {train.optimizer.lr:g}, "
        f"{cut}seed {recipe.seed}."
    )


def _metric(wanted: str | dict[str, Any] | None) -> str:
    from surgery.training.tasks.metrics import measure_of

    return "-" if wanted is None else measure_of(wanted).title


def _print_replacements(plan: Plan) -> None:
    if not plan.replacements:
        return
    table = console.table("member", "replaced module", "by", "~settings")
    for each in plan.replacements:
        settings = ", ".join(f"{key}: {value}" for key, value in each.settings.items())
        table.add_row(each.member, each.path, each.method, console.clipped(settings))
    console.show(table)


def _print_stacks(plan: Plan) -> None:
    """Stacks whose layers take templates, with what one template has."""
    if not plan.stacks:
        return
    table = console.table(
        "stack", ">layers", ">tensors of each", ">parameters of each", ">size as it is", "~of"
    )
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
    console.show(table)


def _size(bank: BankPlan) -> int:
    """Bytes of all blocks of a bank."""
    return bank.locations * bank.block[0] * bank.block[1] * bytes_of(bank.dtype)


def bytes_of(dtype: str) -> int:
    """Bytes of one number."""
    from surgery.anatomy.plan import torch_dtype

    return torch_dtype(dtype).itemsize
