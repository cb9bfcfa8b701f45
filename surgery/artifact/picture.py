"""Draws which members share what, as a small PNG for the model card.

Left, what each member took before and takes in the artifact, by kind; right, how many blocks of one member
have something in common with another one's. Drawn without pyplot, whose state is global, and the same bytes for
the same numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from surgery.artifact.shares import COPIES, MATRIX, ROWS, Shares
from surgery.util.drawing import EMPTY, GRID, INK, MUTED, new_figure, png
from surgery.util.showing import in_order
from surgery.util.wording import percent, size

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FEW = 6  # members whose names and figures fit into the right half; more are numbered
MOST = 16  # members drawn one by one; of the others their mean
ROOMY = 8  # members up to which rows are as high as they may be
_FILLS = {
    MATRIX: "#d55e00", ROWS: "#7f2704", COPIES: "#e69f00", "native": "#9aa7b3", "bfloat16": "#009e73",
    "int12": "#b9d8ee", "int10": "#9cc6e5", "int8": "#7fb2d9",
    "int7": "#639cc9", "int6": "#4886b8", "int5": "#3571a2", "int4": "#275c88",
    "int3": "#1b476b", "int2": "#11334f",
}  # fmt: skip
_OTHERS = ("#b0579a", "#8c6d31", "#5a5a5a")  # of codecs that have no colour of their own, in turn
_WORDS = {COPIES: "shared copy"}  # as the command line has them


def draw_sharing(shares: Shares) -> bytes:
    """The picture as a PNG.

    Args:
        shares: as `count_shares` returns them.
    """
    from matplotlib.patches import Patch

    shares = fold(shares)
    count = len(shares.members)
    pairs = count > 1 and any(map(any, shares.blocks))  # where nothing is shared there is nothing to show
    row = 0.36 if count <= ROOMY else 0.29
    height = 1.65 + row * max(count, 3 if count > 1 else 1)
    figure = new_figure(9.2, height)
    widths = [1.5, 1] if pairs else [1]
    axes: Any = figure.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0]
    sizes = {name: _by_width(each) for name, each in shares.kinds.items()}
    kinds = in_order({kind for each in sizes.values() for kind in each}, _FILLS)
    _draw_bytes(axes[0], shares, sizes, kinds)
    if pairs:
        _draw_blocks(axes[1], shares)
    # With a `rect` all texts would be measured twice.
    figure.tight_layout(pad=0.8, w_pad=2)
    figure.subplots_adjust(bottom=figure.subplotpars.bottom + 0.3 / height)
    handles = [Patch(color=colour, label=_WORDS.get(kind, kind)) for kind, colour in _colours(kinds).items()]
    figure.legend(
        handles=handles, loc="lower left", bbox_to_anchor=(0.008, 0), ncols=len(kinds) or 1, fontsize=8.5,
        frameon=False, handlelength=1, handleheight=1, columnspacing=1.4, labelcolor=INK,
    )  # fmt: skip
    return png(figure)


def _draw_bytes(
    ax: Axes, shares: Shares, sizes: Mapping[str, Mapping[str, int]], kinds: Sequence[str]
) -> None:
    from matplotlib.collections import PolyCollection
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    before, names = shares.before, shares.members
    largest = max([*before.values(), 1])
    bars, fills = [_bar(place, 0, before[name]) for place, name in enumerate(names)], [EMPTY] * len(names)
    start = [0.0] * len(names)
    colours = _colours(kinds)
    for kind in kinds:
        for place, name in enumerate(names):
            if width := sizes[name].get(kind, 0):
                bars.append(_bar(place, start[place], width))
                fills.append(colours[kind])
                start[place] += width
    # One collection: with a patch for each bar the picture takes half as long again.
    ax.add_collection(PolyCollection(bars, facecolors=fills, zorder=3))
    for place, name in enumerate(names):
        share = f", {percent(start[place] / before[name])}" if before[name] else ""
        at = max(start[place], before[name]) + 0.015 * largest
        ax.text(at, place, f"{size(start[place])}{share}", va="center", fontsize=9, color=INK)
    labels = [
        f"{_short(name)}  {i + 1}" if len(names) > FEW else _short(name) for i, name in enumerate(names)
    ]
    ax.set_yticks(range(len(names)), labels, fontsize=9, color=INK)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.set_xlim(0, 1.26 * largest)
    ax.xaxis.set_major_locator(MaxNLocator(4))
    ax.xaxis.set_major_formatter(
        FuncFormatter(lambda value, _: size(value).replace(".0 ", " ") if value else "0")
    )
    ax.tick_params(axis="x", labelsize=8, labelcolor=MUTED)
    ax.grid(axis="x", color=GRID, linewidth=0.8, zorder=0)
    _bare(ax)
    ax.set_xlabel("bytes", fontsize=8.5, color=MUTED)
    ax.set_title("Bytes of each member now (grey: before)", fontsize=10, color=INK, loc="left", pad=7, y=1.0)


def _bar(place: int, start: float, width: float) -> list[tuple[float, float]]:
    """The corners of a horizontal bar."""
    low, high = place - 0.35, place + 0.35
    return [(start, low), (start + width, low), (start + width, high), (start, high)]


def _colours(kinds: Sequence[str]) -> dict[str, str]:
    """A colour for each kind; those without one of their own take others in turn."""
    others = [kind for kind in kinds if kind not in _FILLS]
    own = {kind: _FILLS[kind] for kind in kinds if kind in _FILLS}
    return own | {kind: _OTHERS[i % len(_OTHERS)] for i, kind in enumerate(others)}


def _draw_blocks(ax: Axes, shares: Shares) -> None:
    import numpy as np
    from matplotlib.colors import LinearSegmentedColormap

    blocks = np.array(shares.blocks, dtype=float)
    count = len(blocks)
    depth = np.sqrt(blocks / max(float(blocks.max()), 1.0))
    warm = LinearSegmentedColormap.from_list("warm", [EMPTY, "#f6c9a0", "#e2795b", _FILLS[MATRIX]], 16)
    edges = np.arange(count + 1) - 0.5
    ax.pcolormesh(edges, edges, depth, cmap=warm, vmin=0, vmax=1, edgecolors="white", linewidth=2)
    ax.invert_yaxis()
    numbered = count > FEW
    names = [str(i + 1) if numbered else _short(name, 12) for i, name in enumerate(shares.members)]
    slanted = count > 3 and not numbered
    side = "right" if slanted else "center"
    ax.set_xticks(range(count), names, fontsize=8, color=INK, rotation=30 if slanted else 0, ha=side)
    ax.set_yticks(range(count), names, fontsize=8, color=INK)
    for row, column in () if numbered else np.ndindex(count, count):
        if row == column and not blocks[row, column]:  # a member does not share with itself
            continue
        ink = "white" if depth[row, column] > 0.6 else INK if depth[row, column] else MUTED
        ax.text(
            column, row, _figure(float(blocks[row, column])), ha="center", va="center", fontsize=9, color=ink
        )
    _bare(ax)
    ax.set_ylabel("blocks of", fontsize=8.5, color=MUTED)
    ax.set_xlabel("shared with", fontsize=8.5, color=MUTED)
    ax.set_title("Blocks that two members share", fontsize=10, color=INK, loc="left", pad=7, y=1.0)


def _bare(ax: Axes) -> None:
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)


def _by_width(kinds: Mapping[str, int]) -> dict[str, int]:
    """Bytes by number of bits: how values are grouped does not show."""
    return _sum([{kind.partition("/")[0]: amount} for kind, amount in kinds.items()])


def _short(name: str, limit: int = 22) -> str:
    return name if len(name) <= limit else f"{name[: limit // 2 - 1]}…{name[-(limit - limit // 2) :]}"


def _figure(count: float) -> str:
    return f"{count:.0f}" if count < 1e4 else f"{count / 1e3:.0f}k" if count < 1e6 else f"{count / 1e6:.1f}M"


def fold(shares: Shares) -> Shares:
    """At most `MOST` members: the largest ones, and the mean of all others."""
    if len(shares.members) <= MOST:
        return shares
    before = shares.before
    ranked = sorted(range(len(shares.members)), key=lambda i: (-before[shares.members[i]], i))
    groups = [[i] for i in sorted(ranked[: MOST - 1])] + [sorted(ranked[MOST - 1 :])]
    names = tuple(shares.members[g[0]] if len(g) == 1 else f"mean of {len(g)} others" for g in groups)
    parts = {name: [shares.members[i] for i in g] for name, g in zip(names, groups, strict=True)}
    kinds = {name: _mean([shares.kinds[each] for each in members]) for name, members in parts.items()}
    blocks = tuple(
        tuple(round(sum(shares.blocks[i][j] for i in a for j in b) / (len(a) * len(b))) for b in groups)
        for a in groups
    )
    sizes = {name: round(sum(before[m] for m in members) / len(members)) for name, members in parts.items()}
    return replace(shares, members=names, kinds=kinds, before=sizes, blocks=blocks)


def _mean(parts: Sequence[Mapping[str, int]]) -> dict[str, int]:
    return {kind: round(amount / len(parts)) for kind, amount in _sum(parts).items()}


def _sum(parts: Sequence[Mapping[str, int]]) -> dict[str, int]:
    return {kind: sum(part.get(kind, 0) for part in parts) for kind in {k: 0 for part in parts for k in part}}
