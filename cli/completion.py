"""Shell completion of arguments and options, without importing torch."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import typer

DEVICES = ("auto", "cpu", "cuda", "mps", "xpu")


def recipes(incomplete: str) -> Iterator[tuple[str, str]]:
    """The installed recipes, each with its first line."""
    from surgery.settings.documents import read_text, recipe_names

    for name in recipe_names():
        if name.startswith(incomplete):
            yield name, read_text(name).partition("\n")[0].lstrip("# ")


def methods(incomplete: str) -> Iterator[tuple[str, str]]:
    """The methods that are known, each with what it does."""
    from surgery.settings.methods import method_names, summary_of

    yield from ((name, summary_of(name)) for name in method_names() if name.startswith(incomplete))


def devices(incomplete: str) -> Iterator[str]:
    """Devices that PyTorch knows; whether one is there is seen when it is used."""
    yield from (name for name in DEVICES if name.startswith(incomplete))


def artifacts(incomplete: str) -> Iterator[str]:
    """Folders below the working directory, or below what is typed, that hold an artifact or a run's log, and folders
    on the way."""
    head, slash, tail = incomplete.rpartition("/")
    base = Path(f"{head}/" if slash else ".").expanduser()
    try:
        found = sorted(path for path in base.iterdir() if path.is_dir() and path.name.startswith(tail))
    except OSError:
        return
    for path in found:
        if path.name.startswith(".") and not tail.startswith("."):
            continue
        ours = (path / "manifest.json").is_file() or (path / "log.jsonl").is_file()
        yield f"{head}{slash}{path.name}" + ("" if ours else "/")


def members(ctx: typer.Context, incomplete: str) -> Iterator[str]:
    """The members of the artifact that is given as the first argument."""
    folder = ctx.params.get("folder")
    try:
        found = json.loads((Path(folder) / "manifest.json").read_bytes()) if folder else {}
        if "members" not in found and folder:
            found = json.loads(gzip.decompress((Path(folder) / "records.json.gz").read_bytes()))
        found = found["members"]
    except (OSError, EOFError, ValueError, KeyError, TypeError):
        return
    yield from (name for name in found if isinstance(name, str) and name.startswith(incomplete))
