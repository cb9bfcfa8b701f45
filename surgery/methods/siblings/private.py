"""How private rows and their contexts are rounded, and what that costs.

A direction of a difference is a private row `[n]` and its contexts `[o]`. What rounds contexts is made up for by rows
that are made anew, as far as their directions reach; what rounds rows is not. There are often fewer entries in a row
than contexts of it, too, so that bits cost less in rows: these get more bits than contexts do, as many as makes the
last byte of either gain the same.

Errors are fed back (`surgery.storage.codecs.feedback`), in rows under H of the site's inputs, and in contexts, whose
entries are the outputs, under G.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import pairwise

import torch
from torch import Tensor

from surgery.anatomy.sites import Site
from surgery.fitting.metric import Metric, times, trace
from surgery.fitting.units import Unit
from surgery.methods.siblings.lowrank import Factors
from surgery.storage.codecs import (
    NATIVE,
    PLANES,
    Precision,
    Statistics,
    decode,
    encode,
    expected_bytes,
    grouped,
    is_tame,
    rounded,
)
from surgery.storage.codecs.feedback import expected_gain

RUNS = (0, 1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128, 160, 192)
"""Ranks between which directions are decided on together."""
GROUP = 64  # entries of a private row, or contexts of it, that have a scale of their own
WIDTHS = (8, 6, 5, 4, 3, 2)  # bits of contexts
FINER = ((grouped(12, GROUP), 1 / 110), (grouped(10, GROUP), 1 / 14))
"""Those beside a shared matrix of more than 8 bits, and what they lose of what 8 bits do: somewhat more than the square
of their steps, as scales have 8 bits themselves."""
OPTIONS = (NATIVE, *(finer for finer, _ in FINER), *(grouped(bits, GROUP) for bits in WIDTHS))
MOST_MORE = 3  # bits that a row has more than its contexts
TRIED = 4  # bits with which errors are measured where those of other widths follow from the steps' sizes
STRONGEST = 8  # directions that say how many more bits rows get
SEEN = 1024  # entries of a wide vector that are rounded to see what rounding costs
FED_BACK = 1024  # entries up to which errors are fed back: a root of their moment takes too long beyond


def of_rows(contexts: Precision, more: int) -> Precision:
    """The precision of private rows whose contexts have a given one.

    Args:
        contexts: one of `OPTIONS`.
        more: bits that rows have more, where there are such widths.

    Example:
        >>> str(of_rows(grouped(3, 64), 2)), str(of_rows(grouped(8, 64), 3)), str(of_rows(NATIVE, 2))
        ('int5/64', 'int12/64', 'native')
    """
    if contexts.is_native:
        return NATIVE
    least = min(contexts.settings.bits + more, max(PLANES))
    return grouped(min(bits for bits in PLANES if bits >= least), GROUP)


@dataclass(frozen=True)
class Feedback:
    """What errors are fed back under; None where vectors are rounded plainly.

    Attributes:
        rows: of private rows, H.
        contexts: of contexts, G.
    """

    rows: Statistics | None = None
    contexts: Statistics | None = None

    @classmethod
    def of(cls, metric: Metric) -> Feedback:
        """Under both sides of a metric, where these are known as a whole and not too large."""
        return cls(_known(metric.into), _known(metric.out))


def _known(side: Tensor) -> Statistics | None:
    return Statistics(side, 1) if side.ndim == 2 and len(side) <= FED_BACK else None


def _gain(known: Statistics | None) -> float:
    return 1.0 if known is None or known.second_moment is None else expected_gain(known.second_moment)


@dataclass(frozen=True)
class Noise:
    """What an error of each direction of a site costs, of its row and of its contexts.

    Attributes:
        rows: A `[k, n]`.
        contexts: U^T `[k, o]`.
        into: H, as of a `Metric`, by which errors of rows count.
        out: G, by which errors of contexts count.
        of_rows: U^T G U `[k]`: what each error of a row counts.
        of_contexts: A H A^T `[k]`, of what is left of each error of contexts by rows that are made anew.
    """

    rows: Tensor
    contexts: Tensor
    into: Tensor
    out: Tensor
    of_rows: Tensor
    of_contexts: Tensor

    @classmethod
    def of(cls, found: Factors, metric: Metric, feedback: Feedback) -> Noise:
        """Of directions, the strongest first, under the metric that they were found in."""
        rows, contexts = found.rows, found.contexts.T.contiguous()
        seen = times(contexts, metric.out)
        power = (seen * contexts).sum(1)
        # Directions are orthogonal under G: those up to each one reach that much of what independent errors do.
        reached = (seen.square().sum(1) / power.clamp_min(torch.finfo(power.dtype).tiny)).cumsum(0)
        left = 1 - reached / trace(metric.out)
        if feedback.contexts is not None:  # what is fed back lies elsewhere, as much in any direction
            count, o = torch.arange(1, len(rows) + 1, device=rows.device), len(metric.out)
            left = torch.minimum(left, _gain(feedback.contexts) * (1 - count / o))
        of_contexts = (times(rows, metric.into) * rows).sum(1) * left.clamp_min(1 / len(metric.out))
        return cls(rows, contexts, metric.into, metric.out, _gain(feedback.rows) * power, of_contexts)

    def first(self, count: int) -> Noise:
        """Of the first directions alone."""
        cut = {name: getattr(self, name)[:count] for name in ("rows", "contexts", "of_rows", "of_contexts")}
        return replace(self, **cut)

    def lost(self, precision: Precision, more: int) -> Tensor:
        """What storing each direction costs, in squared error: `[k]`."""
        return self.lost_by_rows(of_rows(precision, more)) + self.lost_by_contexts(precision)

    def lost_by_rows(self, precision: Precision) -> Tensor:
        """What rounding each row costs: `[k]`."""
        return self.of_rows * _rounding(self.rows, self.into, partial(self._stored, precision=precision))

    def lost_by_contexts(self, precision: Precision) -> Tensor:
        """What rounding the contexts of each row costs: `[k]`."""
        stored = partial(self._stored, precision=precision)
        return self.of_contexts * _rounding(self.contexts, self.out, stored)

    @cached_property
    def _stored(self) -> Callable[..., Tensor]:
        """What gives vectors as they are stored in a `precision`; whether values are tame is looked at once."""
        return rounded if is_tame(self.rows) and is_tame(self.contexts) else _checked


def more_bits(noises: Sequence[Noise]) -> int:
    """How many bits rows get more than their contexts, at all sites of a bank.

    With every bit an error falls to a quarter, so the last bit gains as much per byte in rows as in contexts where
    errors per entry are alike.
    """
    tried, found = grouped(TRIED, GROUP), []
    for noise in noises:
        if not len(noise.rows):
            continue
        some = noise.first(STRONGEST)
        rows, contexts = (
            float(each.sum()) for each in (some.lost_by_rows(tried), some.lost_by_contexts(tried))
        )
        if 0 < rows < math.inf and 0 < contexts < math.inf:
            found.append(rows * noise.contexts.shape[1] / (contexts * noise.rows.shape[1]))
    mean = sum(map(math.log2, found)) / (2 * len(found)) if found else 0.0
    return min(max(round(mean), 0), MOST_MORE)


def runs(site: Site, found: Factors, noise: Noise, more: int, rough: bool) -> list[tuple[int, int, Unit]]:
    """Runs of directions of one site, first and last, and their units: left out, or stored with few bits.

    Args:
        site: where they are.
        found: all directions.
        noise: of them.
        more: bits that rows have more than contexts.
        rough: whether one width is measured alone.
    """
    rows, contexts = noise.rows, noise.contexts
    if not len(rows):  # all that there are move nothing
        return []
    few = OPTIONS[-len(WIDTHS) :]
    if rough:  # a step half as large makes a quarter of the error
        tried = grouped(TRIED, GROUP)
        of_row, of_context = noise.lost_by_rows(tried), noise.lost_by_contexts(tried)
        lost = [
            of_row * 4.0 ** (TRIED - of_rows(each, more).settings.bits)
            + of_context * 4.0 ** (TRIED - each.settings.bits)
            for each in few
        ]
    else:
        lost = [noise.lost(each, more) for each in few]  # by precision, of each direction
    lost, energy = [each.cpu() for each in lost], found.energy.cpu()  # of which many sums are taken
    units = []
    for start, stop in pairwise([*(rank for rank in RUNS if rank < len(rows)), len(rows)]):
        nbytes = [
            float(
                expected_bytes((stop - start, rows.shape[1]), rows.dtype, of_rows(each, more))
                + expected_bytes((stop - start, contexts.shape[1]), rows.dtype, each)
            )
            for each in OPTIONS
        ]
        errors = [float(each[start:stop].sum()) for each in lost]
        errors = [0.0, *(share * errors[0] for _, share in FINER), *errors]
        unit = Unit(
            {f"{site.member}/{start}": rows[start:stop]},
            {site.member: 1.0},
            (*OPTIONS, None),
            (*nbytes, 0.0),
            (*errors, float(energy[start:stop].sum())),
        )
        units.append((start, stop, unit))
    return units


def _checked(vectors: Tensor, precision: Precision) -> Tensor:
    """What `rounded` gives, of values that may not be tame."""
    return decode(encode(vectors, precision))


def _rounding(vectors: Tensor, side: Tensor, stored: Callable[[Tensor], Tensor]) -> Tensor:
    """What rounding each vector costs under one side of a metric: `[k]`, for `vectors [k, n]`.

    Of wide ones it is estimated from groups of entries that are spread over them, whose errors are independent.
    """
    n = vectors.shape[1]
    if n < 2 * SEEN:
        wrong = stored(vectors) - vectors
        return (times(wrong, side) * wrong).sum(1)
    first = torch.linspace(0, n // GROUP - 1, SEEN // GROUP, device=vectors.device).long() * GROUP
    seen = (first[:, None] + torch.arange(GROUP, device=vectors.device)).flatten()
    some, diagonal = vectors[:, seen], (side if side.ndim == 1 else side.diagonal())[seen]
    return (stored(some) - some).square() @ diagonal.to(some) * (n / len(seen))
