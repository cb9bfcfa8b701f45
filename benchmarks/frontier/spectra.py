"""How low the rank of members' differences is: what share of their energy the first directions hold."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.frontier.peers.shared import roots
from benchmarks.frontier.scene import Scene

DIRECTIONS = 16


def share(values: Tensor, directions: int = DIRECTIONS) -> float:
    """Of the sum of squared singular values, what the largest hold.

    Example:
        >>> share(torch.ones(4), 2)
        0.5
    """
    energy = values.square()
    return float(energy[:directions].sum() / energy.sum().clamp_min(1e-30))


def spectra(scene: Scene) -> list[dict[str, Any]]:
    """For each member, over its matrices of which inputs are seen: size of its difference from the mean and from the
    base, and the share of energy in 16 directions, plain and in the metric of its inputs."""
    found = []
    for member in scene.names:
        moments = scene.moments(member)
        plain, white, size, whole, moved = [], [], 0.0, 0.0, 0.0
        for name in scene.matrices:
            matrix = scene.matrix(member, name)
            difference = matrix - scene.centre("mean", name)
            size, whole = size + float(difference.square().sum()), whole + float(matrix.square().sum())
            if scene.base is not None:
                moved += float((matrix - scene.centre("base", name)).square().sum())
            moment = moments.get(name)
            if moment is None or moment.dim() == 1 or min(matrix.shape) <= 2 * DIRECTIONS:
                continue
            energy = float(difference.square().sum())
            plain.append((share(torch.linalg.svdvals(difference)), energy))
            root, _ = roots(moment)
            turned = difference @ root
            white.append((share(torch.linalg.svdvals(turned)), float(turned.square().sum())))
        found.append({
            "member": member,
            "from the mean": (size / whole) ** 0.5,
            "from the base": (moved / whole) ** 0.5 if scene.base is not None else None,
            "energy in 16": _mean(plain),
            "energy in 16, whitened": _mean(white),
        })  # fmt: skip
    return found


def _mean(pairs: list[tuple[float, float]]) -> float | None:
    total = sum(weight for _, weight in pairs)
    return sum(value * weight for value, weight in pairs) / total if total else None
