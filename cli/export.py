"""`surgery export`: one member of a joint folder as a model of its own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from . import completion, options
from .options import Calibrate, Debug, Folder, Json, Overwrite, Quiet, TrustRemoteCode, option

if TYPE_CHECKING:
    from surgery.artifact.exporting import ExportPlan

EXAMPLES = """
surgery export joint --member minilm --format plain --out minilm-plain
surgery export joint --member minilm --format compressed --out minilm-small
surgery export joint --member minilm --format transformers --out minilm-coded
surgery export joint --member minilm --format compressed-tensors --out minilm-packed
surgery export joint --member minilm --format compressed-tensors --out minilm-packed --dry-run
surgery export joint --member b --format lora --base a-plain --max-error 0.01 --calibrate texts.txt --out b-adapter
"""


def export(
    folder: Folder,
    member: Annotated[
        str,
        option("--member", "NAME", "Which member.", complete=completion.members),
    ],
    out: Annotated[Path, option("--out", "DIR2", "Folder to write.")],
    format: Annotated[
        Literal["plain", "compressed", "transformers", "compressed-tensors", "lora"],
        option(
            "--format",
            None,
            "[cyan]plain[/cyan]: transformers or timm load it without surgery. "
            "[cyan]compressed[/cyan]: the smallest folder, for surgery.load. "
            "[cyan]transformers[/cyan]: compressed, for AutoModel.from_pretrained after import surgery. "
            "[cyan]compressed-tensors[/cyan]: linear layers as packed integers, for transformers with that package and "
            "for servers. [cyan]lora[/cyan]: an adapter of peft for --base.",
        ),
    ] = "plain",
    harden: Annotated[
        bool,
        option("--harden", None, "Make soft routes hard first: of each depth the layer used most."),
    ] = False,
    tie_widths: Annotated[
        bool,
        option(
            "--tie-widths",
            None,
            "One width, of 4 or 8 bits, for layers that servers merge; for compressed-tensors.",
        ),
    ] = False,
    base: Annotated[
        str | None,
        option(
            "--base",
            "REF",
            "The model that an adapter belongs to, such as the plain export of a relative; for lora.",
        ),
    ] = None,
    max_error: Annotated[
        float | None,
        options.max_error(
            "How far an adapter may move the member's outputs; 0.01 by default; for lora.", options.RUN
        ),
    ] = None,
    calibrate: Calibrate = None,
    dry_run: Annotated[
        bool,
        options.dry_run(
            "Say what becomes of every tensor and what it takes, write nothing; --json lists all."
        ),
    ] = False,
    overwrite: Overwrite = False,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write one member as a model of its own."""
    from surgery.artifact.export import export as write
    from surgery.artifact.export import read_paths
    from surgery.artifact.exporting import plan_export
    from surgery.disk.files import bytes_below
    from surgery.disk.folders import check_target
    from surgery.util.progress import task

    from . import console

    files = [each.removeprefix(f"{member}=") for each in calibrate or ()]
    asked: dict[str, Any] = {
        "format": format,
        "harden": harden,
        "tie_widths": tie_widths,
        "base": base,
        "max_error": max_error,
        "calibrate": files,
        "trust_remote_code": trust_remote_code,
    }
    if dry_run:
        with console.working(quiet=quiet, json_wanted=json), task(f"Planning {member}"):
            check_target(out, overwrite=overwrite, inputs=read_paths(folder, base, files))
            plan = plan_export(folder, member, **asked)
        print_plan(plan, out, json=json, quiet=quiet)
        return
    with console.working(quiet=quiet, json_wanted=json), task(f"Exporting {member}"):
        say = None if json or quiet else console.say
        write(folder, member, out, **asked, say=say, overwrite=overwrite)
    size = bytes_below(out)
    if json:
        console.emit({"member": member, "format": format, "out": str(out), "disk_bytes": size})
    elif not quiet:
        console.say(f"{out}: member {member}, {format}, {console.size(size)} on disk.")


def print_plan(plan: ExportPlan, out: Path, *, json: bool, quiet: bool) -> None:
    """What would be written, tensor by tensor as JSON, and otherwise a line for each kind."""
    from . import console

    if json:
        console.emit({**plan.to_json(), "out": str(out)})
    elif not quiet:
        for line in plan.lines():
            console.say(line)
        whole = console.size(plan.nbytes + sum(plan.files.values()))
        console.say(f"{out}: member {plan.member}, {plan.format}, about {whole} would be written.")
