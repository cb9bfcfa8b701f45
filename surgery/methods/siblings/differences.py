"""Siblings' second way of storing related sites: a matrix that they share, and private rows for what is each one's.

The shared matrix is the members' mean, rounded under the mean of their metrics. Each member's difference from it is
taken apart into directions in the order in which they move its outputs; these come in runs, a unit each, which can be
left out or stored with few bits. Private rows are made for the shared matrix and the contexts as they are stored, so
they make up for their rounding as far as their directions reach.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise

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
from surgery.storage.codecs import (
    NATIVE,
    Encoded,
    Encoding,
    Precision,
    decode,
    encode,
    encode_native,
    expected_bytes,
    grouped,
    is_tame,
    packed,
    rounded,
)
from surgery.util.dtypes import master_dtype

RUNS = (0, 1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128, 160, 192)
"""Ranks between which directions are decided on together."""
GROUP = 64  # entries of a private row that have a scale of their own
BITS = tuple(grouped(bits, GROUP) for bits in (8, 6, 5, 4, 3))  # of private rows; 2 cost more than they save
FINER = ((grouped(12, GROUP), 1 / 110), (grouped(10, GROUP), 1 / 14))
"""Those of private rows beside a shared matrix of more than 8 bits, and what they lose of what 8 bits do: somewhat more
than the square of their steps, as scales have 8 bits themselves."""
TRIED = grouped(4, GROUP)
"""For which errors are measured where those of other widths follow from the steps' sizes."""
TOGETHER = 8192  # rows of a difference that are in memory in double precision
SEEN = 1024  # entries of a wide vector that are rounded to see what rounding costs
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
    """

    site: Site
    original: Tensor
    out: Tensor
    found: Factors


@dataclass(frozen=True)
class Differences:
    """A shared matrix and private rows, as a fit puts them together.

    Attributes:
        relatives: N sites of one shape.
        shape: o, n of the shared matrix M.
        runs: for every unit after the first its relative, and the first and last of its directions.
        common: M, decoded, where it stays as it is stored already.
    """

    relatives: tuple[Relative, ...]
    shape: tuple[int, ...]
    runs: tuple[tuple[int, int, int], ...]
    common: Tensor | None = None
    _made: dict[object, tuple[Encoded, dict[str, Encoded]]] = field(
        default_factory=dict, repr=False, compare=False
    )

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
        contexts, decoded = [], {}
        for precision, own in kept.items():
            whole = torch.cat([self.relatives[i].found.contexts[:, j].T for i, j in own.items()])
            contexts.append(encode(whole.contiguous(), precision))
            each = decode(contexts[-1]).split([len(j) for j in own.values()])
            decoded.update({(precision, i): part for i, part in zip(own, each, strict=True)})
        common = decode(shared) if self.common is None else self.common
        found, left, owner = {"shared": shared}, self._left(common, decoded), []
        for k, (precision, own) in enumerate(kept.items()):
            rows = encode(torch.cat([left[precision, i] for i in own]), precision)
            found[f"contexts.{k}"], found[f"rows.{k}"] = _kept(contexts[k]), _kept(rows)
            owner += [i for i, directions in own.items() for _ in directions]
        if owner:
            found["owner"] = encode_native(torch.tensor(owner).to(index_dtype(len(self.relatives))))
        return found

    def _left(
        self, shared: Tensor, contexts: Mapping[tuple[Precision, int], Tensor]
    ) -> dict[tuple[Precision, int], Tensor]:
        """Private rows by precision and relative: of least cost for contexts and a shared matrix as they are stored."""
        found = {}
        for i, relative in enumerate(self.relatives):
            mine = {key: part for key, part in contexts.items() if key[1] == i}
            if not mine:
                continue
            stored = torch.cat([*mine.values()])
            seen = times(stored.double(), relative.out)
            rest = _product_with_difference(seen, relative, shared)
            rows = torch.linalg.lstsq(seen @ stored.double().T, rest).solution.to(shared.dtype)
            found.update(zip(mine, rows.split([len(part) for part in mine.values()]), strict=True))
        return found


def _kept(encoded: Encoded) -> Encoded:
    """Packed, in files where it is large: without rounding all private rows take as much as the members."""
    encoded = packed(encoded)
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
        _priced(shared, site, original, metric, _most(site))
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
    found = _priced(shared, site, original, metric, _most(site), least)
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
class _Priced:
    """A relative, a unit for every run of its directions, and what all of them leave out."""

    relative: Relative
    runs: list[tuple[int, int, Unit]]
    left: float


def _priced(
    shared: Tensor, site: Site, original: Tensor, metric: Metric, most: int, least: float | None = None
) -> _Priced:
    """A site's difference from a shared matrix, by directions; of its metric G alone is needed later.

    Args:
        shared: M `[o, n]`.
        site: where it is.
        original: its weight.
        metric: what errors in it cost.
        most: number of directions, at most.
        least: directions that move outputs by less, together, are left out before they are tried, and the others are
            tried in one precision.
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
    return _Priced(
        Relative(site, original, metric.out, found), _runs(site, found, metric, rough=least is not None), left
    )


def _arranged(
    found: Sequence[_Priced], shape: Sequence[int], unit: Unit, fixed: float, common: Tensor | None = None
) -> Arrangement:
    """A shared matrix, whose unit is given, and private rows."""
    units, runs, left = [unit], [], {}
    for i, each in enumerate(found):
        for start, stop, own in each.runs:
            units.append(own)
            runs.append((i, start, stop))
        member = each.relative.site.member
        left[member] = left.get(member, 0.0) + each.left
    units.append(Unit({}, left, (NATIVE,), (0.0,), (1.0,)))
    relatives = tuple(each.relative for each in found)
    return Arrangement(tuple(units), fixed, (Differences(relatives, tuple(shape), tuple(runs), common),))


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


def _runs(site: Site, made: Factors, metric: Metric, rough: bool) -> list[tuple[int, int, Unit]]:
    """Runs of directions of one site, first and last, and their units: left out, or stored with few bits.

    Args:
        site: where they are.
        made: all directions.
        metric: what errors cost.
        rough: whether one width is measured alone.
    """
    rows, contexts = made.rows, made.contexts.T.contiguous()
    if not len(rows):  # all that there are move nothing
        return []
    into, out = metric.into, metric.out
    of_rows = (times(contexts, out) * contexts).sum(1)  # an error of a row counts that much
    of_contexts = (times(rows, into) * rows).sum(1)
    stored = rounded if is_tame(rows) and is_tame(contexts) else _checked

    def costs(precision: Precision) -> Tensor:
        how = partial(stored, precision=precision)
        return of_rows * _rounding(rows, into, how) + of_contexts * _rounding(contexts, out, how)

    if rough:  # a step half as large makes a quarter of the error
        one = costs(TRIED)
        lost = [one * 4.0 ** (TRIED.settings.bits - each.settings.bits) for each in BITS]
    else:
        lost = [costs(each) for each in BITS]  # by precision, of each direction
    lost, energy = [each.cpu() for each in lost], made.energy.cpu()  # of which many sums are taken
    options = (NATIVE, *(finer for finer, _ in FINER), *BITS)
    found = []
    for start, stop in pairwise([*(rank for rank in RUNS if rank < len(rows)), len(rows)]):
        shapes = (stop - start, rows.shape[1]), (stop - start, contexts.shape[1])
        nbytes = [sum(expected_bytes(shape, rows.dtype, each) for shape in shapes) for each in options]
        errors = [float(each[start:stop].sum()) for each in lost]
        errors = [0.0, *(share * errors[0] for _, share in FINER), *errors]
        unit = Unit(
            {f"{site.member}/{start}": rows[start:stop]},
            {site.member: 1.0},
            (*options, None),
            (*map(float, nbytes), 0.0),
            (*errors, float(energy[start:stop].sum())),
        )
        found.append((start, stop, unit))
    return found


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
