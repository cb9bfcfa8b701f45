"""Replacement: a module of a member in whose place another stands, and what stood there before."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from surgery.util.showing import plural


@dataclass(frozen=True)
class Replacement:
    """Which module is replaced, by which method, and how.

    Attributes:
        member: whose module it is.
        path: of the module below the member's, such as `layers.3`.
        method: name of the method.
        settings: JSON values by which the method does it again when an artifact is loaded.
        package: where the method comes from, for whoever does not have it.
    """

    member: str
    path: str
    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    package: str = ""


@dataclass(frozen=True)
class Replaced:
    """A replacement that was made.

    Attributes:
        replacement: which one.
        original: what stood there before, as long as a fit or a training may compare with it.
    """

    replacement: Replacement
    original: nn.Module | None = field(default=None, repr=False, compare=False)

    @property
    def path(self) -> str:
        """Of the module."""
        return self.replacement.path


def count_replaced(methods: Sequence[str]) -> str:
    """How many modules each method replaced, in words.

    Args:
        methods: of all replacements.

    Example:
        >>> count_replaced(["scaled_copy", "scaled_copy"])
        '2 modules replaced by scaled_copy'
    """
    found = Counter(methods)
    return ", ".join(f"{plural(number, 'module')} replaced by {name}" for name, number in found.items())
