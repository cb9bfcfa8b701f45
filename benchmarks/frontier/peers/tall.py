"""TALL masks (Wang et al., 2405.07813): one vector for all tasks, and for each task a mask of what it needs of it.

`theta_t = theta_0 + m_t * tau`, tau a multiple of the sum of all tasks' differences from the base, and
`m_t = |tau_t| >= lambda |tau - tau_t|`. Masks go through a lossless coder, as the paper proposes.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product

from torch import Tensor

from benchmarks.frontier.packing import TASK, Mask, Package
from benchmarks.frontier.peers.base import Peer, Setting, as_matrix, rest_bits_for, rest_of, room_for, shaped
from benchmarks.frontier.peers.grids import round_to
from benchmarks.frontier.peers.shared import GROUP, shared_bytes, shared_grid, shared_leaves
from benchmarks.frontier.scene import Scene


def mask_of(own: Tensor, every: Tensor, weight: float) -> Tensor:
    """Where a task keeps the common vector.

    Args:
        own: the task's difference from the base.
        every: the common vector, of the same shape.
        weight: lambda; more keeps less.
    """
    return own.abs() >= weight * (every - own).abs()


def settings(scene: Scene, size: int) -> Iterator[Setting]:
    """Lambda, the factor of the sum, and bits of the base and of the common vector."""
    centre = "mean" if scene.base is None else "base"

    def package(weight: float, factor: float, levels: int, vector: int, rest_bits: int) -> Package | None:
        rest = rest_of(scene, rest_bits)
        if room_for(scene, size, rest, shared_bytes(scene, levels) + shared_bytes(scene, vector)) < 0:
            return None
        shared = shared_leaves(scene, centre, levels, False)
        for name in scene.matrices:
            base = scene.centre(centre, name)
            every = factor * sum((scene.matrix(each, name) - base for each in scene.names), start=0 * base)
            grid = round_to(every, vector, GROUP, steps=8)
            like = scene.states[scene.names[0]][name]
            shared[name + TASK] = shaped(grid, like)
            low = as_matrix(shared_grid(scene, centre, name, levels, False), base)
            for member in scene.names:
                own = scene.matrix(member, name) - low
                rest[member][name] = Mask(mask_of(own, grid.value(), weight).view_as(like))
        return Package(shared, rest)

    for weight, factor, levels, vector, rest_bits in product(
        (0.2, 0.4, 0.6, 1.0), (0.3, 0.6, 1.0), (16, 256), (16, 256), rest_bits_for(scene, size)
    ):
        if vector <= levels:
            words = (
                f"lambda {weight}, {factor} of the sum, {centre} int{levels.bit_length() - 1}, "
                f"vector int{vector.bit_length() - 1}, rest {rest_bits} bits"
            )
            yield words, partial(package, weight, factor, levels, vector, rest_bits)


TALL = Peer("TALL masks", "2405.07813", settings)
