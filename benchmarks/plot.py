"""Error against bytes as a picture: one panel for each model, one line for each method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Okabe and Ito's colours, which the colour-blind can tell apart; markers and dashes say the same once more.
STYLES = {
    "fit": ("#0072B2", "o", "-"),
    "rounding": ("#D55E00", "s", "--"),
    "SVD per matrix": ("#009E73", "^", "-."),
    "one basis": ("#CC79A7", "D", ":"),
}
MEGABYTE = 1e6


def draw(results: Sequence[Mapping[str, Any]], titles: Mapping[str, str], file: Path) -> None:
    """Draw results of `benchmarks.quality`.

    Args:
        results: with `model`, `method`, `bytes` and `error`.
        titles: of the panels, by model.
        file: `.png` or `.svg`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    models = [model for model in titles if any(row["model"] == model for row in results)]
    figure = Figure(figsize=(5.4 * len(models), 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
        mine = [row for row in results if row["model"] == model]
        for method, (colour, marker, dashes) in STYLES.items():
            points = sorted(
                (row["bytes"] / MEGABYTE, row["error"]) for row in mine if row["method"] == method
            )
            if points:
                x, y = zip(*points, strict=True)
                axes.plot(
                    x, y, dashes, color=colour, marker=marker, markersize=6, linewidth=1.8, label=method
                )
        axes.set(xscale="log", yscale="log", title=titles[model], xlabel="size (megabytes)")
        ticks = sorted({round(row["size"] / MEGABYTE, 1) for row in mine})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        low, high = min(row["error"] for row in mine), max(row["error"] for row in mine)
        wanted = [tick for tick in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5) if low / 2 < tick < high * 2]
        axes.set_yticks(wanted, [f"{tick:.0%}" for tick in wanted])
        axes.grid(True, color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("relative output error on real inputs")
    figure.axes[0].legend(frameon=False)
    figure.savefig(file, dpi=150)
