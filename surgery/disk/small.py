"""Small files: those of a member, written below a folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from surgery.errors import LoadError


def write_files(files: Mapping[str, bytes], directory: Path, keep: Iterable[str] = ()) -> None:
    """Write `files` below `directory`, apart from the paths in `keep`, which the saver wrote itself."""
    left = set(keep)
    for relative, content in files.items():
        target = directory / relative
        if not target.resolve().is_relative_to(directory.resolve()):
            raise LoadError(f"a member's file must lie inside its folder; '{relative}' leads out of it")
        if relative not in left:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
