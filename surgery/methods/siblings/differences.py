"""Siblings' second way of storing related sites: a matrix that they share, and private rows for what is each one's.

The shared matrix is the members' mean, rounded under the mean of their metrics. Each member's difference from it is
taken apart into directions in the order in which they move its outputs; these come in runs, a unit each, which can be
left out or stored with few bits. Private rows are made for the shared matrix and the contexts as they are stored, so
they make up for their rounding as far as their directions reach.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from surgery.anatomy.plan import BankPlan, Placement
from surgery.anatomy.sites import Site
from surgery.core.dictionary import index_dtype
from surgery.disk.aside import put_aside, stack_aside
from surgery.disk.journal import Made as Kept
from surgery.disk.journal import keeps, made_once
from surgery.fitting.metric import Metric, mean_statistics, times
from surgery.fitting.related import register_way
from surgery.fitting.scene import Scene, key_of
from surgery.fitting.tables import TABLE, by_rows, row_weights
from surgery.fitting.units import (
    BANK_BYTES,
    GATHERED_BYTES,
    PART_BYTES,
    Arrangement,
    Unit,
    fed_back,
    measure,
)
from surgery.geometry.blocks import BlockGrid
from surgery.handles.handle import Made
from surgery.handles.state import LazyState
from surgery.methods.siblings.lowrank import Factors, factors
from surgery.methods.siblings.private import RUNS, Feedback, Noise, more_bits, of_rows, runs
from surgery.storage.codecs import (
    NATIVE,
    Encoded,
    Encoding,
    Precision,
    decode,
    encode,
    encode_native,
    encode_together,
    packed,
    stack_rows,
    take_rows,
)
from surgery.util.dtypes import master_dtype

TOGETHER = 8192  # rows of a difference that are in memory in double precision
MOST_OF_TABLE = 64  # directions of a table: each has a context for every row
MADE = 2  # banks that are kept while a fit tries others
NOTHING = 1e-3  # of the squared error that is allowed: what all sites may leave out that is never tried


@dataclass(frozen=True)
class Relative:
    """One site, and the directions of its difference from what is shared.

    Attributes:
        site: where it is.
        original: its weight, in its own shape and dtype.
        out: what errors cost by its outputs: `[o, o]` or `[o]`, as of a `Metric`.
        found: the directions.
        feedback: what their errors are fed back under.
    """

    site: Site
    original: Tensor
    out: Tensor
    found: Factors
    feedback: Feedback


@dataclass(frozen=True)
class Differences:
    """A shared matrix and private rows, as a fit puts them together.

    Attributes:
        relatives: N sites of one shape.
        shape: o, n of the shared matrix M.
        runs: for every unit after the first its relative, and the first and last of its directions.
        more: bits that private rows have more than their contexts.
        common: M, decoded, where it stays as it is stored already.
    """

    relatives: tuple[Relative, ...]
    shape: tuple[int, ...]
    runs: tuple[tuple[int, int, int], ...]
    more: int
    common: Tensor | None = None
    _made: dict[object, tuple[Encoded, dict[str, Encoded]]] = field(
        default_factory=dict, repr=False, compare=False
    )
    _contexts: dict[tuple[Precision, int], Encoded] = field(default_factory=dict, repr=False, compare=False)

    @property
    def count(self) -> int:
        """The shared matrix, and all runs."""
        return 1 + len(self.runs)

    def assemble(
        self, number: int, parts: Sequence[Encoding | None]
    ) -> tuple[BankPlan, list[Placement], dict[str, Encoded]]:
        """The bank: private rows of one precision are one part; what a fit tries again is not made again."""
        first, o, n = self.relatives[0].site, *self.shape
        asked = tuple(part and part.precision for part in parts)
        assert parts[0] is not None
        shared = parts[0].encode()
        known = self._made.get(asked)
        if known is None or known[0] is not shared:
            if len(self._made) == MADE:
                del self._made[next(iter(self._made))]
            known = self._made[asked] = (shared, self._parts(shared, asked[1:]))
        key = f"1x{n}-{first.dtype}-{number}"
        plan = BankPlan(key, (1, n), 1, first.dtype, o * len(self.relatives), method="siblings")
        grid = BlockGrid(*first.view.shape, 1, n)
        placements = [Placement(r.site, key, grid, i * o) for i, r in enumerate(self.relatives)]
        return plan, placements, dict(known[1])

    def _parts(self, shared: Encoded, precisions: Sequence[Precision | None]) -> dict[str, Encoded]:
        kept: dict[Precision, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
        for (i, start, stop), precision in zip(self.runs, precisions, strict=True):
            if precision is not None:
                kept[precision][i] += range(start, stop)
        common = decode(shared) if self.common is None else self.common
        contexts: dict[Precision, list[Encoded]] = defaultdict(list)
        rows: dict[Precision, list[Encoded]] = defaultdict(list)
        for i in range(len(self.relatives)):
            mine = {precision: own[i] for precision, own in kept.items() if i in own}
            made = self._encoded_contexts(i, mine)
            for precision, encoded in made.items():
                contexts[precision].append(encoded)
            for precision, encoded in self._encoded_rows(i, common, made).items():
                rows[precision].append(encoded)
        found, owner = {"shared": shared}, []
        for k, (precision, own) in enumerate(kept.items()):
            found[f"contexts.{k}"] = _kept(stack_rows(contexts[precision]))
            found[f"rows.{k}"] = _kept(stack_rows(rows[precision]))
            owner += [i for i in sorted(own) for _ in own[i]]
        if owner:
            found["owner"] = encode_native(torch.tensor(owner).to(index_dtype(len(self.relatives))))
        return found

    def _encoded_contexts(self, i: int, kept: Mapping[Precision, list[int]]) -> dict[Precision, Encoded]:
        """Contexts `[k, o]` of the directions of a relative that are kept, by precision.

        With error feedback, those of all directions are encoded at once where any are, for whatever is kept later.
        """
        relative = self.relatives[i]
        contexts, out = relative.found.contexts.T, relative.feedback.contexts
        if out is None:
            return {
                precision: encode(contexts[own].contiguous(), precision) for precision, own in kept.items()
            }
        new = [precision for precision in kept if (precision, i) not in self._contexts]
        made = encode_together([contexts.contiguous()] * len(new), new, out)
        self._contexts.update({(p, i): _aside(each) for p, each in zip(new, made, strict=True)})
        places = {precision: torch.tensor(own, device=contexts.device) for precision, own in kept.items()}
        return {precision: take_rows(self._contexts[precision, i], own) for precision, own in places.items()}

    def _encoded_rows(
        self, i: int, shared: Tensor, contexts: Mapping[Precision, Encoded]
    ) -> dict[Precision, Encoded]:
        """Private rows of a relative: of least cost for contexts and a shared matrix as they are stored."""
        if not contexts:
            return {}
        relative = self.relatives[i]
        stored = torch.cat([decode(each) for each in contexts.values()])
        seen = times(stored.double(), relative.out)
        rest = _product_with_difference(seen, relative, shared)
        rows = torch.linalg.lstsq(seen @ stored.double().T, rest).solution.to(shared.dtype)
        each = rows.split([part.shape[0] for part in contexts.values()])
        made = encode_together(
            each, [of_rows(precision, self.more) for precision in contexts], relative.feedback.rows
        )
        return dict(zip(contexts, made, strict=True))


def _kept(encoded: Encoded) -> Encoded:
    """Packed, in files where it is large: without rounding all private rows take as much as the members."""
    return _aside(packed(encoded))


def _aside(encoded: Encoded) -> Encoded:
    return replace(encoded, parts={name: put_aside(part) for name, part in encoded.parts.items()})


def _product_with_difference(seen: Tensor, relative: Relative, shared: Tensor) -> Tensor:
    """`seen [r, o]` times the difference `[o, n]`, float64; that of a large table is never there as a whole."""
    rows, found = relative.site.view.to_matrices(relative.original).flatten(0, 1), None
    pieces = zip(seen.split(TOGETHER, 1), rows.split(TOGETHER), shared.split(TOGETHER), strict=True)
    for part, own, common in pieces:
        product = part @ (own.to(shared.dtype) - common).double()
        found = product if found is None else found.add_(product)
    assert found is not None
    return found


@register_way("differences")
def shared_matrix(scene: Scene, sites: Sequence[Site]) -> Arrangement:
    """Related sites as a shared matrix, one unit, and private rows, a unit for every run of directions."""
    originals = [scene.originals[key_of(site)] for site in sites]

    def mean() -> Tensor:
        return stack_aside(len(sites), (_matrix(*each) for each in zip(sites, originals, strict=True))).mean(
            0
        )

    shared, metrics = mean(), [scene.metric(site) for site in sites]
    weights: list[Tensor] = []
    if sites[0].kind == TABLE:
        apart = (_matrix(*each) - shared for each in zip(sites, originals, strict=True))
        weights = _weights_of_rows(scene, sites, metrics, apart)
        metrics = [_by_rows(metric, own) for metric, own in zip(metrics, weights, strict=True)]
    found = [
        _found(shared, site, original, metric, _most(site))
        for site, original, metric in zip(sites, originals, metrics, strict=True)
    ]
    unit = _shared_unit(shared, [site.member for site in sites], metrics)
    if weights:
        unit = by_rows(unit, torch.stack(weights).mean(0))
    # It is as large as an original: those that are tried are made again.
    again = Made(tuple(shared.shape), shared.dtype, shared.device, mean)
    unit = replace(unit, tensors=LazyState(dict.fromkeys(unit.tensors, again)))
    return _arranged(found, shared.shape, unit, BANK_BYTES + 4 * PART_BYTES)


def added_site(scene: Scene, site: Site, stored: Encoded) -> Arrangement:
    """One more site as a shared matrix that stays as it is stored, a unit that costs nothing, and private rows."""
    original, common = scene.originals[key_of(site)], decode(stored)
    shared = common.to(original.device, master_dtype(original.dtype))
    # Trying directions in all precisions takes longer than finding them: those that move nothing are left out before.
    least = NOTHING * (scene.target.max_error or 0.0) ** 2 / len(scene.sites)
    metric = scene.metric(site)
    if site.kind == TABLE and site.member in scene.calibrated:
        # How far a row is from what is stored says how that was rounded, and not how far it was moved.
        weights = row_weights(metric.rows, torch.zeros_like(metric.rows), scene.uses_of(key_of(site)))
        metric = _by_rows(metric, weights)
    found = _found(shared, site, original, metric, _most(site), least)
    unit = Unit({"shared": shared}, {}, (stored.precision,), (0.0,), (0.0,))
    return _arranged([found], shared.shape, unit, 4 * GATHERED_BYTES, common)


def _weights_of_rows(
    scene: Scene, sites: Sequence[Site], metrics: Sequence[Metric], differences: Iterable[Tensor]
) -> list[Tensor]:
    """What an error of each row of a table counts, `[o]` for each member's."""
    moved = torch.stack([each.square().sum(1) for each in differences]).sum(0)
    known = all(site.member in scene.calibrated for site in sites)
    return [
        row_weights(metric.rows if known else None, moved, scene.uses_of(key_of(site)))
        for site, metric in zip(sites, metrics, strict=True)
    ]


def _by_rows(metric: Metric, weights: Tensor) -> Metric:
    """With what rows count where of the outputs a diagonal alone is known, which data draw that use few rows."""
    return metric if metric.out.ndim == 2 else replace(metric, out=weights)


@dataclass(frozen=True)
class _Found:
    """A relative, what errors of its directions cost, and what all of them leave out."""

    relative: Relative
    noise: Noise
    left: float


def _found(
    shared: Tensor, site: Site, original: Tensor, metric: Metric, most: int, least: float | None = None
) -> _Found:
    """A site's difference from a shared matrix, by directions.

    Args:
        shared: M `[o, n]`.
        site: where it is.
        original: its weight.
        metric: what errors in it cost.
        most: number of directions, at most.
        least: directions that move outputs by less, together, are left out before they are tried.
    """

    def made() -> Kept:
        difference = _matrix(site, original) - shared
        found = factors(difference, metric.into, metric.out, most=most)
        if least is not None:
            found = found.first(int((found.tails[:-1] > least).sum()))
        left = metric.price(difference - found.product())
        parts = {"contexts": found.contexts, "rows": found.rows, "energy": found.energy}
        # A journal keeps rows one after the other, and products depend on the order of memory in their last bits.
        turned = [name for name, part in parts.items() if part.ndim == 2 and part.stride(0) == 1]
        parts = {name: part.T if name in turned else part for name, part in parts.items()}
        return [left, turned], parts if keeps() else {name: put_aside(part) for name, part in parts.items()}

    (left, turned), parts = made_once(f"directions/{site.member}/{site.name}", made, original.device)
    found = Factors(**{name: part.T if name in turned else part for name, part in parts.items()})
    feedback = Feedback.of(metric)
    return _Found(
        Relative(site, original, metric.out, found, feedback), Noise.of(found, metric, feedback), left
    )


def _arranged(
    found: Sequence[_Found], shape: Sequence[int], unit: Unit, fixed: float, common: Tensor | None = None
) -> Arrangement:
    """A shared matrix, whose unit is given, and private rows; where it is stored already, one width is measured."""
    units, spans, left = [unit], [], {}
    more = more_bits([each.noise for each in found])
    for i, each in enumerate(found):
        site = each.relative.site
        for start, stop, own in runs(site, each.relative.found, each.noise, more, rough=common is not None):
            units.append(own)
            spans.append((i, start, stop))
        left[site.member] = left.get(site.member, 0.0) + each.left
    units.append(Unit({}, left, (NATIVE,), (0.0,), (1.0,)))
    relatives = tuple(each.relative for each in found)
    bank = Differences(relatives, tuple(shape), tuple(spans), more, common)
    return Arrangement(tuple(units), fixed, (bank,))


def _matrix(site: Site, original: Tensor) -> Tensor:
    """A weight as one matrix of all its rows, in the dtype of calculations."""
    return site.view.to_matrices(original).flatten(0, 1).to(master_dtype(original.dtype))


def _most(site: Site) -> int:
    """Directions that are worth finding: of a table few are strong, and each has a context for every row."""
    return MOST_OF_TABLE if site.kind == TABLE else RUNS[-1]


def _shared_unit(shared: Tensor, members: Sequence[str], metrics: Sequence[Metric]) -> Unit:
    """The shared matrix in every precision, rounded with error feedback."""
    weight: dict[str, float] = defaultdict(float)
    for member, metric in zip(members, metrics, strict=True):
        weight[member] += metric.sensitivity
    unit, known = measure({"shared": shared}, dict(weight)), mean_statistics(metrics)
    return unit if known is None else fed_back(unit, known)
