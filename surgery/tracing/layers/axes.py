"""Roles of a tensor's axes: which are stack, out and in, for every way in which a tensor is used as a linear map.

Axes are given as *factors*, because one axis can hold two roles: axis 0 of a grouped convolution is groups
(stack) times out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Factor:
    """One factor of an axis: its name in the pattern, its role (`stack`, `out` or `in`) and its length."""

    name: str
    role: str
    size: int


Axes = tuple[tuple[Factor, ...], ...]  # for every axis of a tensor its factors, the slowest first


def linear_axes(shape: Shape) -> Axes:
    """`[..., out, in]`, as in `F.linear` and on the left of a matrix product."""
    roles = (*(["stack"] * (len(shape) - 2)), "out", "in")[-len(shape) :]
    return tuple((Factor(role[0], role, size),) for role, size in zip(roles, shape, strict=True))


def right_axes(shape: Shape) -> Axes:
    """`[..., in, out]`, as on the right of a matrix product."""
    if len(shape) == 1:
        return linear_axes(shape)
    *stack, out, into = linear_axes((*shape[:-2], shape[-1], shape[-2]))
    return (*stack, into, out)


def contracted_axes(shape: Shape, summed: Sequence[int]) -> Axes:
    """Axes summed over are in, all others out."""
    return tuple(
        (Factor("i", "in", n) if k in summed else Factor("o", "out", n),) for k, n in enumerate(shape)
    )


def conv_axes(shape: Shape, groups: int) -> Axes:
    """`[groups * out, in, ...]`: every group and kernel position is its own matrix (MUiR, section 3.1)."""
    first = (Factor("g", "stack", groups), Factor("o", "out", shape[0] // groups))
    return (first[groups == 1 :], (Factor("i", "in", shape[1]),), *_kernel_axes(shape))


def conv_transpose_axes(shape: Shape, groups: int) -> Axes:
    """`[groups * in, out, ...]`."""
    first = (Factor("g", "stack", groups), Factor("i", "in", shape[0] // groups))
    return (first[groups == 1 :], (Factor("o", "out", shape[1]),), *_kernel_axes(shape))


def gate_axes(shape: Shape, gates: int, name: str = "gate") -> Axes:
    """`[gates * out, in]`: every gate is its own matrix."""
    first = (Factor(name, "stack", gates), Factor("o", "out", shape[0] // gates))
    return (first[gates == 1 :], (Factor("i", "in", shape[1]),))


def einsum_axes(equation: str, index: int, shape: Shape) -> Axes | None:
    """Roles of operand `index`: only its own and in the output is out, summed with another is in, else stack.

    Returns:
        The axes, or `None` where a label is repeated, hidden in `...`, or summed over in this operand alone.
    """
    left, _, output = equation.replace(" ", "").partition("->")
    operands = left.split(",")
    labels = operands[index]
    others = "".join(operands[:index] + operands[index + 1 :])
    if "->" not in equation:
        output = "".join(sorted(c for c in set(left) - {",", "."} if left.count(c) == 1))
    if len(labels) != len(shape) or len(set(labels)) != len(labels) or "." in labels:
        return None
    axes = []
    for label, size in zip(labels, shape, strict=True):
        if label not in others and label not in output:
            return None
        shared = label in others
        role = "out" if not shared else "stack" if label in output else "in"
        axes.append((Factor({"out": "o", "in": "i", "stack": "s"}[role], role, size),))
    return tuple(axes)


def _kernel_axes(shape: Shape) -> Axes:
    names = {1: ("w",), 2: ("h", "w"), 3: ("d", "h", "w")}[len(shape) - 2]
    return tuple((Factor(name, "stack", n),) for name, n in zip(names, shape[2:], strict=True))


def is_depthwise(shape: Shape, groups: int, transposed: bool = False) -> bool:
    """Whether every output channel of a convolution reads one input channel."""
    return groups > 1 and (shape[0] == groups if transposed else shape[1] == 1)
