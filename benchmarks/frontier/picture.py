"""Error against bytes of files, a line for each method."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Okabe and Ito's colours, which the colour-blind can tell apart; markers and dashes tell further methods apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vP*X"


def draw(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Draw a table of one family.

    Args:
        rows: with `method`, `of fp32` and `error`.
        file: `.png` or `.svg`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for number, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
        points = sorted(
            (100 * row["of fp32"], row["error"])
            for row in rows
            if row["method"] == method and row["error"] is not None
        )
        if points:
            x, y = zip(*points, strict=True)
            dashes = ("-", "--", ":")[number // len(COLOURS) % 3]
            colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
            width = 3 if method.startswith("surgery") else 1.5
            axes.plot(x, y, dashes, color=colour, marker=marker, markersize=5, linewidth=width, label=method)
    axes.set(
        xscale="log", yscale="log", xlabel="bytes of files (% of float32)", ylabel="relative output error"
    )
    ticks = sorted({round(100 * row["of fp32"]) for row in rows if row["of fp32"]})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)
    figure.savefig(file, dpi=150)
