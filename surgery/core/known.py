"""Keeps what is known of a joint model's weights, and for which members it still holds.

A report describes the weights that were measured, and no others. Weights change in many ways, most of them outside of
this package, so nobody is asked to announce a change: each member's tensors are stamped (`surgery.util.stamps`) when
something is found out, and what is known is stale for a member whose stamp is another one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from surgery.fitting.report import FitReport
    from surgery.settings.recipe import Recipe
    from surgery.training.report.report import TrainReport


@dataclass(frozen=True)
class Known:
    """What was found out about the weights of a joint model.

    Attributes:
        report: of a fit, as far as an artifact still holds it; None where there was none.
        training: report of the training that made these very weights; None where there was none, or they changed since.
        hashes: content hash of each member's weights that the report describes, where known.
        original: members whose weights are those that their origin gives.
        compressed: tensors, by member and first owner, that are not stored in their own dtype.
        stale: members whose weights changed since.
        recipe: how they were made; None where that is not known.
        joined: a recipe that joins the same, where they are as they were joined and a recipe could say so.
        sources: artifacts that members were loaded from and that hold their weights, by member.
    """

    report: FitReport | None = None
    training: TrainReport | None = None
    hashes: Mapping[str, str] = field(default_factory=dict)
    original: frozenset[str] = frozenset()
    compressed: frozenset[tuple[str, str]] = frozenset()
    stale: frozenset[str] = frozenset()
    recipe: Recipe | None = None
    joined: Recipe | None = None
    sources: Mapping[str, str] = field(default_factory=dict)
