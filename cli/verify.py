"""`surgery verify`: whether a folder is what was written, and how far its members are from their origins."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from .options import FLAG, RUN, Debug, Folder, Json, Quiet, TrustRemoteCode

if TYPE_CHECKING:
    from surgery.artifact.verify import VerifyReport

EXAMPLES = """
surgery verify joint
surgery verify joint --origins --json
"""


def verify(
    folder: Folder,
    origins: Annotated[
        bool,
        typer.Option(
            "--origins/--no-origins",
            metavar=FLAG,
            show_default=False,
            rich_help_panel=RUN,
            help="Compare members with the models they came from: opens the folders, files and hub ids that DIR names.",
        ),
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Rebuild each member of a folder, and compare it with the recorded hashes and, where asked, with its origin.

    Of an export that is no artifact the files are compared with the hashes that were recorded when it was written.

    Ends with exit code 1 where something does not match, or needs a method that is not installed. An origin that cannot
    be reached is no mismatch. Without [cyan]--origins[/cyan] nothing outside of the folder is opened.
    """
    from surgery.artifact.verify import verify as check
    from surgery.util.progress import task

    from . import console

    with console.working(quiet=quiet, json_wanted=json), task("Verifying"):
        report = check(folder, origins=origins, trust_remote_code=trust_remote_code)
    if json:
        console.emit(report.to_json())
    elif not quiet:
        print_report(report)
    if not report.ok:
        if quiet and not json:
            print_wrong(report)
        raise typer.Exit(1)


def print_wrong(report: VerifyReport) -> None:
    """What does not match, on stderr."""
    from . import console

    for line in wrong(report):
        console.complain(line)


def wrong(report: VerifyReport) -> list[str]:
    """What does not match, a line each."""
    files = [f"{path}: {reason}" for path, reason in report.files.items()]
    return files + [f"{each.member}: {reason}" for each in report.members for reason in each.reasons]


def print_report(report: VerifyReport) -> None:
    """Each member with what was found, then everything that is wrong."""
    from . import console

    table = console.table("member", "", "rebuilt", ">output moved by", ">recorded", "~origin")
    for each in report.members:
        table.add_row(
            each.member,
            "ok" if each.ok else "WRONG",
            "no" if not each.rebuilt else "weights alone" if each.not_built else "as recorded",
            "-" if each.error is None else console.percent(each.error, digits=2),
            "-" if each.recorded_error is None else console.percent(each.recorded_error, digits=2),
            each.origin,
        )
    if report.members:
        console.show(table)
    if report.what is not None:
        console.say(
            f"{report.directory} is {report.what}. Its files were compared with those that were written."
        )
    for path, reason in report.files.items():
        console.say(f"{path}: {reason}")
    for each in report.members:
        for reason in each.reasons:
            console.say(f"{each.member}: {reason}")
        if each.not_built:
            why = each.not_built.replace("`trust_remote_code`", "--trust-remote-code").rstrip(".")
            console.say(f"{each.member}: its weights were compared, but its module was not built: {why}.")
        if each.not_compared:
            said = f"how far its outputs moved was not compared with the recorded error: {each.not_compared}"
            console.say(f"{each.member}: {said}.")
    matches = "everything that was compared matches"
    if not any(each.not_built or each.not_compared for each in report.members):
        matches = "everything matches"
    console.say(f"{report.directory}: {matches if report.ok else 'does NOT match what was written'}.")
