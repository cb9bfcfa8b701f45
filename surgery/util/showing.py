"""Showing: objects as a few lines of text, and as an HTML table in a notebook; every string is escaped there."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from html import escape
from typing import Any

from surgery.errors import first_few

MOST = 8  # rows of a text, and lines of an object


def as_text(title: str, rows: Sequence[str] = ()) -> str:
    """A title and at most `MOST` indented rows.

    Example:
        >>> print(as_text("JointModel of 1 member", ["net  3.2k parameters"]))
        JointModel of 1 member
          net  3.2k parameters
    """
    return "\n".join([title, *(f"  {row}" for row in first_few(rows, MOST))])


def as_html(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str] = ()
) -> str:
    """A table with a title and notes below; columns but the first are aligned to the right.

    Example:
        >>> as_html("Sizes", ["member"], [["<b>"]]).count("<b>")
        0
    """
    head = "".join(f'<th style="text-align:{_side(k)}">{escape(name)}</th>' for k, name in enumerate(columns))
    body = "".join(
        "<tr>"
        + "".join(f'<td style="text-align:{_side(k)}">{escape(cell)}</td>' for k, cell in enumerate(row))
        + "</tr>"
        for row in rows
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>" if rows else ""
    below = "".join(f"<p>{escape(note)}</p>" for note in notes)
    return f"<div><p><strong>{escape(title)}</strong></p>{table}{below}</div>"


def plural(count: int, noun: str) -> str:
    """A number with its noun.

    Example:
        >>> plural(1, "member"), plural(2, "member")
        ('1 member', '2 members')
    """
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def in_order(names: Iterable[str], known: Collection[str]) -> list[str]:
    """Names as they stand in a collection, and after them all others by the alphabet.

    Example:
        >>> in_order(["new", "int4", "native"], ["native", "int8", "int4"])
        ['native', 'int4', 'new']
    """
    places = {name: place for place, name in enumerate(known)}
    return sorted(names, key=lambda name: (places.get(name, len(places)), name))


def finite(value: Any) -> Any:
    """JSON values with NaN and infinities as None, which JSON cannot say.

    Example:
        >>> finite({"a": (1.5, float("nan"))})
        {'a': [1.5, None]}
    """
    if isinstance(value, Mapping):
        return {str(key): finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _side(column: int) -> str:
    return "right" if column else "left"
