"""`surgery inspect`: what surgery sees in one model, tensor by tensor, in execution order."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .options import (
    SCREEN,
    AllowNonfinite,
    Debug,
    Json,
    Private,
    Quiet,
    Seed,
    Sites,
    Skip,
    TrustRemoteCode,
    option,
    switch,
)

if TYPE_CHECKING:
    from surgery.anatomy.sites import Anatomy, LeftAlone, Site
    from surgery.members.member import Inputs, Member

REFERENCE = (
    "A transformers folder or hub id ([cyan]org/name@rev[/cyan]), [cyan]timm:NAME[/cyan], "
    "[cyan]timm:NAME=weights.safetensors[/cyan], or [cyan]path/module.py:factory[/cyan]; "
    "[cyan]name=[/cyan] in front names it."
)

EXAMPLES = """
surgery inspect timm:resnet18
surgery inspect ./my-bert --only site --verbose
surgery inspect ./my-model --inputs batch.npz
surgery inspect ./my-bert --private 're:.*attention.*' --json
"""

BUFFER = "buffer"  # no parameter
ROLES = ("site", "private", "skipped")


def inspect(
    reference: Annotated[str, typer.Argument(metavar="REF", help=REFERENCE)],
    private: Private = None,
    sites: Sites = None,
    skip: Skip = None,
    seed: Seed = 0,
    trust_remote_code: TrustRemoteCode = False,
    allow_nonfinite: AllowNonfinite = False,
    only: Annotated[
        Literal["site", "private", "skipped"] | None,
        option("--only", None, "Rows of one role.", SCREEN),
    ] = None,
    inputs: Annotated[
        Path | None,
        option(
            "--inputs",
            "FILE",
            "Trace with these instead of made-up inputs: .npz or .safetensors of arrays named by the "
            "arguments of forward, .txt, or pictures.",
        ),
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Annotated[
        bool,
        switch(
            "--verbose",
            "Also print every use of every tensor: where, in which operation, and what leads to it.",
            SCREEN,
            short="-v",
        ),
    ] = False,
    debug: Debug = False,
) -> None:
    """Show every site, private and skipped tensor of a model, in execution order, with shapes and reasons.

    A [bold]site[/bold] is a weight tensor that is a linear map: its blocks can be shared. Its canonical
    view is the stack of matrices, [cyan]stack x out x in[/cyan], that is cut into blocks. A
    [bold]private[/bold] tensor is left to its member alone.
    """
    from surgery.anatomy.sites import discover
    from surgery.members.references import load_member
    from surgery.tracing import recorded_once
    from surgery.util.progress import task

    from . import console

    with console.working(quiet=quiet, json_wanted=json), task("Loading and tracing"), recorded_once():
        given = None if inputs is None else lambda member: from_file(member, inputs)
        member = load_member(
            reference,
            inputs=given,
            trust_remote_code=trust_remote_code,
            seed=seed,
            allow_nonfinite=allow_nonfinite,
            read=False,
        )
        anatomy = discover(
            member, private=tuple(private or ()), sites=tuple(sites or ()), skip=tuple(skip or ())
        )
    rows = [row for row in tensors(anatomy) if only in (None, row["role"])]
    uses = uses_by_tensor(anatomy)
    if json:
        rows = [{**row, "uses": uses.get(row["name"], [])} for row in rows]
        found = {"totals": totals(anatomy), "stacks": stacks(anatomy), "tensors": rows}
        console.emit({**describe(member, anatomy), **found})
        return
    if quiet:
        return
    shown = [row for row in rows if only or row["kind"] != BUFFER]
    _print_tensors(shown, uses if verbose else {})
    if len(shown) < len(rows):
        console.say(
            f"{len(rows) - len(shown)} buffers are not listed; --only skipped lists them.", style="dim"
        )
    _print_totals(member, anatomy, verbose)
    _print_stacks(anatomy)


def from_file(member: Member, file: Path) -> Inputs:
    """The first batch of a file, prepared as the member expects."""
    from surgery.errors import LoadError
    from surgery.inputs.probes import probe_inputs

    try:
        return replace(probe_inputs(member, calibrate=file)[0], source=str(file))
    except LoadError as error:
        raise LoadError(f"`inputs`: {error}") from error


def describe(member: Member, anatomy: Anatomy) -> dict[str, Any]:
    """Where a member came from and how it was traced."""
    return {
        "member": member.name,
        "architecture": member.origin.architecture,
        "kind": member.origin.kind,
        "reference": member.origin.reference,
        "tier": anatomy.tier,
        "inputs": anatomy.inputs,
        "example_shapes": [
            tuple(t.shape)
            for t in (*member.inputs.args, *member.inputs.kwargs.values())
            if hasattr(t, "shape")
        ],
        "notes": list(anatomy.notes),
    }


def tensors(anatomy: Anatomy) -> list[dict[str, Any]]:
    """One row for each tensor, in execution order."""
    entries: list[Site | LeftAlone] = sorted(
        (*anatomy.sites, *anatomy.left_alone), key=lambda each: each.order
    )
    return [_row(entry) for entry in entries]


def totals(anatomy: Anatomy) -> list[dict[str, Any]]:
    """Number of tensors and parameters by role, kind and reason, sites first."""
    groups: dict[tuple[str, str, str], list[int]] = {}
    for row in tensors(anatomy):
        group = groups.setdefault((row["role"], row["kind"], row.get("reason", "")), [0, 0])
        group[0] += 1
        group[1] += row["parameters"]
    ordered = sorted(groups.items(), key=lambda item: (ROLES.index(item[0][0]), -item[1][1]))
    return [
        {"role": role, "kind": kind, "tensors": found, "parameters": parameters, "reason": reason}
        for (role, kind, reason), (found, parameters) in ordered
    ]


def stacks(anatomy: Anatomy) -> list[dict[str, Any]]:
    """Runs of layers of one structure, which --method templates can mix."""
    return [
        {
            "path": run.path,
            "layers": list(run.layers),
            "tensors": len(run.parts),
            "parameters_of_a_layer": run.parameters,
        }
        for run in anatomy.runs
    ]


def _print_stacks(anatomy: Anatomy) -> None:
    from . import console

    if not anatomy.runs:
        return
    console.heading("Stacks: layers of one structure, one after the other (--method templates)")
    table = console.table("stack", ">layers", ">tensors of each", ">parameters of each")
    for row in stacks(anatomy):
        count = console.count(row["parameters_of_a_layer"])
        table.add_row(row["path"], str(len(row["layers"])), str(row["tensors"]), count)
    console.show(table)


def _row(entry: Site | LeftAlone) -> dict[str, Any]:
    row: dict[str, Any] = {
        "order": entry.order,
        "name": entry.name,
        "owners": list(entry.owners),
        "role": getattr(entry, "role", "site"),
        "kind": entry.kind,
        "shape": list(entry.shape),
        "dtype": entry.dtype,
        "parameters": math.prod(entry.shape),
    }
    view = getattr(entry, "view", None)
    if view is not None:
        return {**row, "view": view.pattern, "stack_out_in": list(view.shape)}
    return {**row, "reason": getattr(entry, "reason", "")}


def uses_by_tensor(anatomy: Anatomy) -> dict[str, list[dict[str, Any]]]:
    """Every use of each tensor, in execution order; `reached` is false where no forward pass got there."""
    found: dict[str, list[dict[str, Any]]] = {}
    for use in anatomy.uses:
        entry = {
            "order": use.order,
            "module": use.module,
            "op": use.op,
            "through": list(use.through),
            "reached": use.reached,
        }
        found.setdefault(use.parameter, []).append(entry)
    return found


def _print_tensors(rows: list[dict[str, Any]], uses: dict[str, list[dict[str, Any]]]) -> None:
    from . import console

    table = console.table(">#", "tensor", "kind", "shape", "~role")
    for row in rows:
        what = console.shape(row["stack_out_in"]) if "view" in row else row["reason"]
        tied = "".join(f"\n  tied: {owner}" for owner in row["owners"][1:])
        tied += "".join(f"\n  {_use(use)}" for use in uses.get(row["name"], []))
        table.add_row(
            str(row["order"]),
            row["name"] + tied,
            row["kind"],
            console.shape(row["shape"]),
            console.clipped(f"{row['role']} {what}" if row["role"] == "site" else f"{row['role']}: {what}"),
            style=None if row["role"] == "site" else "dim",
        )
    console.show(table)


def _use(use: dict[str, Any]) -> str:
    """One use in one line: `mlp.fc1: linear`, with what leads to it in front of the operation."""
    way = " > ".join([*use["through"], use["op"]])
    return f"{use['module'] or '(model)'}: {way}" if use["reached"] else f"{use['module']}: not reached"


def _print_totals(member: Member, anatomy: Anatomy, verbose: bool) -> None:
    from . import console

    rows = totals(anatomy)
    everything = sum(row["parameters"] for row in rows if row["kind"] != BUFFER)
    about = describe(member, anatomy)
    shapes = ", ".join(map(console.shape, about["example_shapes"]))
    console.heading(f"{member.name}: {about['architecture']}, {console.count(everything)} parameters")
    console.say(
        f"Traced by {anatomy.tier}. Example inputs: {anatomy.inputs}{f' ({shapes})' if shapes else ''}."
    )
    console.say("Sites show their canonical view, stack x out x in.")
    for note in anatomy.notes:
        if verbose or " was passed over: " not in note:  # that another way of tracing served is no news
            console.say(f"Note: {note}", style="dim")
    table = console.table("role", "kind", ">tensors", ">parameters", ">share", "~reason")
    for row in rows:
        table.add_row(
            row["role"],
            row["kind"],
            str(row["tensors"]),
            console.count(row["parameters"]) if row["kind"] != BUFFER else "-",
            console.percent(row["parameters"] / (everything or 1)) if row["kind"] != BUFFER else "-",
            row["reason"] or "a linear map: its blocks can be shared",
            style=None if row["role"] == "site" else "dim",
        )
    console.show(table)
