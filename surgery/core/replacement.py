"""Replacement: a module of a member in whose place another stands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Replacement:
    """Which module is replaced, by which method, and how.

    Attributes:
        member: whose module it is.
        path: of the module below the member's, such as `layers.3`.
        method: name of the method.
        settings: JSON values by which the method does it again when an artifact is loaded.
    """

    member: str
    path: str
    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
