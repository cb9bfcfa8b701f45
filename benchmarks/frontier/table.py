"""At each size the best setting of every method, chosen on validation data and measured on test data."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.frontier.families import Family
from benchmarks.frontier.measure import Judge, Quality
from benchmarks.frontier.ours import Merged, merge_within
from benchmarks.frontier.packing import Package, read
from benchmarks.frontier.peers.all import PEERS
from benchmarks.frontier.peers.base import Peer
from benchmarks.frontier.scene import Scene

FRACTIONS = (0.14, 0.10, 0.07, 0.05, 0.04, 0.03)  # of the members' bytes in float32
CHOOSE = 256  # validation examples of a member by which a setting is chosen
MEASURE = 1000  # test examples of a member
Row = dict[str, Any]
PLAIN, CALIBRATED = OURS = "surgery", "surgery, calibrated"  # this package, without and with data


@dataclass(frozen=True)
class Tried:
    """A package on disk and what it is worth on validation data."""

    words: str
    path: Path
    nbytes: int
    marginal: float
    make: float
    quality: Quality


class Contest:
    """One family, its data and a folder for files.

    Args:
        family: the members.
        folder: for packages and artifacts.
        seed: of everything random in methods.
        finalists: settings of a peer that are run on validation data at each size: those whose weights are nearest,
            as second moments measure it.
        device: that this package fits on.
    """

    def __init__(self, family: Family, folder: Path, seed: int, finalists: int = 3, device: str = "cpu"):
        self.family, self.folder, self.seed = family, folder, seed
        self.finalists, self.device = finalists, device
        self.scene, self.judge = Scene.of(family), Judge(family, {"validation": CHOOSE, "test": MEASURE})

    def row_of(self, method: str, fraction: float) -> Row:
        """One method at one size."""
        size = int(fraction * self.family.whole)
        if method in OURS:
            folder, calibrated = self.folder / f"{fraction}-{method}", method == CALIBRATED
            merged = merge_within(self.family, size, folder, self.seed, calibrated, self.device)
            return self.our_row(method, fraction, merged)
        (peer,) = [each for each in PEERS if each.name == method]
        return self.row(peer.name, fraction, self.best_of(peer, size))

    def best_of(self, peer: Peer, size: int) -> Tried | None:
        """The setting of a peer with the least mean error on validation data."""
        found: list[tuple[float, int, Package, str, float]] = []
        for number, (words, make) in enumerate(peer.settings(self.scene, size)):
            package, seconds = self.scene.timed(make)
            if package is not None:
                found.append((self.distance(package), number, package, words, seconds))
                found = sorted(found)[: 2 * self.finalists]  # those that may turn out too large included
        best: Tried | None = None
        left = self.finalists
        for _, number, package, words, seconds in found:
            path = self.folder / f"{number}.family"
            nbytes = package.write(path)
            if nbytes > size or not left:
                path.unlink()
                continue
            left -= 1
            quality = self.judge.judge(package.states(), "validation")
            if best is None or quality.error < best.quality.error:
                if best is not None:
                    best.path.unlink()
                best = Tried(words, path, nbytes, package.marginal, seconds, quality)
            else:
                path.unlink()
        return best

    def distance(self, package: Package) -> float:
        """Of a package's matrices from the members', in relative output error of each matrix."""
        total = 0.0
        for member, state in package.states().items():
            for name in self.scene.matrices:
                matrix = self.scene.matrix(member, name)
                error = state[name].flatten(1) - matrix
                whole = self.scene.once(
                    ("whole", member, name),
                    lambda m=member, n=name, w=matrix: float(self.scene.cost(m, n, w)),
                )
                total += float(self.scene.cost(member, name, error)) / max(whole, 1e-30)
        return total

    def row(self, method: str, fraction: float, tried: Tried | None) -> Row:
        """A peer's row: read from its file and measured on test data."""
        if tried is None:
            return self.line(method, fraction, detail="out of reach")
        start = time.perf_counter()
        states = read(tried.path).states()
        load = time.perf_counter() - start
        tried.path.unlink()
        quality = self.judge.judge(states, "test")
        return self.line(
            method, fraction, quality, tried.nbytes, tried.marginal, tried.make, load, tried.words
        )

    def our_row(self, method: str, fraction: float, merged: Merged | str) -> Row:
        """This package's row."""
        if isinstance(merged, str):
            return self.line(method, fraction, detail=f"out of reach: {merged}")
        quality = self.judge.judge(merged.states, "test")
        return self.line(
            method, fraction, quality, merged.nbytes, merged.marginal, merged.make, merged.load,
            f"{merged.detail}; all files {merged.all_bytes:,} bytes",
        )  # fmt: skip

    def line(
        self,
        method: str,
        fraction: float,
        quality: Quality | None = None,
        nbytes: int | None = None,
        marginal: float | None = None,
        make: float | None = None,
        load: float | None = None,
        detail: str = "",
    ) -> Row:
        """What the table shows of one method at one size."""
        each = self.family.whole / len(self.family.states)
        return {
            "family": self.family.name,
            "within": f"{fraction:.0%}",
            "method": method,
            "bytes": nbytes,
            "of fp32": None if nbytes is None else nbytes / self.family.whole,
            "error": quality and quality.error,
            "worst error": quality and quality.worst_error,
            "kept": quality and quality.mean_kept,
            "worst kept": quality and quality.worst_kept,
            "one more": None if marginal is None else marginal / each,
            "make s": make,
            "load s": load,
            "setting": detail,
        }
