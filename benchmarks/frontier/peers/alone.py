"""Each member by itself: rounding with searched scales, HQQ and GPTQ, one width for all or a width for each matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from torch import Tensor

from benchmarks.frontier.packing import Grid, Leaf, Package
from benchmarks.frontier.peers.base import (
    LEVELS,
    Peer,
    Setting,
    allocate,
    filled,
    grid_bytes,
    items_of,
    relative,
    rest_bits_for,
    shaped,
)
from benchmarks.frontier.peers.grids import feed_back, half_quadratic, round_to
from benchmarks.frontier.scene import Scene

GROUPS = (64, 0)
Rounding = Callable[[Scene, str, str, int, int], Grid]


def by(kind: str, make: Callable[[Tensor, int, int], Grid]) -> Rounding:
    """Rounds a member's matrix on its own, once."""

    def grid(scene: Scene, member: str, name: str, levels: int, group: int) -> Grid:
        return scene.once(
            (kind, member, name, levels, group), lambda: make(scene.matrix(member, name), levels, group)
        )

    return grid


rounded, quadratic = by("rounded", round_to), by("hqq", half_quadratic)


def compensated(scene: Scene, member: str, name: str, levels: int, group: int, order: bool = False) -> Grid:
    """A member's matrix by GPTQ, or rounded where its inputs are not seen."""
    moment = scene.moments(member).get(name)
    if moment is None or moment.dim() == 1 or levels == 2:
        return rounded(scene, member, name, levels, group)
    key = ("gptq", member, name, levels, group, order)
    return scene.once(key, lambda: feed_back(scene.matrix(member, name), moment, levels, group, order=order))


def prices(
    scene: Scene, make: Rounding, group: int, levels: tuple[int, ...], member: str, name: str
) -> list[float]:
    """What each width costs one matrix, in relative output error."""
    matrix = scene.matrix(member, name)

    def price(width: int) -> float:
        error = make(scene, member, name, width, group).value().flatten(1).view_as(matrix) - matrix
        return relative(scene, member, name, error, matrix)

    return [
        scene.once(("price", make, member, name, width, group), partial(price, width)) for width in levels
    ]


def settings_of(
    make: Rounding, zeros: bool, widths: tuple[int, ...]
) -> Callable[[Scene, int], Iterator[Setting]]:
    """Groups, 16 or 8 bits for what is no matrix, and one width for all or one for each matrix."""

    def settings(scene: Scene, size: int) -> Iterator[Setting]:
        items = items_of(scene)

        def package(group: int, rest_bits: int, mixed: bool) -> Package | None:
            sizes = [
                [grid_bytes(scene.matrix(*item), width, group, zeros) for width in widths] for item in items
            ]

            def choose(room: float) -> list[int] | None:
                if mixed:
                    costs = [prices(scene, make, group, widths, *item) for item in items]
                    pairs = [list(zip(*both, strict=True)) for both in zip(sizes, costs, strict=True)]
                    return allocate(pairs, room)
                fits = [k for k in range(len(widths)) if sum(each[k] for each in sizes) <= room]
                return [max(fits)] * len(items) if fits else None

            def leaf(member: str, name: str, k: int) -> Leaf:
                return shaped(make(scene, member, name, widths[k], group), scene.states[member][name])

            return filled(scene, size, rest_bits, choose, leaf)

        for group in GROUPS:
            for mixed in (True, False):
                for rest_bits in rest_bits_for(scene, size):
                    words = f"groups of {group or 'a row'}, {'mixed' if mixed else 'one'} width, rest {rest_bits} bits"
                    yield words, partial(package, group, rest_bits, mixed)

    return settings


def ordered(scene: Scene, member: str, name: str, levels: int, group: int) -> Grid:
    """GPTQ with columns in order of their moments."""
    return compensated(scene, member, name, levels, group, True)


def gptq_settings(scene: Scene, size: int) -> Iterator[Setting]:
    """GPTQ's, columns as they are or, for whole rows, in order of their moments."""
    for words, make in settings_of(compensated, False, LEVELS)(scene, size):
        yield words, make
    for words, make in settings_of(ordered, False, LEVELS)(scene, size):
        if "a row" in words:
            yield f"{words}, ordered", make


ROUNDING = Peer("rounding", "searched scales", settings_of(rounded, False, LEVELS))
HQQ = Peer("HQQ", "Badri and Shaji 2023", settings_of(quadratic, True, LEVELS[2:]))
GPTQ = Peer("GPTQ", "2210.17323", gptq_settings, calibrated=True)
