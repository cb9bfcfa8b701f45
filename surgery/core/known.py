"""Keeps what is known of a joint model's weights, and for which members it still holds.

A report describes the weights that were measured, and no others. Weights change in many ways, most of them outside of
this package, so nobody is asked to announce a change: each member's tensors are stamped when something is found out,
and what is known is stale for a member whose stamp is another one. What leaves no trace in a tensor's version, as fused
optimizers and changes through `.data` do, is seen in a few of its values; content hashes, which `surgery.save`
compares, find the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from surgery.fitting.report import FitReport
    from surgery.settings.recipe import Recipe
    from surgery.training.report.report import TrainReport

SAMPLE = 8  # values of a tensor that are looked at

Stamp = tuple[object, ...]
"""Identity, place and version of some tensors, and a few values of each."""


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
        recipe: how they were made; None where that cannot be told.
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


def stamp(tensors: Iterable[Tensor]) -> Stamp:
    """Equal for the same tensors as long as none of them is seen to change.

    Example:
        >>> weight = torch.zeros(3)
        >>> before = stamp([weight])
        >>> stamp([weight]) == before, stamp([weight.add_(1)]) == before
        (True, False)
    """
    found = list(tensors)
    return (*versions(found), *_samples(found))


def versions(tensors: Iterable[Tensor]) -> Stamp:
    """Identity, place and version of tensors: no value is looked at."""
    return tuple((id(t), t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors)


@torch.no_grad()
def _samples(tensors: Sequence[Tensor]) -> list[bytes]:
    """A few values of every tensor, brought from each device in one go."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        if tensor.is_contiguous() and tensor.numel() and tensor.device.type != "meta":
            flat = tensor.detach().view(-1)
            few = flat[:: max(1, flat.numel() // SAMPLE)]
            real = torch.view_as_real(few).flatten() if few.is_complex() else few
            by_device.setdefault(tensor.device, []).append(real.double())
    return [torch.cat(few).cpu().numpy().tobytes() for few in by_device.values()]
