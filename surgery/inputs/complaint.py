"""Extracts the message and the place of an exception that inputs caused."""

from __future__ import annotations

import re
from dataclasses import dataclass
from traceback import extract_tb, walk_tb

from torch import Tensor

_LINES = 12  # innermost calls whose source lines are looked at
_VALUES = 7  # innermost calls whose values are looked at


@dataclass(frozen=True)
class Complaint:
    """An error of a forward pass, read.

    Attributes:
        said: its message, on one line.
        lines: the source lines that raised it, the innermost last.
        empty: names on those lines that held None there.
        rows: of the table that an id fell out of, where that is what happened.
    """

    said: str
    lines: tuple[str, ...] = ()
    empty: tuple[str, ...] = ()
    rows: int | None = None


def read(error: BaseException) -> Complaint:
    """The words of an error and the values of the names on the lines where it happened.

    Example:
        >>> def forward(pixel_values=None):
        ...     return pixel_values.shape
        >>> try:
        ...     forward()
        ... except AttributeError as error:
        ...     read(error).said
        "'NoneType' object has no attribute 'shape'"
    """
    said = " ".join(str(error).split())
    frames = [frame for frame, _ in walk_tb(error.__traceback__)][-_VALUES:]
    lines = tuple(summary.line or "" for summary in extract_tb(error.__traceback__)[-_LINES:])
    empty = [
        name
        for frame, line in zip(reversed(frames), reversed(lines), strict=False)
        for name in re.findall(r"[a-z_]\w+", line)
        if name in frame.f_locals and frame.f_locals[name] is None
    ]
    rows = None
    if "index out of range" in said and frames:
        weight = frames[-1].f_locals.get("weight")
        rows = len(weight) if isinstance(weight, Tensor) and weight.ndim == 2 else None
    return Complaint(said, lines, tuple(dict.fromkeys(empty)), rows)
