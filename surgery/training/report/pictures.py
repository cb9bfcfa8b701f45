"""Draws pictures of a training run from its log: losses and size, and what its methods draw."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from surgery.core.method import Method, Picture
from surgery.core.registry import find_method
from surgery.disk.records import artifact_files, check_free, write_owned
from surgery.disk.untrusted import shown_text
from surgery.errors import TrainingError
from surgery.settings.methods import method_names
from surgery.settings.names import SHIPPED_METHODS
from surgery.training.report.log_lines import by_event
from surgery.training.report.runlog import read_log
from surgery.util.drawing import GRID, INK, MUTED, colours, label_generations, new_figure, png, tidy

Line = dict[str, Any]


def draw_run(log: Path) -> dict[str, bytes]:
    """PNG files by name; those for which the log holds nothing are left out.

    Raises:
        TrainingError: where there is no log.
    """
    logged = by_event(read_log(log))
    if logged.start is None or not logged.generations:
        return {}
    drawn = {}
    for name, draw in pictures_of(logged.start).items():
        try:
            drawn[name] = draw(logged.start, logged.generations, logged.end)
        except (ArithmeticError, MemoryError, ValueError) as error:  # of values beyond what axes can show
            raise TrainingError(
                f"{name} cannot be drawn of {log}: {shown_text(str(error))}. Its values are none of a run's; delete it."
            ) from error
    return {name: content for name, content in drawn.items() if content is not None}


def write_pictures(log: Path, folder: Path) -> list[Path]:
    """Draw a run's pictures into a folder; those that an artifact has already stay as its manifest lists them.

    Raises:
        TrainingError: where there is no log.
        OutputError: where the folder cannot be written, or holds pictures of these names that are somebody else's.
    """
    kept = {
        Path(name).name for name in artifact_files(folder.parent) if Path(name).parent.name == folder.name
    }
    drawn = draw_run(log)
    check_free(folder, tuple(name for name in drawn if name not in kept))
    return [
        folder / name if name in kept else write_owned(folder, name, content)
        for name, content in drawn.items()
    ]


def pictures_of(start: Line) -> dict[str, Picture]:
    """What is drawn of a run, by file name; of methods that are not installed, nothing is.

    Args:
        start: the first line of its log.
    """
    drawn: dict[str, Picture] = {"losses.png": draw_losses}
    for method in methods_trained(start):
        drawn |= method.pictures()
    return drawn


def methods_trained(start: Line) -> list[Method]:
    """The methods of a run, by the first line of its log, which did not name them in earlier versions.

    Those that are not installed are left out.
    """
    known = set(method_names())
    return [find_method(name) for name in start.get("method_names", SHIPPED_METHODS) if name in known]


def draw_losses(start: Line, generations: Sequence[Line], end: Line | None) -> bytes:
    """Every task's training and validation loss, relative to its first, and the size of the dictionary."""
    figure = new_figure(9.2, 3.6)
    left, right = figure.subplots(1, 2, width_ratios=[1.6, 1])
    _plot_losses(left, start, generations)
    mark_kept(left, end)
    _plot_share(right, generations)
    for axes in (left, right):
        axes.grid(axis="y", color=GRID, lw=0.8)
        label_generations(axes)
    figure.tight_layout(pad=0.8, w_pad=2)
    return png(figure)


def _plot_losses(axes: Any, start: Line, generations: Sequence[Line]) -> None:
    """Every task's training and validation loss, relative to its first, on a logarithmic axis where one is above 0."""
    from matplotlib.ticker import LogFormatter

    class Plain(LogFormatter):
        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:.3g}" if super().__call__(x, pos) else ""

    steps = [line["generation"] + 1 for line in generations]
    for task, colour in zip(start["tasks"], colours(len(start["tasks"])), strict=True):
        first = abs(generations[0]["losses"][task]) or 1.0
        axes.plot(
            steps, [line["losses"][task] / first for line in generations], color=colour, lw=1.6, label=task
        )
        judged = [g for g in generations if g.get("validation", {}).get(task, {}).get("loss") is not None]
        if judged:
            scale = abs(judged[0]["validation"][task]["loss"]) or 1.0
            axes.plot(
                [line["generation"] + 1 for line in judged],
                [line["validation"][task]["loss"] / scale for line in judged],
                color=colour, lw=0.8, ls="--", marker="o", ms=2.5,
            )  # fmt: skip
    if any(value > 0 for line in generations for value in line["losses"].values()):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(Plain())
        axes.yaxis.set_minor_formatter(Plain(minor_thresholds=(2, 0.5)))
        axes.tick_params(axis="y", which="minor", colors=MUTED, labelsize=8.5, length=0)
    axes.legend(frameon=False, fontsize=8.5, labelcolor=INK)
    axes.set_ylabel("loss, first = 1")
    judged = any(line["validation"] for line in generations)
    tidy(axes, f"Loss of each task{' (dashed: validation)' if judged else ''}")


def _plot_share(axes: Any, generations: Sequence[Line]) -> None:
    """The parameters of the dictionary relative to those of the sites, by generation."""
    steps = [line["generation"] + 1 for line in generations]
    share = [100 * line["share"] for line in generations]
    axes.plot(steps, share, color=INK, lw=1.6)
    axes.annotate(
        f"{share[-1]:.0f}%", (steps[-1], share[-1]), (4, 0), textcoords="offset points", fontsize=8.5
    )
    axes.set_ylim(0, max(110, *share))
    axes.set_ylabel("% of the sites' own parameters")
    tidy(axes, "Parameters of the dictionary")


def mark_kept(axes: Any, end: Line | None) -> None:
    """The generation whose state was kept."""
    if end is not None:
        axes.axvline(end["best"] + 1, color=MUTED, lw=0.8, ls=":")
        place = {"transform": axes.get_xaxis_transform(), "fontsize": 8, "color": MUTED, "va": "top"}
        axes.text(end["best"] + 1, 0.99, " kept", **place)
