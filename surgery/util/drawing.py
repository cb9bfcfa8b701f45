"""Drawing: figures as small PNG files, without pyplot, whose state is global; the same numbers give the same bytes."""

from __future__ import annotations

import io
from typing import Any

INK, MUTED, GRID, EMPTY = "#1f2933", "#66727f", "#e3e7eb", "#edf0f2"
PALETTE = (
    "#d55e00", "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#5c4742", "#8c6d31", "#a3b18a", "#4d4d4d",
)  # fmt: skip
"""Colours that distinguish things, the most important first; the first six are apart for the colour-blind too."""


def new_figure(width: float, height: float) -> Any:
    """An empty white figure.

    Args:
        width: in inches, of 100 pixels each.
        height: likewise.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=100, facecolor="white")
    FigureCanvasAgg(figure)  # from the start: a layout then measures its texts once for the drawing too
    return figure


def tidy(axes: Any, title: str = "") -> None:
    """Axes without a frame, small muted labels, and a title at the left."""
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.tick_params(colors=MUTED, labelsize=8.5, length=0)
    axes.xaxis.label.set_color(MUTED)
    axes.yaxis.label.set_color(MUTED)
    axes.xaxis.label.set_fontsize(9)
    axes.yaxis.label.set_fontsize(9)
    if title:
        axes.set_title(title, loc="left", fontsize=10.5, color=INK, pad=8)


def label_generations(axes: Any) -> None:
    """An axis of generations, which are whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("generation")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def png(figure: Any, colours: int = 128) -> bytes:
    """A figure of `new_figure` as a PNG with a palette of `colours`: flat areas and edges of text need no more."""
    from PIL import Image

    canvas = figure.canvas
    canvas.draw()
    size = canvas.get_width_height()
    picture = Image.frombuffer("RGBA", size, bytes(canvas.buffer_rgba()), "raw", "RGBA", 0, 1).convert("RGB")
    # A median cut takes six times as long and makes one of two shades that are close.
    few = picture.quantize(colours, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    palette, corner = few.getpalette(), few.getpixel((0, 0))
    assert palette is not None and isinstance(corner, int)
    palette[3 * corner : 3 * corner + 3] = 255, 255, 255  # figures are white there; an octree has 254
    few.putpalette(palette)
    file = io.BytesIO()
    few.save(file, "PNG", compress_level=8)  # 9 takes three times as long for 1% less
    return file.getvalue()


def colours(count: int) -> list[Any]:
    """The palette, then colours between its own."""
    from matplotlib.colors import hsv_to_rgb, to_rgb

    more = [
        hsv_to_rgb(((k * 0.6180339887) % 1, 0.45, 0.8 - 0.2 * (k % 2))) for k in range(count - len(PALETTE))
    ]
    return [*map(to_rgb, PALETTE[:count]), *more]
