"""Pictures of templates: which one each layer takes, generation by generation, and the mixtures that were reached.

# Compositional models, Fig. 2
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from surgery.util.drawing import INK, MUTED, colours, label_generations, new_figure, png, tidy

Line = dict[str, Any]
_TALLEST = 8.0  # inches of a stack
_MOST = 12  # stacks that are drawn
_WRITTEN = 12  # layers and templates up to which shares are written into their fields


def draw_mixtures(start: Line, generations: Sequence[Line], end: Line | None) -> bytes | None:
    """For every stack the strongest template of each layer over time, paler where others have a part, and the last
    generation's mixtures; None where there are no templates."""
    logged = [line for line in generations if line.get("mixtures")]
    if not logged:
        return None
    stacks = dict(itertools.islice(start["stacks"].items(), _MOST))
    heights = [min(max(1.6, 0.22 * len(stacks[name]["layers"])), _TALLEST) for name in stacks]
    figure = new_figure(9.2, 0.7 + sum(heights) + 0.55 * len(heights))
    rows = figure.subplots(len(stacks), 2, squeeze=False, height_ratios=heights)
    for (left, right), (name, facts) in zip(rows, stacks.items(), strict=True):
        history = np.array([line["mixtures"][name] for line in logged])  # [generations, layers, K]
        _over_time(left, history, facts["layers"], name)
        _at_the_end(right, history[-1])
    label_generations(rows[-1][0])
    rows[-1][1].set_xlabel("template")
    figure.tight_layout(pad=0.8, w_pad=2)
    return png(figure, 256)


def _over_time(axes: Any, history: Any, layers: Sequence[Sequence[str]], name: str) -> None:
    strongest, share = np.abs(history).argmax(2), np.abs(history).max(2)
    share = share / np.maximum(np.abs(history).sum(2), 1e-12)
    palette = np.array(colours(history.shape[2]))
    least = 1 / history.shape[2]
    strength = np.clip((share - least) / max(1 - least, 1e-9), 0, 1)[..., None]
    painted = (0.25 + 0.75 * strength) * palette[strongest] + (0.75 - 0.75 * strength)
    extent = (0.5, len(history) + 0.5, len(layers) - 0.5, -0.5)
    axes.imshow(painted.transpose(1, 0, 2), aspect="auto", interpolation="nearest", extent=extent)
    members = [member for member, _ in layers]
    several = len(set(members)) > 1
    for place in range(1, len(members)):
        if members[place] != members[place - 1]:
            axes.axhline(place - 0.5, color="white", lw=2.5)
    starts = [place for place, member in enumerate(members) if place == 0 or members[place - 1] != member]
    if several:
        ends = [*starts[1:], len(members)]
        axes.set_yticks(
            [(a + b - 1) / 2 for a, b in zip(starts, ends, strict=True)], [members[a] for a in starts]
        )
    else:
        axes.set_yticks(range(len(members)), [str(place + 1) for place in range(len(members))])
        axes.set_ylabel("layer")
    tidy(axes, f"{name}: strongest template of each layer")


def _at_the_end(axes: Any, mixtures: Any) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    most = max(float(np.abs(mixtures).max()), 1e-12)
    signed = mixtures.min() < 0
    shades = ["#d55e00", "#ffffff", "#1d4e79"] if signed else ["#ffffff", "#1d4e79"]
    ramp = LinearSegmentedColormap.from_list("share", shades)
    axes.imshow(mixtures, aspect="auto", cmap=ramp, vmin=-most if signed else 0, vmax=most)
    layers, count = mixtures.shape
    axes.set_xticks(range(count), [str(k + 1) for k in range(count)])
    axes.set_yticks([])
    if max(layers, count) <= _WRITTEN:
        for (layer, k), value in np.ndenumerate(mixtures):
            colour = "white" if abs(value) > 0.6 * most else INK if abs(value) > 0.02 else MUTED
            axes.text(k, layer, f"{value:.2f}", ha="center", va="center", fontsize=7.5, color=colour)
    tidy(axes, "Mixtures at the end")
