"""Layout: where the axes of a value derived from a parameter come from, and the parameter's canonical view.

A parameter is seldom used exactly as it is stored: it is transposed, cut into heads or chunks, cast or
standardised first. A `Layout` says for every axis of such a value which factors of the parameter's own axes
it walks over. Views are read off shapes, strides and offsets alone, so no data is needed.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace

from surgery.geometry.views import CanonicalView
from surgery.tracing.layers.axes import Axes, Factor, Shape


@dataclass(frozen=True)
class Strided:
    """Shape, strides and offset of a tensor, without its data."""

    shape: Shape
    strides: Shape
    offset: int = 0


@dataclass(frozen=True)
class Atom:
    """`size` positions, `step` apart, on the parameter's axis number `axis`."""

    axis: int
    step: int
    size: int


@dataclass(frozen=True)
class Layout:
    """The axes of a value in terms of a parameter's axes.

    Attributes:
        shape: of the parameter.
        axes: for every axis of the value its atoms, the slowest first; none where the axis repeats the
            parameter.
        starts: for every axis of the parameter the position at which the value begins.
    """

    shape: Shape
    axes: tuple[tuple[Atom, ...], ...]
    starts: tuple[int, ...]

    @classmethod
    def whole(cls, shape: Shape) -> Layout:
        """The parameter itself."""
        return cls(shape, tuple((Atom(k, 1, n),) for k, n in enumerate(shape)), (0,) * len(shape))


def contiguous(shape: Shape) -> Strided:
    """A tensor of this shape in row-major order."""
    return Strided(shape, tuple(math.prod(shape[k + 1 :]) for k in range(len(shape))))


def through_view(layout: Layout, base: Strided, view: Strided) -> Layout | None:
    """The layout of `view`, which shares the memory of a value with `layout`, stored as `base`.

    Returns:
        The layout, or `None` where an axis of the view runs across the base's axes unevenly, or nothing is left.
    """
    if 0 in view.shape:
        return None
    starts = list(layout.starts)
    for axis, position in enumerate(_coordinates(view.offset - base.offset, base)):
        sizes = tuple(atom.size for atom in layout.axes[axis])
        for atom, at in zip(layout.axes[axis], _coordinates(position, contiguous(sizes)), strict=True):
            starts[atom.axis] += at * atom.step
    axes = []
    for size, stride in zip(view.shape, view.strides, strict=True):
        pieces = _cut(size, stride, base)
        if pieces is None:
            return None
        atoms: list[Atom] = []
        for axis, step, length in pieces:
            part = _subdivide(layout.axes[axis], base.shape[axis], step, length)
            if part is None:
                return None
            atoms += part
        axes.append(tuple(atoms))
    return replace(layout, axes=tuple(axes), starts=tuple(starts))


def canonical_view(layout: Layout, roles: Axes, used: Shape) -> CanonicalView | str:
    """The parameter's view as `[S, out, in]`, for a value of shape `used` whose axes have the given roles.

    Returns:
        The view, or a sentence that says why there is none.
    """
    found: list[tuple[Atom, Factor]] = []
    for atoms, factors, size in zip(layout.axes, roles, used, strict=True):
        matched = _match(atoms, factors, size)
        if matched is None:
            return "an axis is cut in a way that no einops pattern can say"
        present = {factor.role for _, factor in matched}
        if size > 1 and any(f.role != "stack" and f.role not in present and f.size > 1 for f in factors):
            return "scales a linear map and is not one"
        found += matched
    if sum(size > 1 for size in layout.shape) < 2 and len(layout.shape) < 2:
        return "is a vector"
    return _pattern(layout, _merge(found), [f for factors in roles for f in factors])


def _coordinates(offset: int, base: Strided) -> list[int]:
    """The position on every axis of `base` that lies at `offset` in its memory."""
    position = [0] * len(base.shape)
    for axis in sorted(range(len(base.shape)), key=lambda k: -base.strides[k]):
        if base.shape[axis] > 1 and base.strides[axis] > 0:
            position[axis], offset = divmod(offset, base.strides[axis])
    return position


def _cut(size: int, stride: int, base: Strided) -> list[tuple[int, int, int]] | None:
    """`size` steps of `stride` through the memory of `base` as `(axis, step, length)`, the slowest first."""
    pieces: list[tuple[int, int, int]] = []
    if stride == 0:
        return pieces
    order = sorted((k for k in range(len(base.shape)) if base.shape[k] > 1), key=lambda k: base.strides[k])
    for axis in order:
        inner, length = base.strides[axis], base.shape[axis]
        if size == 1 or inner == 0:
            continue
        if stride % inner or stride >= inner * length:
            continue
        step = stride // inner
        room = -(-length // step)
        take = min(size, room)
        if size > take and (size % take or length % step):
            return None
        pieces.insert(0, (axis, step, take))
        size, stride = size // take, inner * length
    return pieces if size == 1 else None


def _subdivide(atoms: tuple[Atom, ...], length: int, step: int, size: int) -> list[Atom] | None:
    """The part of an axis made of `atoms` that `size` positions `step` apart walk over."""
    sizes = tuple(atom.size for atom in atoms)
    if not atoms:
        return []
    if step == 1 and size == length:
        return list(atoms)
    if math.prod(sizes) != length:
        return None
    pieces = _cut(size, step, contiguous(sizes))
    if pieces is None:
        return None
    return [Atom(atoms[k].axis, atoms[k].step * inner, n) for k, inner, n in pieces]


def _match(
    atoms: tuple[Atom, ...], factors: tuple[Factor, ...], size: int
) -> list[tuple[Atom, Factor]] | None:
    """Atoms and factors of one axis, split until they correspond one to one."""
    if not atoms:
        return []
    if len(factors) == 1:
        return [(atom, factors[0]) for atom in atoms]
    if math.prod(atom.size for atom in atoms) != size:
        return None
    matched: list[tuple[Atom, Factor]] = []
    rest, wanted = list(atoms), list(factors)
    while rest and wanted:
        atom, factor = rest.pop(), wanted.pop()
        shared = min(atom.size, factor.size)
        if max(atom.size, factor.size) % shared:
            return None
        matched.insert(0, (replace(atom, size=shared), factor))
        if atom.size > shared:
            rest.append(Atom(atom.axis, atom.step * shared, atom.size // shared))
        if factor.size > shared:
            wanted.append(replace(factor, size=factor.size // shared))
    return matched


def _merge(found: list[tuple[Atom, Factor]]) -> list[tuple[Atom, Factor]]:
    """Neighbours that walk on along one axis of the parameter in the same role, as one."""
    merged: list[tuple[Atom, Factor]] = []
    for atom, factor in found:
        if atom.size == 1 and len(found) > 1 and any(a.axis == atom.axis for a, _ in found if a is not atom):
            continue
        if merged:
            last, role = merged[-1]
            if last.axis == atom.axis and role.role == factor.role and last.step == atom.step * atom.size:
                merged[-1] = (Atom(atom.axis, atom.step, last.size * atom.size), role)
                continue
        merged.append((atom, factor))
    return merged


def _pattern(layout: Layout, found: list[tuple[Atom, Factor]], roles: list[Factor]) -> CanonicalView | str:
    """Name every piece, add a stack axis for what a slice leaves out, and write the pattern."""
    named = [factor.name for _, factor in found]
    spare = iter([factor for factor in roles if factor.size == 1 and factor.name not in named])
    per_axis: list[list[tuple[Atom, Factor]]] = []
    for axis, length in enumerate(layout.shape):
        pieces = sorted((p for p in found if p[0].axis == axis), key=lambda p: -p[0].step)
        if not pieces and length == 1:
            pieces = [(Atom(axis, 1, 1), next(spare, Factor("s", "stack", 1)))]  # no stride shows it
            found = [*found, pieces[0]]
        filled = _fill(axis, length, pieces, layout.starts[axis])
        if filled is None:
            return "an axis is cut in a way that no einops pattern can say"
        per_axis.append(filled)
    # Gaps are not in it: they come first.
    place = {(atom.axis, atom.step): k for k, (atom, _) in enumerate(found)}
    pieces = [piece for filled in per_axis for piece in filled]
    ordered = sorted(pieces, key=lambda piece: place.get((piece[0].axis, piece[0].step), -1))
    repeated = Counter(factor.name for _, factor in ordered)
    seen: Counter[str] = Counter()
    names: dict[tuple[int, int], str] = {}
    for atom, factor in ordered:
        seen[factor.name] += 1
        suffix = str(seen[factor.name]) if repeated[factor.name] > 1 else ""
        names[atom.axis, atom.step] = factor.name + suffix
    left = " ".join(_group([names[a.axis, a.step] for a, _ in filled]) for filled in per_axis)
    right = " ".join(
        _group([names[a.axis, a.step] for a, f in ordered if f.role == role])
        for role in ("stack", "out", "in")
    )
    sizes = {names[a.axis, a.step]: a.size for a, _ in ordered}
    return CanonicalView.of(f"{left} -> {right}", layout.shape, **sizes)


def _fill(
    axis: int, length: int, pieces: list[tuple[Atom, Factor]], start: int
) -> list[tuple[Atom, Factor]] | None:
    """The pieces of one axis with stack factors in the gaps that slices leave; an uneven slice is widened."""
    if len(pieces) == 1 and pieces[0][0].step == 1:
        size = pieces[0][0].size
        if length % size or start % size:
            return [(Atom(axis, 1, length), pieces[0][1])]
    filled: list[tuple[Atom, Factor]] = []
    inner = 1
    for atom, factor in reversed(pieces):
        if atom.step % inner:
            return None
        if atom.step > inner:
            filled.insert(0, (Atom(axis, inner, atom.step // inner), Factor("s", "stack", 0)))
        filled.insert(0, (atom, factor))
        inner = atom.step * atom.size
    if length % inner:
        return None
    if length > inner:
        filled.insert(0, (Atom(axis, inner, length // inner), Factor("s", "stack", 0)))
    return filled


def _group(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"({' '.join(names)})" if names else "1"
