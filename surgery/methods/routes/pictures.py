"""Pictures of routes: which task uses what, how that came about, and which tasks are alike."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from surgery.core.method import Curves
from surgery.util.drawing import INK, MUTED, colours, label_generations, new_figure, png, tidy

Line = dict[str, Any]
_MOST = 12  # routes that are drawn
_WRITTEN = 16  # tasks and components up to which values are written into their fields


def draw_allocation(start: Line, generations: Sequence[Line], end: Line | None) -> bytes | None:
    """Tasks x components of every route at the end, depth by depth; a task's strongest path is framed, but for depths
    that it passes by."""
    found = list(itertools.islice(_tables(start, generations[-1]).items(), _MOST))
    if not found:
        return None
    heights = [max(1.0, 0.3 * len(facts["tasks"])) for facts, _ in (each for _, each in found)]
    figure = new_figure(9.2, 0.5 + sum(heights) + 0.75 * len(heights))
    rows = figure.subplots(len(found), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (name, (facts, depths)) in zip(rows, found, strict=True):
        _allocation(axes, name, facts, depths)
    figure.tight_layout(pad=0.8, h_pad=1.2)
    return png(figure, 256)


def draw_over_time(start: Line, generations: Sequence[Line], end: Line | None) -> bytes | None:
    """For every route the probabilities or shares of all components over time, a line for each task and component, and
    how much each depth uses of them."""
    logged = [line for line in generations if _said(line)]
    found = list(itertools.islice(_tables(start, logged[-1]).items(), _MOST)) if logged else []
    if not found:
        return None
    figure = new_figure(9.2, 2.5 * len(found) + 0.4)
    rows = figure.subplots(len(found), 2, squeeze=False, width_ratios=[1.6, 1])
    for (left, right), (name, (facts, depths)) in zip(rows, found, strict=True):
        steps = [line["generation"] + 1 for line in logged]
        for task, colour in enumerate(colours(len(facts["tasks"]))):
            lines = np.array([[x for depth in _said(line)[name] for x in depth[task]] for line in logged])
            left.plot(steps, lines, color=colour, lw=0.9, alpha=0.7)
            left.plot([], [], color=colour, label=facts["tasks"][task])
        if len(facts["tasks"]) <= _WRITTEN:
            left.legend(frameon=False, fontsize=8, labelcolor=INK)
        left.set_ylim(-0.05, 1.05)
        label_generations(left)
        tidy(left, f"{name}: {_what(facts)} of components")
        _by_depth(right, facts, depths)
    figure.tight_layout(pad=0.8, w_pad=2)
    return png(figure)


def draw_likeness(start: Line, generations: Sequence[Line], end: Line | None) -> bytes | None:
    """Cosine similarity of the tasks' embeddings, all that they use of routes of the same components, in the order of a
    dendrogram; None for fewer than three tasks."""
    names, vectors = embeddings(start, generations[-1])
    if len(names) < 3:
        return None
    likeness = cosine(vectors)
    order, merges = cluster(1 - likeness)
    side = min(2.4 + 0.28 * len(names), 12.0)
    figure = new_figure(side + 2.2, side)
    left, right = figure.subplots(1, 2, width_ratios=[1, 3.2])
    _dendrogram(left, order, merges)
    table = likeness[np.ix_(order, order)]
    shades = right.imshow(table, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    right.set_xticks([])
    right.set_yticks(range(len(order)), [names[i] for i in order])
    right.yaxis.tick_right()
    if len(names) <= _WRITTEN:
        _write(right, table)
    else:
        below = right.inset_axes((0.0, -0.03, 1.0, 0.012))  # leaves rows beside their leaves
        bar = figure.colorbar(shades, cax=below, orientation="horizontal")
        bar.outline.set_visible(False)
        below.tick_params(labelsize=8, colors=MUTED, length=0)
    tidy(right, "Cosine similarity of tasks")
    tidy(left, "Distance")
    figure.tight_layout(pad=0.8, w_pad=0.2)
    return png(figure, 256)


def curves_of(generations: Sequence[Line]) -> list[Curves]:
    """How many components each task has on, added up over depths."""
    lines: dict[str, list[float]] = {}
    for line in generations:
        for name, depths in _said(line).items():
            for task in range(len(depths[0])):
                used = sum(sum(depth[task]) for depth in depths)
                lines.setdefault(f"{name} {task + 1}" if len(depths[0]) > 1 else name, []).append(used)
    whole = {name: values for name, values in lines.items() if len(values) == len(generations)}
    return [Curves("Components of each task", "components", whole)] if whole else []


# -- numbers ---------------------------------------------------------------------------------------------------


def embeddings(start: Line, line: Line) -> tuple[list[str], Any]:
    """Tasks, and what each uses, `[T, all depths x N]`, of the largest group of routes with the same components.

    Probabilities count as on or off where they lie above or below a half.
    """
    groups: dict[str, tuple[list[str], list[Any]]] = {}
    for facts, depths in _tables(start, line).values():
        names, rows = groups.setdefault(str(facts["components"]), ([], []))
        for task, name in enumerate(facts["tasks"]):
            own = np.array([x for depth in depths for x in depth[task]])
            names.append(name)
            rows.append(np.round(own) if facts["routing"] == "gumbel" else own)
    if not groups:
        return [], np.zeros((0, 0))
    names, rows = max(groups.values(), key=lambda group: len(group[0]))
    return names, np.array(rows)


def cosine(vectors: Any) -> Any:
    """Cosine similarities `[T, T]` of the rows of a matrix `[T, N]`; of a row of zeros, 0 with every other.

    Example:
        >>> cosine(np.array([[1.0, 0.0], [1.0, 1.0]])).round(2).tolist()
        [[1.0, 0.71], [0.71, 1.0]]
    """
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = vectors / np.maximum(length, 1e-12)
    found = np.minimum(unit @ unit.T, 1.0)  # a product of equal rows may be a little more
    np.fill_diagonal(found, 1.0)
    return found


def cluster(distances: Any) -> tuple[list[int], list[tuple[float, float, float, float, float]]]:
    """Average-linkage clustering: the order of leaves; and of each merge the places of both parts, and three heights,
    theirs and its own.

    Args:
        distances: `[T, T]`, symmetric.

    Example:
        >>> cluster(np.array([[0, 9.0, 1], [9, 0, 8], [1, 8, 0]]))[0]
        [0, 2, 1]
    """
    groups: dict[int, tuple[list[int], float]] = {i: ([i], 0.0) for i in range(len(distances))}
    joined: list[tuple[list[int], float, list[int], float, float]] = []
    while len(groups) > 1:
        pairs = itertools.combinations(groups, 2)
        mean = {(a, b): float(distances[np.ix_(groups[a][0], groups[b][0])].mean()) for a, b in pairs}
        a, b = min(mean, key=lambda pair: (mean[pair], pair))
        joined.append((*groups[a], *groups[b], mean[a, b]))
        groups[a] = (groups[a][0] + groups.pop(b)[0], mean[a, b])
    (order, _), place = next(iter(groups.values())), {}
    place = {leaf: float(i) for i, leaf in enumerate(order)}
    merges = []
    centre: dict[tuple[int, ...], float] = {(leaf,): place[leaf] for leaf in order}
    for first, low, second, other, height in joined:
        x, y = centre[tuple(first)], centre[tuple(second)]
        merges.append((x, y, low, other, height))
        centre[(*first, *second)] = (x + y) / 2
    return order, merges


def _said(line: Line) -> Mapping[str, Any]:
    return line.get("methods", {}).get("routes", {}).get("shares", {})


def _tables(start: Line, line: Line) -> dict[str, tuple[Mapping[str, Any], list[list[list[float]]]]]:
    """By route, what the first line says of it and the table `[D][T][N]` of a generation's line."""
    known = start.get("methods", {}).get("routes", {}).get("routes", {})
    return {name: (known[name], depths) for name, depths in _said(line).items() if name in known}


# -- drawing ---------------------------------------------------------------------------------------------------


def _allocation(axes: Any, name: str, facts: Mapping[str, Any], depths: Sequence[Any]) -> None:
    from matplotlib.patches import Rectangle

    table = np.concatenate([np.array(depth) for depth in depths], 1)  # [T, sum of N]
    axes.imshow(table, aspect="auto", cmap="Blues", vmin=0, vmax=1)
    axes.set_yticks(range(len(facts["tasks"])), facts["tasks"])
    begin, ticks, labels = 0, [], []
    for depth, components in enumerate(facts["components"]):
        count = np.array(depths[depth]).shape[1]  # the identity that stands in has no probability
        if begin:
            axes.axvline(begin - 0.5, color="white", lw=2.5)
        ticks += range(begin, begin + count)
        labels += [str(each) for each in components[:count]]
        for task in range(len(table)):
            own = table[task, begin : begin + count]
            if own.max() >= 0.5 or count == len(components):  # else the identity stands in
                place = begin + int(own.argmax()) - 0.46, task - 0.46
                axes.add_patch(Rectangle(place, 0.92, 0.92, fill=False, ec="#d55e00", lw=1.4))
        begin += count
    small = table.shape[1] <= 2 * _WRITTEN
    axes.set_xticks(ticks if small else [], labels if small else [], rotation=90 if small else 0)
    if table.shape[1] <= _WRITTEN and len(table) <= _WRITTEN:
        _write(axes, table)
    tidy(axes, f"{name}: {_what(facts)}, depth by depth")


def _write(axes: Any, table: Any) -> None:
    """Values in their fields."""
    for (row, column), value in np.ndenumerate(table):
        colour = "white" if value > 0.6 else INK if value > 0.02 else MUTED
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)


def _by_depth(axes: Any, facts: Mapping[str, Any], depths: Sequence[Any]) -> None:
    """How much the tasks together use each component at each depth."""
    counts = {np.array(depth).shape[1] for depth in depths}
    table = np.array([np.array(depth).mean(0) for depth in depths]) if len(counts) == 1 else None
    if table is None:
        axes.set_axis_off()
        return
    axes.imshow(table, aspect="auto", cmap="Blues", vmin=0, vmax=1)
    axes.set_ylabel("depth")
    axes.set_xlabel("component")
    axes.set_yticks(range(len(depths)), [str(d + 1) for d in range(len(depths))])
    axes.set_xticks(range(table.shape[1]), [str(i + 1) for i in range(table.shape[1])])
    tidy(axes, "Mean over tasks")


def _dendrogram(axes: Any, order: Sequence[int], merges: Sequence[tuple[float, ...]]) -> None:
    for first, second, low, other, height in merges:
        axes.plot([low, height, height, other], [first, first, second, second], color=INK, lw=1)
    axes.set_ylim(len(order) - 0.5, -0.5)
    top = max([0.1, *(height for *_, height in merges)])  # equal tasks meet at 0
    axes.set_xlim(1.04 * top, -0.02 * top)
    axes.set_yticks([])


def _what(facts: Mapping[str, Any]) -> str:
    return "probabilities" if facts["routing"] == "gumbel" else "shares"
