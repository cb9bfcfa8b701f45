"""TVQ and RTVQ (Kim et al., 2503.06921): task vectors rounded between their least and their largest element.

RTVQ rounds the mean of all task vectors with more bits, and what each task adds to what that left with few.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product

from benchmarks.frontier.packing import MORE, Package
from benchmarks.frontier.peers.base import Peer, Setting, rest_bits_for, rest_of, room_for, shaped
from benchmarks.frontier.peers.grids import min_max
from benchmarks.frontier.peers.shared import shared_bytes, shared_leaves
from benchmarks.frontier.scene import Scene


def settings(scene: Scene, size: int) -> Iterator[Setting]:
    """Bits of the base, of the mean task vector (none for TVQ) and of each task's own."""
    centre = "mean" if scene.base is None else "base"

    def package(levels: int, common: int, own: int, group: int | None, rest_bits: int) -> Package | None:
        rest = rest_of(scene, rest_bits)
        count = sum(scene.matrix(scene.names[0], name).numel() for name in scene.matrices)
        needed = (
            count
            / 8
            * ((common.bit_length() - 1 if common else 0) + len(scene.names) * (own.bit_length() - 1))
        )
        if room_for(scene, size, rest, shared_bytes(scene, levels)) < needed:
            return None
        shared = shared_leaves(scene, centre, levels, False)
        for name in scene.matrices:
            base, like = scene.centre(centre, name), scene.states[scene.names[0]][name]
            if common:
                mean = min_max(scene.centre("mean", name) - base, common, group)
                shared[name + MORE] = shaped(mean, like)
                base = base + mean.value()
            for member in scene.names:
                rest[member][name] = shaped(min_max(scene.matrix(member, name) - base, own, group), like)
        return Package(shared, rest)

    commons = (0,) if centre == "mean" else (0, 8, 16)
    for levels, common, own, group, rest_bits in product(
        (8, 16, 256), commons, (16, 8, 4, 2), (None, 64), rest_bits_for(scene, size)
    ):
        words = (
            f"{centre} int{levels.bit_length() - 1}, "
            f"{f'mean vector {common.bit_length() - 1} bits, ' if common else ''}"
            f"task vectors {own.bit_length() - 1} bits, "
            f"a scale for {'each tensor' if group is None else 'groups of 64'}, rest {rest_bits} bits"
        )
        yield words, partial(package, levels, common, own, group, rest_bits)


TVQ = Peer("TVQ", "2503.06921", settings)
