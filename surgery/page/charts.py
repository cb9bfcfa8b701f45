"""Charts as inline SVG without a style attribute: colours come from classes, so a page has a light and a dark face.

Every string is escaped here; a chart names its axes and their units.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from markupsafe import Markup

WIDTH, HEIGHT = 420, 240  # of a chart, in its own units: one is a pixel on a phone
LEFT, RIGHT, TOP, BOTTOM = 50, 12, 10, 40
COLOURS = 8  # classes c0 to c7


@dataclass(frozen=True)
class Series:
    """One line of a chart: its label, its points, its colour's number, and whether it is dashed."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0
    dashed: bool = False


def lines(
    series: Sequence[Series], title: str, x_label: str, y_label: str, logarithmic: bool = False,
    most: float | None = None, mark: float | None = None,
) -> Markup:  # fmt: skip
    """A line chart.

    Args:
        series: what is drawn; values that are not finite are left out, of a logarithmic chart those below 0 too.
        title: for readers that do not see it.
        x_label: of the axis, with its unit.
        y_label: of the axis, with its unit.
        logarithmic: whether the y axis is.
        most: the upper end of the y axis; the lower one is then 0.
        mark: a place on the x axis to mark as kept.
    """
    points = [
        [
            (x, y)
            for x, y in zip(each.x, each.y, strict=True)
            if math.isfinite(y) and (y > 0 or not logarithmic)
        ]
        for each in series
    ]
    flat = [point for each in points for point in each]
    if not flat:
        return Markup("")
    x0, x1 = min(x for x, _ in flat), max(x for x, _ in flat)
    low, high = min(y for _, y in flat), max(y for _, y in flat)
    if most is not None:
        low, high = 0.0, max(most, high)
    ticks = _decades(low, high) if logarithmic else _ticks(low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])
    across = _scale(x0, x1 if x1 > x0 else x0 + 1, LEFT, WIDTH - RIGHT)
    ends = (_log(low), _log(high)) if logarithmic else (low, high)
    down = _scale(ends[0], ends[1], HEIGHT - BOTTOM, TOP)
    place: Callable[[float], float] = (lambda y: down(_log(y))) if logarithmic else down
    parts = [_grid(place(tick), f"{tick:.4g}") for tick in ticks]
    whole = [tick for tick in _ticks(x0, x1) if tick == int(tick) and x0 <= tick <= x1] or [x0]
    parts += [_below(across(tick), f"{tick:.0f}") for tick in whole]
    if mark is not None and x0 <= mark <= x1:
        at = across(mark)
        parts.append(f'<path class="mark" d="M{at:.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
        end = ' text-anchor="end"' if at > WIDTH / 2 else ""
        parts.append(f'<text class="tick" x="{at + (-4 if end else 4):.1f}" y="{TOP + 9}"{end}>kept</text>')
    for each, found in zip(series, points, strict=True):
        way = "L".join(f"{across(x):.1f} {place(y):.1f}" for x, y in found)
        style = f"line s{each.colour % COLOURS}{' dashed' if each.dashed else ''}"
        if len(found) > 1:
            parts.append(f'<path class="{style}" d="M{way}"><title>{escape(each.label)}</title></path>')
        elif found:
            x, y = found[0]
            parts.append(
                f'<circle class="f{each.colour % COLOURS}" cx="{across(x):.1f}" cy="{place(y):.1f}" r="3"/>'
            )
    return _chart(title, x_label, y_label, parts)


def columns(
    values: Sequence[tuple[str, str, float]], title: str, x_label: str, y_label: str, most: float
) -> Markup:
    """A column for each value, given as its name, its colour's class and its height."""
    if not values:
        return Markup("")
    ticks = _ticks(0, most)
    down = _scale(0, max(most, ticks[-1]), HEIGHT - BOTTOM, TOP)
    step = (WIDTH - LEFT - RIGHT) / len(values)
    wide = max(step - min(2.0, step * 0.2), 0.5)
    parts = [_grid(down(tick), f"{tick:.4g}") for tick in ticks]
    for k, (name, colour, value) in enumerate(values):
        top = down(value)
        parts.append(
            f'<rect class="{escape(colour)}" x="{LEFT + k * step:.2f}" y="{top:.1f}" width="{wide:.2f}" '
            f'height="{max(HEIGHT - BOTTOM - top, 0.5):.1f}"><title>{escape(name)}</title></rect>'
        )
    return _chart(title, x_label, y_label, parts)


def bar(
    parts: Sequence[tuple[str, str, float]], whole: float, ghost: float = 0.0, mark: float | None = None
) -> Markup:
    """A horizontal bar as wide as its place: parts by their name, colour's class and size, on a grey one of `ghost`.

    Args:
        parts: from left to right.
        whole: what the full width stands for.
        ghost: size of the grey bar behind.
        mark: a size to mark by a line.
    """
    whole = whole or 1.0
    found = (
        [f'<rect class="ghost" x="0" y="2" width="{100 * ghost / whole:.3f}%" height="16"/>'] if ghost else []
    )
    at = 0.0
    for name, colour, size in parts:
        width = 100 * size / whole
        found.append(
            f'<rect class="{escape(colour)}" x="{at:.3f}%" y="2" width="{width:.3f}%" height="16">'
            f"<title>{escape(name)}</title></rect>"
        )
        at += width
    if mark is not None:
        place = min(100 * mark / whole, 99.8)
        found.append(f'<line class="mark" x1="{place:.3f}%" x2="{place:.3f}%" y1="0" y2="20"/>')
    return Markup(f'<svg class="bar" width="100%" height="20" aria-hidden="true">{"".join(found)}</svg>')


def grid(values: Sequence[Sequence[float]], names: Sequence[str], title: str) -> Markup:
    """A square of cells, orange above 0 and blue below, with the rows' groups named on both sides.

    Args:
        values: -1 to 1, row by row.
        names: the group of each row.
        title: for readers that do not see it.
    """
    count, side = len(values), 300
    step = side / max(count, 1)
    starts = [k for k in range(count) if k == 0 or names[k] != names[k - 1]]
    parts = []
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            level = min(int(abs(value) * 4.999) + 1, 5) if abs(value) > 0.02 else 0
            colour = f"{'hot' if value > 0 else 'cold'}{level}" if level else "none"
            parts.append(
                f'<rect class="{colour}" x="{90 + j * step:.2f}" y="{i * step:.2f}" width="{step + 0.2:.2f}" '
                f'height="{step + 0.2:.2f}"/>'
            )
    for place, end in zip(starts, [*starts[1:], count], strict=True):
        middle = (place + end) / 2 * step
        word = escape(_short(names[place], 12))
        parts.append(f'<text class="tick" x="84" y="{middle + 4:.1f}" text-anchor="end">{word}</text>')
        parts.append(
            f'<text class="tick" x="{90 + middle:.1f}" y="{side + 16}" text-anchor="middle">{word}</text>'
        )
        if place:
            line = place * step
            parts.append(f'<path class="cut" d="M90 {line:.1f}H{90 + side}M{90 + line:.1f} 0V{side}"/>')
    return Markup(
        f'<svg class="chart" viewBox="0 0 400 {side + 22}" role="img" aria-label="{escape(title)}">'
        f"{''.join(parts)}</svg>"
    )


def _chart(title: str, x_label: str, y_label: str, parts: Sequence[str]) -> Markup:
    middle = (TOP + HEIGHT - BOTTOM) / 2
    names = (
        f'<text class="axis" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">'
        f"{escape(x_label)}</text>"
        f'<text class="axis" x="12" y="{middle}" text-anchor="middle" transform="rotate(-90 12 {middle})">'
        f"{escape(y_label)}</text>"
    )
    return Markup(
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"{''.join(parts)}{names}</svg>"
    )


def _grid(y: float, text: str) -> str:
    return (
        f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>'
        f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{text}</text>'
    )


def _below(x: float, text: str) -> str:
    return f'<text class="tick" x="{x:.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{text}</text>'


def _scale(low: float, high: float, start: float, stop: float) -> Callable[[float], float]:
    span = (high - low) or 1.0
    return lambda value: start + (value - low) / span * (stop - start)


def _ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers from at or above `low` to at or above `high`."""
    raw = (high - low) / count or 1.0
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [k * step for k in range(first, max(last, first + 1) + 1)]


def _decades(low: float, high: float) -> list[float]:
    """Ticks of a logarithmic axis: 1, 2 and 5 times powers of ten about the values, at most about six."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    fine = [m * 10.0**e for e in exponents for m in (1, 2, 5)]
    below = [tick for tick in fine if tick <= low * 1.0001] or fine[:1]
    kept = [tick for tick in fine if below[-1] <= tick < high] + [t for t in fine if t >= high][:1]
    return kept if len(kept) <= 7 else [t for t in kept if f"{t:e}"[0] == "1"] or kept[:: len(kept) // 6 + 1]


def _log(value: float) -> float:
    return math.log10(value)


def _short(name: str, limit: int) -> str:
    return name if len(name) <= limit else f"{name[: limit - 1]}…"
