"""The codec of rows in several precisions: grouped integers of more bits for rows that matter more.

A table of embeddings is looked up row by row, some rows often and most of them hardly ever, so bits pay in some rows
and not in others. Rows are ranked by what an error of theirs costs; the first ones get most bits, the next ones fewer.
Which row is in which class is stored in a byte for each row; of each class there is what `integers` stores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from surgery.storage.codecs.codec import Codec, Encoded, Layout, Precision, Statistics
from surgery.storage.codecs.integers import Grouping, Integers
from surgery.util.memory import compact

MOST = 255  # classes
MEANS = (2.1, 2.25, 2.4, 2.6, 2.8, 3.0, 3.25, 3.5, 3.8, 4.2, 4.6, 5.0, 5.5, 6.0, 7.0)
"""Mean bits of a row for which a fit has a choice of classes."""
STEPS = 60  # of bisection


@dataclass(frozen=True)
class Classes:
    """How many rows have how many bits.

    Attributes:
        group: number of neighbouring values to one scale.
        rows: bits and number of rows of each class, the finest first.
    """

    group: int
    rows: tuple[tuple[int, int], ...]

    @property
    def count(self) -> int:
        """Rows of all classes."""
        return sum(count for _, count in self.rows)

    @property
    def bits(self) -> float:
        """The mean of all rows, without scales."""
        return sum(bits * count for bits, count in self.rows) / self.count


def by_row(group: int, rows: Sequence[tuple[int, int]]) -> Precision:
    """The precision of rows in several widths.

    Args:
        group: number of neighbouring values to one scale.
        rows: bits and number of rows of each class, the finest first.

    Example:
        >>> str(by_row(64, [(8, 10), (4, 30)]))
        'mixed5.0/64:8x10,4x30'
    """
    return Precision(Mixed.name, Classes(group, tuple(rows)))


class Mixed(Codec[Classes]):
    """Grouped integers whose bits differ from row to row."""

    name = "mixed"
    form = "mixedMEAN/GROUP:BxROWS,BxROWS... of widths B as of int"

    def encode(
        self, tensor: Tensor, settings: Classes, statistics: Statistics | None = None
    ) -> Mapping[str, Tensor]:
        """`class`, of each row, and the parts of every class as `0.q4`, `0.scale`, `1.q2`, ..."""
        self.layout(tuple(tensor.shape), tensor.dtype, settings)
        which = classes_of(tensor, settings, statistics)
        parts: dict[str, Tensor] = {"class": which}
        for number, precision in enumerate(_precisions(settings)):
            found = _INTEGERS.encode(tensor[which == number], precision, statistics)
            parts |= {f"{number}.{name}": part for name, part in found.items()}
        return parts

    def decode(self, encoded: Encoded) -> Tensor:
        """The rows of every class in their places."""
        which = encoded.parts["class"]
        values = torch.empty(encoded.shape, dtype=encoded.dtype, device=which.device)
        for number, part in enumerate(_each(encoded)):
            values[which == number] = _INTEGERS.decode(part)
        return compact(values)

    def layout(self, shape: tuple[int, ...], dtype: torch.dtype, settings: Classes) -> Layout:
        """A byte for each row, and what `integers` makes of every class.

        Raises:
            ValueError: where the shape has not as many rows as the classes.
        """
        if len(shape) < 2 or shape[0] != settings.count:
            raise ValueError(
                f"rows of a tensor of shape {shape} must be as many as those of classes, {settings.count}"
            )
        found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {"class": (torch.uint8, (shape[0],))}
        for number, ((_, count), precision) in enumerate(
            zip(settings.rows, _precisions(settings), strict=True)
        ):
            inner = _INTEGERS.layout((count, *shape[1:]), dtype, precision)
            found |= {f"{number}.{name}": each for name, each in inner.items()}
        return found

    def take_rows(self, encoded: Encoded, rows: Tensor) -> Mapping[str, Tensor]:
        """The class of each row, and of each class its rows; a class without any is left out."""
        which = encoded.parts["class"][rows]
        place = torch.empty(encoded.shape[0], dtype=torch.long, device=which.device)
        parts, kept = {}, 0
        taken = torch.zeros_like(which)
        for number, part in enumerate(_each(encoded)):
            own = encoded.parts["class"] == number
            place[own] = torch.arange(int(own.sum()), device=which.device)
            mine = which == number
            if not bool(mine.any()):
                continue
            taken[mine] = kept
            found = _INTEGERS.take_rows(part, place[rows][mine])
            parts |= {f"{kept}.{name}": each for name, each in found.items()}
            kept += 1
        return {"class": taken, **parts}

    def of_rows(self, encoded: Encoded, rows: Tensor) -> Classes:
        """Those of the classes of which rows are taken."""
        which = encoded.parts["class"][rows]
        counts = torch.bincount(which.long(), minlength=len(encoded.precision.settings.rows)).tolist()
        bits = [each for each, _ in encoded.precision.settings.rows]
        own = tuple((b, count) for b, count in zip(bits, counts, strict=True) if count)
        return replace(encoded.precision.settings, rows=own)

    def pieces(self, shape: tuple[int, ...], settings: Classes) -> list[tuple[Precision, tuple[int, ...]]]:
        """A tensor for each class."""
        each = zip(settings.rows, _precisions(settings), strict=True)
        return [(Precision(Integers.name, own), (count, *shape[1:])) for (_, count), own in each]

    def has_streams(self, settings: Classes) -> bool:
        """Those of every class."""
        return True

    def streams(self, encoded: Encoded) -> list[Tensor]:
        """The class of each row, then the streams of every class."""
        inner = [stream for part in _each(encoded) for stream in _INTEGERS.streams(part)]
        return [encoded.parts["class"], *inner]

    def stream_sizes(self, shape: tuple[int, ...], dtype: torch.dtype, settings: Classes) -> list[int]:
        """A byte for each row, then those of every class."""
        classes = zip(settings.rows, _precisions(settings), strict=True)
        inner = [_INTEGERS.stream_sizes((count, *shape[1:]), dtype, each) for (_, count), each in classes]
        return [shape[0], *(size for sizes in inner for size in sizes)]

    def from_streams(
        self, streams: Sequence[Tensor], shape: tuple[int, ...], dtype: torch.dtype, settings: Classes
    ) -> Mapping[str, Tensor]:
        """The class of each row, and the parts of every class."""
        parts, place = {"class": streams[0]}, 1
        for number, ((_, count), each) in enumerate(zip(settings.rows, _precisions(settings), strict=True)):
            own = (count, *shape[1:])
            stop = place + len(_INTEGERS.stream_sizes(own, dtype, each))
            found = _INTEGERS.from_streams(streams[place:stop], own, dtype, each)
            parts |= {f"{number}.{name}": part for name, part in found.items()}
            place = stop
        return parts

    def write(self, settings: Classes) -> str:
        """The mean of all bits, the group, and bits and rows of each class: `5.0/64:8x10,4x30`."""
        classes = ",".join(f"{bits}x{count}" for bits, count in settings.rows)
        return f"{settings.bits:.1f}/{settings.group}:{classes}"

    def read(self, text: str) -> Classes:
        """The inverse of `write`."""
        group, _, classes = text.partition("/")[2].partition(":")
        pairs = [each.partition("x") for each in classes.split(",")]
        found = Classes(int(group), tuple((int(bits), int(count)) for bits, _, count in pairs))
        for bits, count in found.rows:
            _INTEGERS.read(f"{bits}/{found.group}")
            if count < 1:
                raise ValueError(f"every class must have a row, found {classes}")
        if len(found.rows) > MOST or self.write(found) != text:
            raise ValueError(f"'{text}' must be {self.form.removeprefix(self.name)}")
        return found

    def span(self, settings: Classes) -> int:
        """A group."""
        return settings.group

    def fault(self, parts: Mapping[str, Tensor]) -> str:
        """Every row must be of a class, as many of each as it has; scales must be finite."""
        which = parts["class"].long()
        scales = [each for name, each in parts.items() if name.endswith(".scale")]
        if not all(bool(each.isfinite().all()) for each in scales):
            return "scales that are NaN or infinite"
        groups = sum(len(each) for each in scales) // max(len(which), 1)
        counts = torch.bincount(which, minlength=len(scales)) * groups
        return (
            "" if counts.tolist() == [len(each) for each in scales] else "rows of other classes than it has"
        )


def classes_of(tensor: Tensor, settings: Classes, statistics: Statistics | None = None) -> Tensor:
    """The class of each row of a tensor, uint8: rows that cost most if they are wrong are in the first."""
    cost = row_costs(tensor, None if statistics is None else statistics.rows)
    rank = torch.empty(len(tensor), dtype=torch.long, device=tensor.device)
    rank[torch.argsort(cost, descending=True, stable=True)] = torch.arange(len(tensor), device=tensor.device)
    stops = torch.tensor([count for _, count in settings.rows], device=tensor.device).cumsum(0)
    return torch.bucketize(rank, stops, right=True).to(torch.uint8)


def row_costs(tensor: Tensor, weights: Tensor | None) -> Tensor:
    """What each row costs if it is wrong by a share of itself: its squares, times its weight where that is known."""
    power = tensor.reshape(len(tensor), -1).float().square().sum(1)
    return power if weights is None else power * weights.to(power)


def mixtures(
    costs: Tensor, options: Sequence[Precision | None], losses: Sequence[float]
) -> list[tuple[Precision, float]]:
    """Precisions by row that cost least for their bytes, and what each costs.

    Args:
        costs: `[o]`, what each row costs if it is wrong by as much as it is, as `row_costs` gives them.
        options: of which classes may be made; only grouped integers with the group of the first of them are.
        losses: squared error over squared values that each option leaves.

    Example:
        >>> from surgery.storage.codecs import grouped
        >>> options = [grouped(bits, 64) for bits in (8, 2)]
        >>> found = mixtures(torch.tensor([1e6, 1.0, 1.0, 1.0]), options, [0.0, 0.1])
        >>> str(found[0][0]), round(found[0][1], 2)
        ('mixed3.5/64:8x1,2x3', 0.3)
    """
    able = [
        (each.settings.bits, loss, each.settings.group)
        for each, loss in zip(options, losses, strict=True)
        if each is not None and each.name == Integers.name
    ]
    able = sorted(((bits, loss) for bits, loss, group in able if group == able[0][2]), reverse=True)
    if len(able) < 2 or not float(costs.sum()) > 0:
        return []
    group = next(each.settings.group for each in options if each is not None and each.name == Integers.name)
    hull = _hull(able)
    # What a bit more gains, in classes from the coarsest.
    gains = [(loss - least) / (more - few) for (few, loss), (more, least) in pairwise(hull)]
    rising = costs.double().cpu().sort().values
    sums = torch.cat([rising.new_zeros(1), rising.cumsum(0)])
    found: dict[tuple[int, ...], tuple[Precision, float]] = {}
    for mean in MEANS:
        stops = _stops(rising, [bits for bits, _ in hull], gains, mean)
        rows = [(bits, last - first) for (bits, _), (first, last) in zip(hull, pairwise(stops), strict=True)]
        if sum(count > 0 for _, count in rows) > 1:
            lost = sum(
                loss * float(sums[last] - sums[first])
                for (_, loss), (first, last) in zip(hull, pairwise(stops), strict=True)
            )
            found[tuple(stops)] = by_row(group, [each for each in reversed(rows) if each[1]]), lost
    return list(found.values())


def _hull(options: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Bits and losses of the options that are best for some price of a bit, the coarsest first."""
    left = sorted(options)
    found = [min(left)]
    while finer := [each for each in left if each[0] > found[-1][0] and each[1] < found[-1][1]]:
        bits, loss = found[-1]
        found.append(max(finer, key=lambda each: ((loss - each[1]) / (each[0] - bits), each[0])))
    return found


def _stops(rising: Tensor, bits: Sequence[int], gains: Sequence[float], mean: float) -> list[int]:
    """Where classes begin and end in rows by rising cost, for about `mean` bits of a row and no more where possible."""
    low, high = -200.0, 200.0
    stops: list[int] = []
    for _ in range(STEPS):
        price = 2.0 ** ((low + high) / 2)
        ends = torch.searchsorted(rising, torch.tensor([price / gain for gain in gains], dtype=rising.dtype))
        stops = [0, *ends.tolist(), len(rising)]
        now = sum(b * (last - first) for b, (first, last) in zip(bits, pairwise(stops), strict=True))
        if now > mean * len(rising):
            low = (low + high) / 2
        else:
            high = (low + high) / 2
    return stops


def _precisions(settings: Classes) -> list[Grouping]:
    return [Grouping(bits, settings.group) for bits, _ in settings.rows]


def _each(encoded: Encoded) -> list[Encoded]:
    """Every class as a tensor of its own."""
    settings: Classes = encoded.precision.settings
    found = []
    for number, ((_, count), own) in enumerate(zip(settings.rows, _precisions(settings), strict=True)):
        mark = f"{number}."
        parts = {name.removeprefix(mark): p for name, p in encoded.parts.items() if name.startswith(mark)}
        found.append(
            Encoded(Precision(Integers.name, own), (count, *encoded.shape[1:]), encoded.dtype, parts)
        )
    return found


_INTEGERS = Integers()
