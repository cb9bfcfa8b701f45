"""Errors that a user can mend: each says what was required, what was found and what to do.

The sentence alone is what a user needs to see; anything that is not a `SurgeryError` is a fault of this package and
keeps its traceback.
"""

from collections.abc import Iterable
from typing import Any

LONGEST = 4000  # characters of an error: it is read on a screen


def first_few(things: Iterable[Any], limit: int) -> list[str]:
    """The first few things as text, and how many more there are.

    Example:
        >>> first_few(["a", "b", "c"], limit=2)
        ['a', 'b', 'and 1 more']
    """
    found = list(things)
    shown, rest = [str(thing) for thing in found[:limit]], len(found) - limit
    return [*shown, f"and {rest} more"] if rest > 0 else shown


def shorten(names: Iterable[Any], limit: int = 8, separator: str = ", ") -> str:
    """The first few of `names` in one line, and how many more there are.

    Args:
        names: as text.
        limit: how many are named.
        separator: between them, such as `"; "` between sentences.

    Example:
        >>> shorten(["a", "b", "c"], limit=2), shorten(["a is bad", "so is b"], 1, "; ")
        ('a, b and 1 more', 'a is bad; and 1 more')
    """
    *found, last = first_few(names, limit) or [""]
    before = " " if separator == ", " and len(found) == limit and last.startswith("and ") else separator
    return f"{separator.join(found)}{before}{last}" if found else last


class SurgeryError(Exception):
    """Base of every error that bad input, and not a fault of this package, causes.

    A message that would fill screens, as one that quotes a hostile file might, loses its middle.

    A message names a setting in backquotes, with its value where it asks for one: `budget`, `resume=True`. A program
    that has other names for settings can so put them in their place.
    """

    def __init__(self, *arguments: object):
        super().__init__(*(_within(each) if isinstance(each, str) else each for each in arguments))


class SurgeryWarning(UserWarning):
    """Something is not as it was asked for, and goes on; settings stand in backquotes as in a `SurgeryError`."""


class LoadError(SurgeryError):
    """A reference names no model, or its files cannot be read or do not fit the architecture."""


class ConsentError(LoadError):
    """Code or a file that an artifact or a checkpoint names would be used without the user's consent."""


class TraceError(SurgeryError):
    """A model could not be traced with the example inputs at hand."""


class PlanError(SurgeryError):
    """What was asked for cannot be met: a budget, a block shape, a site that does not exist."""


class ArtifactError(SurgeryError):
    """An artifact's files are missing, damaged, or do not match its manifest."""


class UndecodableError(ArtifactError):
    """What is stored of a tensor does not decode."""


class MissingMethodError(ArtifactError):
    """An artifact needs a method that is not installed here, or whose package cannot be imported."""


class OutputError(SurgeryError):
    """A target cannot be written: it exists, is read-only, or the disk is full."""


class MemoryLimitError(SurgeryError):
    """A run held more memory than it was allowed to."""


class ExportError(SurgeryError):
    """A member has no plain form: a module of it was replaced by one that no ordinary module equals."""


class TrainingError(SurgeryError):
    """Training cannot go on: a loss is not finite, memory ran out, or a checkpoint belongs to another run."""


def _within(text: str) -> str:
    if len(text) <= LONGEST:
        return text
    end = LONGEST // 4
    start = LONGEST - end - 60  # room for the words in between
    left_out = f" ... ({len(text) - start - end:,} characters are left out) ... "
    return f"{text[:start]}{left_out}{text[-end:]}"
