"""Cells of the table, one method at one size each, in this process or in several."""

from __future__ import annotations

import atexit
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from benchmarks.frontier.families import Family, make_family
from benchmarks.frontier.families.base import default_cache
from benchmarks.frontier.table import Contest, Row
from benchmarks.harness import in_processes

Cell = tuple[str, float]
"""A method and the fraction of the members' bytes that it may take."""


@dataclass(frozen=True)
class Run:
    """Which family, and how cells are run.

    Attributes:
        family: its name.
        cache: folder of trained families; the user's cache where none is given.
        seed: of everything drawn at random.
        fast: tiny models, barely trained.
        members: how many at most.
        longer: times the epochs of every fine-tune.
        only: names of members.
        train_device: that members are trained on.
        device: that this package fits on.
        finalists: settings of a peer that are run at each size.
        threads: of each process.
    """

    family: str = "vit"
    cache: Path | None = None
    seed: int = 0
    fast: bool = False
    members: int | None = None
    longer: int = 1
    only: tuple[str, ...] | None = None
    train_device: str = "cpu"
    device: str = "cpu"
    finalists: int = 3
    threads: int = 1

    def make(self) -> Family:
        """The family, trained where it has to be."""
        return make_family(
            self.family, self.cache or default_cache(), self.seed, self.fast, self.members, self.longer, self.only,
            self.train_device,
        )  # fmt: skip


def contest_of(run: Run, family: Family, folder: Path) -> Contest:
    """The contest of a family whose files lie in a folder."""
    return Contest(family, folder, run.seed, run.finalists, run.device)


@cache
def _contest(run: Run) -> Contest:
    """The one of this process, whose spectra and moments serve all cells that it runs."""
    import torch

    torch.set_num_threads(run.threads)
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    return contest_of(run, run.make(), Path(folder.name))


def run_cell(run: Run, method: str, fraction: float) -> Row:
    """One method at one size, in a process that others follow in."""
    return _contest(run).row_of(method, fraction)


def rows_in_processes(
    run: Run, cells: Sequence[Cell], jobs: int, minutes: float | None = None
) -> Iterator[Row]:
    """Rows as they are done, in so many processes; the first cells begin first.

    Args:
        run: which family.
        cells: methods and sizes.
        jobs: processes at a time.
        minutes: after which no cell begins.
    """
    os.environ["OMP_NUM_THREADS"] = str(run.threads)
    end = float("inf") if minutes is None else time.monotonic() + 60 * minutes
    for _, row in in_processes(run_cell, [(run, *cell) for cell in cells], jobs, end):
        yield row
