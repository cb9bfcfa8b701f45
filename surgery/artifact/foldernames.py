"""Names the folder of each member so that it is unique on case-insensitive file systems too."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

from surgery.artifact.manifest import is_safe
from surgery.errors import OutputError

_DEVICES = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in "0123456789¹²³")}


def folder_names(members: Iterable[str]) -> dict[str, str]:
    """The folder of each member: its name wherever that can be.

    Of names that differ only in case, or in how Unicode composes letters, the first keeps its own and the others get a
    number; a dot or space at the end goes, and what Windows reserves for devices gets a mark in front.

    Example:
        >>> folder_names(["net", "Net", "con", "end."])
        {'net': 'net', 'Net': 'Net-2', 'con': '_con', 'end.': 'end'}
    """
    members = list(members)
    found: dict[str, str] = {}
    taken: set[str] = set()
    for name in members:
        if _usable(name) == name and folded(name) not in taken:
            found[name] = name
            taken.add(folded(name))
    for name in members:
        if name not in found:
            base, number = _usable(name), 2
            folder = base
            while folded(folder) in taken:
                folder, number = f"{base}-{number}", number + 1
            found[name] = folder
            taken.add(folded(folder))
    return {name: found[name] for name in members}


def check_folder_names(names: Iterable[str]) -> None:
    """Whether folders can be called like members.

    Raises:
        OutputError: naming those that cannot.
    """
    if bad := [
        name for name in names if not is_safe(f"members/{name}") or "/" in name or name in (".", "..")
    ]:
        raise OutputError(
            f"A member's name must be fit for a folder, but {', '.join(bad)} is not; rename it."
        )


def folded(name: str) -> str:
    """What is equal for names that some file system takes for one."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold()).casefold()


def _usable(name: str) -> str:
    usable = name.rstrip(". ") or "_"
    return f"_{usable}" if usable.partition(".")[0].rstrip().casefold() in _DEVICES else usable
