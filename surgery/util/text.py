"""Text: names and errors in one line of a message."""

from __future__ import annotations

import re

from surgery.disk.untrusted import shown_text
from surgery.errors import first_few, shorten

__all__ = ["first_few", "one_line", "printable", "shorten"]


def one_line(error: BaseException, limit: int = 300) -> str:
    """An exception's kind and words in one line; an empty message leaves the kind alone."""
    words = shown_text(" ".join(str(error).split()), 10 * limit)
    text = f"{type(error).__name__}: {words}" if words else type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."


def printable(text: str) -> str:
    """The text with control characters written out, so that text from a file cannot command a terminal.

    Args:
        text: of any origin; line feeds and tabs stay as they are.

    Example:
        >>> print(printable("name" + chr(27) + "[2J"))
        name\\x1b[2J
    """
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Control characters but line feed and tab, and those that turn the direction of writing."""
