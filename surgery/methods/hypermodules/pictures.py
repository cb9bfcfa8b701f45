"""Pictures of hypermodules from a run's log: who uses them, which layers share, the alignment over time.

# MUiR, Figs. 2, 3a and 3b
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from surgery.core.method import Curves
from surgery.training.report.pictures import Line, mark_kept
from surgery.util.drawing import EMPTY, INK, MUTED, colours, label_generations, new_figure, png, tidy

_MOST = 8  # subsets of members that are drawn one by one, and banks that get a panel


def draw_subsets(start: Line, generations: Sequence[Line], end: Line | None) -> bytes | None:
    """How many hypermodules each subset of the members uses, generation by generation, and in the folder. # Fig. 3a"""
    names = ranked_subsets(generations)
    if not names:
        return None
    counts = {
        name: np.array([line.get("subsets", {}).get(name, 0) for line in generations]) for name in names
    }
    stored = dict((end or {}).get("stored_modules", {}))
    shown = [name for name in names if name]
    if len(shown) > _MOST:
        ranked = sorted(shown, key=lambda name: -counts[name].max())[: _MOST - 1]
        rest = [name for name in shown if name not in ranked]
        shown = [name for name in shown if name in ranked]
        counts["all others"] = np.sum([counts[name] for name in rest], axis=0)
        stored["all others"] = sum(stored.get(name, 0) for name in rest)
        shown.append("all others")
    fills = dict(zip(shown, colours(len(shown)), strict=True))
    if "" in names:
        shown, fills[""] = [*shown, ""], EMPTY
    figure = new_figure(9.2, 3.8)
    axes = figure.subplots()
    steps = [line["generation"] + 1 for line in generations]
    bands = [counts[name] for name in shown]
    words = [_described(name, start["members"], stored, end is not None) for name in shown]
    axes.stackplot(steps, bands, colors=[fills[name] for name in shown], labels=words, lw=0)
    axes.set_xlim(steps[0], max(steps[-1], steps[0] + 1))
    axes.set_ylabel("hypermodules")
    mark_kept(axes, end)
    label_generations(axes)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(
        handles[::-1], labels[::-1], frameon=False, fontsize=8.5, labelcolor=INK,
        loc="upper left", bbox_to_anchor=(1.08, 1),
    )  # fmt: skip
    size = axes.twinx()
    size.plot(steps, [100 * line["share"] for line in generations], color=INK, lw=1.4)
    size.set_ylim(0, 110)
    size.set_ylabel("parameters, % of the sites' (line)")
    tidy(size)
    tidy(axes, "Hypermodules by the members that use them")
    figure.tight_layout(pad=0.8)
    return png(figure)


def curves_of(generations: Sequence[Line]) -> list[Curves]:
    """How many hypermodules each subset of the members uses; nothing where no member uses one."""
    names = [name for name in ranked_subsets(generations) if name]
    lines = {
        name.replace("+", " + "): [line.get("subsets", {}).get(name, 0) for line in generations]
        for name in names
    }
    return [Curves("Hypermodules by the members that use them", "hypermodules", lines)] if names else []


def ranked_subsets(generations: Sequence[Line]) -> list[str]:
    """Sets of members that have hypermodules at any time, large sets first; last the empty name, where there are
    hypermodules that collapse to blocks."""
    names = {name for line in generations for name, count in line.get("subsets", {}).items() if count}
    return sorted(names, key=lambda name: (name == "", -name.count("+"), name))


def draw_layers(start: Line, generations: Sequence[Line], end: Line | None) -> bytes | None:
    """Which layers share hypermodules more and less than chance would have them. # Fig. 3b"""
    overlap = [o for o in (end or {}).get("overlap", {}).values() if len(o["layers"]) > 1][:_MOST]
    if not overlap:
        return None
    figure = new_figure(5.4 * len(overlap) + 0.6, 5.0)
    for axes, each in zip(figure.subplots(1, len(overlap), squeeze=False)[0], overlap, strict=True):
        observed, expected = np.array(each["observed"], float), np.array(each["expected"], float)
        ratio = np.log2((observed + 0.5) / (expected + 0.5))
        limit = max(1.0, float(np.abs(ratio).max()))
        drawn = axes.imshow(ratio, cmap="PuOr_r", vmin=-limit, vmax=limit, interpolation="nearest")
        members = [layer[0] for layer in each["layers"]]
        starts = [k for k in range(len(members)) if k == 0 or members[k] != members[k - 1]]
        middles = [(a + b - 1) / 2 for a, b in zip(starts, [*starts[1:], len(members)], strict=True)]
        for place in starts[1:]:
            axes.axhline(place - 0.5, color=INK, lw=0.8)
            axes.axvline(place - 0.5, color=INK, lw=0.8)
        axes.set_ylabel("layers of each member, in execution order")
        axes.set_xticks(middles, [members[k] for k in starts])
        axes.set_yticks(middles, [members[k] for k in starts], rotation=90, va="center")
        bar = figure.colorbar(drawn, ax=axes, shrink=0.75, pad=0.03)
        bar.outline.set_visible(False)
        bar.ax.tick_params(labelsize=8, colors=MUTED, length=0)
        bar.set_label("shared hypermodules against chance, log2 (orange: more)", fontsize=8.5, color=MUTED)
        tidy(axes, "Sharing between layers")
    figure.tight_layout(pad=0.8)
    return png(figure, 256)


def draw_alignment(start: Line, generations: Sequence[Line], end: Line | None) -> bytes | None:
    """The hypermodule of every location, generation by generation: what survives to the end is in colour. # Fig. 2"""
    banks = [key for key, numbers in generations[0].get("alignment", {}).items() if numbers][:_MOST]
    if not banks:
        return None
    figure = new_figure(9.2, 3.4 * len(banks))
    for axes, key in zip(figure.subplots(len(banks), 1, squeeze=False)[:, 0], banks, strict=True):
        strip = np.array([line["alignment"][key] for line in generations]).T
        order = _by_layer(start.get("sites", []), key, strip)
        axes.imshow(
            _painted(strip)[order], aspect="auto", interpolation="nearest",
            extent=(generations[0]["generation"] + 0.5, generations[-1]["generation"] + 1.5, len(strip), 0),
        )  # fmt: skip
        ends = _ends_of_members(start["sites"], key)
        middles = [(ends[k - 1][1] if k else 0) / 2 + last / 2 for k, (_, last) in enumerate(ends)]
        axes.set_yticks(middles, [name for name, _ in ends])
        for _, last in ends[:-1]:
            axes.axhline(last, color="white", lw=2)
        axes.set_ylabel(f"{len(strip)} locations, by layer")
        label_generations(axes)
        kept = len(np.unique(strip[:, -1]))
        tidy(axes, f"The hypermodule of each location, {kept} at the end (colours: those; grey: gone)")
    figure.tight_layout(pad=0.8)
    return png(figure, 256)


def _by_layer(sites: Sequence[Any], key: str, strip: Any) -> Any:
    """Locations in the order of members, and within each layer those of one final hypermodule side by side."""
    rank = np.zeros(len(strip), int)
    for number, site in enumerate(site for site in sites if site[2] == key):
        rank[site[3] : site[4]] = number
    return np.lexsort((strip[:, -1], rank))


def _ends_of_members(sites: Sequence[Any], key: str) -> list[tuple[str, int]]:
    """Members in the order of their sites, each with the number of locations up to its last."""
    ends: dict[str, int] = {}
    total = 0
    for site in (site for site in sites if site[2] == key):
        total += site[4] - site[3]
        ends[site[0]] = total
    return list(ends.items())


def _painted(strip: Any) -> Any:
    """Colours `[locations, generations, 3]`: by survivor, in greys by number for what went."""
    survivors, counts = np.unique(strip[:, -1], return_counts=True)
    ranked = survivors[np.argsort(-counts, kind="stable")]
    grey = 0.93 - 0.22 * ((strip * 0.6180339887) % 1.0)
    painted = np.repeat(grey[..., None], 3, axis=2)
    if len(ranked) < 0.9 * len(strip):
        for number, colour in zip(ranked, colours(min(len(ranked), 40)), strict=False):
            painted[strip == number] = colour
    return painted


def _described(subset: str, members: Sequence[str], stored: Mapping[str, int], ended: bool) -> str:
    """A subset in the legend, with how many of its hypermodules the folder holds."""
    if not subset:
        return "too few uses to be stored as one"
    words = subset if subset == "all others" else _words(subset, members)
    return f"{words}: {stored.get(subset, 0)} stored" if ended else words


def _words(subset: str, members: Sequence[str]) -> str:
    """A subset's name, short where it has many members."""
    parts = subset.split("+")
    if len(parts) == len(members) > 1:
        return f"all {len(members)}" if len(members) > 2 else "both"
    return subset if len(subset) < 40 else f"{len(parts)} of {len(members)}"
