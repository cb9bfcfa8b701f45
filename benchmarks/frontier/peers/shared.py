"""One matrix for all members, their mean or the base, and what each differs by: few bits, or a low rank.

The shared matrix is rounded, or rounded with error feedback under the members' mean second moments. Differences are
taken from the unrounded shared matrix (open) or from the rounded one (closed). Low ranks are plain, or whitened: the
best rank r in the metric of a member's inputs is the truncated SVD of `D H^(1/2)`, times `H^(-1/2)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import product

import torch
from torch import Tensor

from benchmarks.frontier.packing import Grid, Leaf, Package, Product
from benchmarks.frontier.peers.base import (
    Peer,
    Setting,
    allocate,
    as_matrix,
    compensating,
    filled,
    grid_bytes,
    items_of,
    relative,
    rest_bits_for,
    shaped,
)
from benchmarks.frontier.peers.grids import round_to
from benchmarks.frontier.scene import Scene, weighted

GROUP = 64
RANKS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)


def centres(scene: Scene) -> tuple[str, ...]:
    """Of what can be shared, what there is."""
    return ("mean",) if scene.base is None else ("mean", "base")


def shared_grid(scene: Scene, centre: str, name: str, levels: int, feedback: bool) -> Grid:
    """The shared matrix, rounded."""

    def make() -> Grid:
        moment = scene.moments().get(name) if feedback else None
        return compensating(scene.centre(centre, name), moment, levels, GROUP)

    return scene.once(("shared", centre, name, levels, feedback), make)


def shared_leaves(scene: Scene, centre: str, levels: int, feedback: bool) -> dict[str, Leaf]:
    """All shared matrices, as tensors."""
    like = scene.states[scene.names[0]]
    return {
        name: shaped(shared_grid(scene, centre, name, levels, feedback), like[name])
        for name in scene.matrices
    }


def shared_bytes(scene: Scene, levels: int) -> int:
    """Bytes of all shared matrices."""
    return sum(grid_bytes(scene.matrix(scene.names[0], name), levels, GROUP) for name in scene.matrices)


def roots(moment: Tensor, damp: float = 1e-4) -> tuple[Tensor, Tensor]:
    """`H^(1/2)` and `H^(-1/2)` of second moments `[in, in]`, eigenvalues held above a fraction of their mean."""
    values, vectors = torch.linalg.eigh(moment.double())
    values = values.clamp_min(float(values.mean()) * damp).clamp_min(1e-12)
    root = (vectors * values.sqrt()) @ vectors.T
    back = (vectors / values.sqrt()) @ vectors.T
    return root.float(), back.float()


def factor(difference: Tensor, moment: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """`left [out, k]` and `right [k, in]`, whose first r columns and rows are the best rank r; squared singular values.

    Args:
        difference: `[out, in]`.
        moment: of its inputs `[in, in]`; None for the plain SVD.
    """
    if moment is None:
        u, s, v = torch.linalg.svd(difference, full_matrices=False)
        return u * s.sqrt(), s.sqrt().unsqueeze(1) * v, s.square()
    root, back = roots(moment)
    u, s, v = torch.linalg.svd(difference @ root, full_matrices=False)
    return u * s.sqrt(), s.sqrt().unsqueeze(1) * (v @ back), s.square()


def factors_of(
    scene: Scene, member: str, name: str, centre: str, whitened: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Factors of a member's difference from what is shared."""

    def make() -> tuple[Tensor, Tensor, Tensor]:
        moment = scene.moments(member).get(name) if whitened else None
        moment = None if moment is None or moment.dim() == 1 else moment
        return factor(scene.matrix(member, name) - scene.centre(centre, name), moment)

    return scene.once(("factors", member, name, centre, whitened), make)


def product_of(
    scene: Scene, member: str, name: str, centre: str, white: bool, rank: int, levels: int
) -> Product:
    """The first directions of both factors, each rounded along its length."""

    def make() -> tuple[Grid, Grid]:
        left, right, _ = factors_of(scene, member, name, centre, white)
        most = min(RANKS[-1], left.shape[1])
        return tuple(round_to(each[:most].contiguous(), levels, GROUP) for each in (left.T, right))  # type: ignore

    grids = scene.once(("rounded factors", member, name, centre, white, levels), make)
    first = [
        replace(each, codes=each.codes[:rank], scale=each.scale[:rank], shape=(rank, each.codes.shape[1]))
        for each in grids
    ]
    return Product(first[0], first[1], tuple(scene.states[member][name].shape))


def rank_bytes(matrix: Tensor, rank: int, levels: int) -> int:
    """Bytes of both factors."""
    rows, width = matrix.shape
    if not rank:
        return 0
    return grid_bytes(matrix.new_empty(rank, rows), levels, GROUP) + grid_bytes(
        matrix.new_empty(rank, width), levels, GROUP
    )


def low_rank_settings(
    whitened: tuple[bool, ...],
    feedback: tuple[bool, ...],
    only: str | None = None,
    shared: tuple[int, ...] = (8, 16, 32),
    factors: tuple[int, ...] = (8, 16),
    evens: tuple[bool, ...] = (False, True),
) -> Callable[[Scene, int], Iterator[Setting]]:
    """Shared and factor bits, mean or base, and ranks: one for all matrices, or by their spectra."""

    def settings(scene: Scene, size: int) -> Iterator[Setting]:
        def package(
            centre: str, levels: int, white: bool, back: bool, width: int, even: bool, rest_bits: int
        ) -> Package | None:
            def choose(room: float) -> list[int] | None:
                return ranks_for(scene, items_of(scene), centre, white, width, even, room)

            def leaf(member: str, name: str, rank: int) -> Leaf | None:
                return product_of(scene, member, name, centre, white, rank, width) if rank else None

            common = partial(shared_leaves, scene, centre, levels, back)
            return filled(scene, size, rest_bits, choose, leaf, common, shared_bytes(scene, levels))

        centre_kinds = [each for each in centres(scene) if only in (None, each)] or ["mean"]
        grid = product(centre_kinds, shared, whitened, feedback, factors, evens, rest_bits_for(scene, size))
        for centre, levels, white, back, width, even, rest_bits in grid:
            words = (
                f"{centre} int{levels.bit_length() - 1}{' by GPTQ' if back else ''}, "
                f"{'whitened ' if white else ''}{'one rank' if even else 'ranks by spectrum'}, "
                f"factors int{width.bit_length() - 1}, rest {rest_bits} bits"
            )
            yield words, partial(package, centre, levels, white, back, width, even, rest_bits)

    return settings


def ranks_for(
    scene: Scene, items: list[tuple[str, str]], centre: str, white: bool, width: int, even: bool, room: float
) -> list[int] | None:
    """A rank for each member's matrix that fits into some bytes; embeddings are shared alone where ranks are even."""
    choices = [[rank for rank in RANKS if rank < min(scene.matrix(*item).shape)] or [0] for item in items]
    if even:
        tables = {
            name
            for member, name in items
            if (h := scene.moments(member).get(name)) is not None and h.dim() == 1
        }
        choices = [[0] if name in tables else each for each, (_, name) in zip(choices, items, strict=True)]
        for rank in reversed(RANKS):
            ranks = [max(k for k in each if k <= rank) for each in choices]
            if (
                sum(rank_bytes(scene.matrix(*item), k, width) for item, k in zip(items, ranks, strict=True))
                <= room
            ):
                return ranks
        return None
    options = []
    for item, each in zip(items, choices, strict=True):
        matrix = scene.matrix(*item)
        spectrum = factors_of(scene, *item, centre, white)[2]
        tail = torch.cat([spectrum.flip(0).cumsum(0).flip(0), spectrum.new_zeros(1)])
        moment = scene.moments(item[0]).get(item[1]) if white else None
        # An embedding's factors are plain, so its whole is too.
        seen = moment is not None and moment.dim() == 2
        whole = weighted(matrix, moment) if seen else matrix.square().sum()
        options.append([(rank_bytes(matrix, k, width), float(tail[k] / whole)) for k in each])
    chosen = allocate(options, room)
    return None if chosen is None else [each[k] for each, k in zip(choices, chosen, strict=True)]


def few_bits_settings(scene: Scene, size: int) -> Iterator[Setting]:
    """Differences of 1 bit, ternary, 2 or 3 bits, or none, for each member's matrix whichever pays most."""
    items = items_of(scene)

    def package(
        centre: str, levels: int, back: bool, closed: bool, widths: tuple[int, ...], rest_bits: int
    ) -> Package | None:
        def target(member: str, name: str) -> Tensor:
            matrix = scene.matrix(member, name)
            if closed:
                return matrix - as_matrix(shared_grid(scene, centre, name, levels, back), matrix)
            return matrix - scene.centre(centre, name)

        def grid(member: str, name: str, width: int) -> Grid:
            key = ("few", centre, (levels, back) if closed else None, member, name, width)
            return scene.once(key, lambda: round_to(target(member, name), width, GROUP))

        def price(member: str, name: str, width: int) -> float:
            def find() -> float:
                wanted = target(member, name)
                error = wanted if not width else wanted - as_matrix(grid(member, name, width), wanted)
                return relative(scene, member, name, error, scene.matrix(member, name))

            return scene.once(
                ("few price", centre, (levels, back) if closed else None, member, name, width), find
            )

        def choose(room: float) -> list[int] | None:
            sizes = [
                [grid_bytes(scene.matrix(*item), w, GROUP) if w else 0 for w in widths] for item in items
            ]
            costs = [[price(*item, w) for w in widths] for item in items]
            return allocate([list(zip(*both, strict=True)) for both in zip(sizes, costs, strict=True)], room)

        def leaf(member: str, name: str, k: int) -> Leaf | None:
            made = grid(member, name, widths[k]) if widths[k] else None
            return None if made is None else shaped(made, scene.states[member][name])

        common = partial(shared_leaves, scene, centre, levels, back)
        return filled(scene, size, rest_bits, choose, leaf, common, shared_bytes(scene, levels))

    few = ((0, 2, 3, 4, 8), (0, 3), (0, 4))
    loops = ((False, True), (True, False))  # what error feedback left is no target for a few bits
    for centre, levels, (back, closed), widths, rest_bits in product(
        centres(scene), (8, 16, 32), loops, few, rest_bits_for(scene, size)
    ):
        words = (
            f"{centre} int{levels.bit_length() - 1}{' by GPTQ' if back else ''}, differences of "
            f"{'any of 1 to 3 bits' if len(widths) > 2 else 'three values' if widths[1] == 3 else '2 bits'}, "
            f"{'closed' if closed else 'open'} loop, rest {rest_bits} bits"
        )
        yield words, partial(package, centre, levels, back, closed, widths, rest_bits)


FEW_BITS = Peer("mean + few bits", "folklore", few_bits_settings, calibrated=True)
LOW_RANK = Peer("mean + low rank", "plain SVD", low_rank_settings((False,), (False,)))
WHITENED = Peer(
    "mean by GPTQ + whitened low rank", "SVD-LLM 2403.07378, GPTQ", low_rank_settings((True,), (True,)), True
)
TSV = Peer(
    "TSV-Compress",
    "2412.00081: a share of the singular vectors of each task's difference from the base, in 8 bits",
    low_rank_settings((False,), (False,), "base", (16, 256), (256,), (True,)),
)
