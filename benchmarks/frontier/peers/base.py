"""What every peer is, and how bytes are shared out among matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from benchmarks.baselines import packed_bytes
from benchmarks.frontier.packing import Grid, Leaf, Package, Plain, leaf_bytes
from benchmarks.frontier.peers.grids import feed_back, round_to
from benchmarks.frontier.scene import Scene

INDEX = 9  # bytes of the compressed index for each leaf
LEVELS = (2, 3, 4, 8, 16, 32, 64, 256)
Setting = tuple[str, Callable[[], Package | None]]


@dataclass(frozen=True)
class Peer:
    """A method.

    Attributes:
        name: in tables.
        source: paper.
        settings: of a scene and a size in bytes: each setting's name, and what makes its package; None where the size
            is out of its reach.
        calibrated: whether it looks at inputs.
    """

    name: str
    source: str
    settings: Callable[[Scene, int], Iterator[Setting]]
    calibrated: bool = False


def rest_of(scene: Scene, bits: int) -> dict[str, dict[str, Leaf]]:
    """All tensors that are no matrices, by member, in bfloat16 or 8 bits; integers as they are."""

    def leaf(tensor: Tensor) -> Leaf:
        if bits == 16 or not tensor.is_floating_point():
            return Plain(tensor)
        rounded = round_to(tensor.float().reshape(1, -1), 1 << bits, 64)
        return Grid(rounded.codes, rounded.scale, rounded.levels, rounded.group, tuple(tensor.shape))

    made = scene.once(
        ("rest", bits),
        lambda: {m: {name: leaf(scene.states[m][name]) for name in scene.rest} for m in scene.names},
    )
    return {member: dict(leaves) for member, leaves in made.items()}


def rest_bits_for(scene: Scene, size: int) -> tuple[int, ...]:
    """Bits of what is no matrix that are tried: below a tenth of the members' bytes, bfloat16 never pays."""
    whole = sum(t.numel() * 4 for state in scene.states.values() for t in state.values())
    return (16, 8) if size >= 0.1 * whole else (8,)


def shaped(grid: Grid, like: Tensor) -> Grid:
    """A rounded matrix, read as a tensor of another shape."""
    return replace(grid, shape=tuple(like.shape))


def grid_bytes(matrix: Tensor, levels: int, group: int, zeros: bool = False) -> int:
    """Bytes of a rounded matrix `[out, in]`, scales (and zeros) of each group included."""
    bits = 8 / 5 if levels == 3 else (levels - 1).bit_length()
    return packed_bytes(matrix.shape, bits, group, 4 if zeros else 2)


def room_for(scene: Scene, size: int, rest: Mapping[str, Mapping[str, Leaf]], shared: int = 0) -> float:
    """Bytes that are left for matrices, beside the index of a file, the rest of each member and what is shared."""
    leaves = len(scene.names) * (len(scene.matrices) + len(scene.rest)) + len(scene.matrices)
    return (
        size
        - INDEX * leaves
        - 400
        - shared
        - sum(leaf_bytes(x) for each in rest.values() for x in each.values())
    )


def filled(
    scene: Scene,
    size: int,
    rest_bits: int,
    choose: Callable[[float], Sequence[int] | None],
    make: Callable[[str, str, int], Leaf | None],
    shared: Callable[[], dict[str, Leaf]] = dict,
    shared_bytes: int = 0,
) -> Package | None:
    """What is no matrix, what is shared, and a leaf for each member's matrix; None where the size is out of reach.

    Args:
        scene: of the members.
        size: bytes of all together.
        rest_bits: of what is no matrix.
        choose: of the bytes that are left for matrices, a choice for each of them, in the order of `items_of`; None
            where nothing fits.
        make: of a member, a matrix and its choice, the leaf; None for nothing beside what is shared.
        shared: what all members have.
        shared_bytes: of it.
    """
    rest = rest_of(scene, rest_bits)
    chosen = choose(room_for(scene, size, rest, shared_bytes))
    if chosen is None:
        return None
    for (member, name), choice in zip(items_of(scene), chosen, strict=True):
        if (leaf := make(member, name, choice)) is not None:
            rest[member][name] = leaf
    return Package(shared(), rest)


def items_of(scene: Scene) -> list[tuple[str, str]]:
    """Every matrix of every member."""
    return [(member, name) for member in scene.names for name in scene.matrices]


def as_matrix(leaf: Leaf, like: Tensor) -> Tensor:
    """What a leaf stands for, as a matrix."""
    return leaf.value().reshape(like.shape)


def compensating(matrix: Tensor, moment: Tensor | None, levels: int, group: int, order: bool = False) -> Grid:
    """A matrix by GPTQ; rounded with searched scales where second moments of its inputs are not known."""
    if moment is None or moment.dim() == 1:
        return round_to(matrix, levels, group)
    return feed_back(matrix, moment, levels, group, order=order)


def relative(scene: Scene, member: str | None, name: str, error: Tensor, whole: Tensor) -> float:
    """Squared output error of a matrix's error, of what the matrix gives on the same inputs."""
    return float(scene.cost(member, name, error) / scene.cost(member, name, whole).clamp_min(1e-30))


def allocate(options: Sequence[Sequence[tuple[float, float]]], budget: float) -> list[int] | None:
    """One option for each item, least total error within a budget of bytes: a Lagrangian, then what still fits.

    Args:
        options: by item, bytes and error of each choice.
        budget: bytes of all together.

    Returns:
        the chosen option of each item; None where not even the smallest fit.

    Example:
        >>> allocate([[(1, 9.0), (2, 1.0)], [(1, 4.0), (2, 3.0)]], 3)
        [1, 0]
    """

    def choose(price: float) -> list[int]:
        return [
            min(range(len(each)), key=lambda k: (each[k][1] + price * each[k][0], each[k][0]))
            for each in options
        ]

    def size(chosen: Sequence[int]) -> float:
        return sum(each[k][0] for each, k in zip(options, chosen, strict=True))

    smallest = [min(range(len(each)), key=lambda k: each[k][0]) for each in options]
    if size(smallest) > budget:
        return None
    if size(choose(0.0)) <= budget:
        return choose(0.0)
    low, high = 1e-30, 1.0
    while size(choose(high)) > budget and high < 1e30:
        high *= 16
    for _ in range(60):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if size(choose(middle)) > budget else (low, middle)
    chosen = choose(high)
    if size(chosen) > budget:
        chosen = smallest
    return _fill(options, chosen, budget - size(chosen))


def _fill(options: Sequence[Sequence[tuple[float, float]]], chosen: list[int], room: float) -> list[int]:
    """Take better options while they fit, the largest gain for a byte first."""
    while True:
        best, gain = None, 0.0
        for item, each in enumerate(options):
            now = each[chosen[item]]
            for k, (nbytes, error) in enumerate(each):
                more = nbytes - now[0]
                if 0 < more <= room and (now[1] - error) / more > gain:
                    best, gain = (item, k, more), (now[1] - error) / more
        if best is None:
            return chosen
        chosen[best[0]] = best[1]
        room -= best[2]
