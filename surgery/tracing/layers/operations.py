"""Operations: how each one uses its arguments, as a linear map or beside one.

A reader takes one operation of a graph and yields a `Reading` for every argument that may be a weight.
Operations go by their plain name (`linear`, `conv2d`, `matmul`), so that torch functions, tensor methods and
ATen operators are read alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from surgery.tracing.layers.axes import (
    Axes,
    Shape,
    contracted_axes,
    conv_axes,
    conv_transpose_axes,
    einsum_axes,
    gate_axes,
    is_depthwise,
    linear_axes,
    right_axes,
)


@dataclass(frozen=True)
class Call:
    """One operation of a graph; its arguments are graph nodes and numbers, and `shape_of` reads a node."""

    op: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    shape_of: Callable[[Any], Shape | None]

    def get(self, position: int, name: str, default: Any = None) -> Any:
        """The argument at `position`, or called `name`."""
        if position < len(self.args):
            return self.args[position]
        return self.kwargs.get(name, default)


@dataclass(frozen=True)
class Reading:
    """How one argument of an operation is used.

    Attributes:
        argument: a graph node.
        kind: a layer kind.
        axes: roles of the argument's axes; `None` for one that is private.
        level: place inside operations that apply several maps in turn, such as a whole LSTM.
        groups: of a convolution.
    """

    argument: Any
    kind: str
    axes: Axes | None = None
    level: int = 0
    groups: int = 1


Reader = Callable[[Call], Iterator[Reading]]


def _shaped(call: Call, node: Any, kind: str, axes: Callable[[Shape], Axes | None], **extra: int) -> Reading:
    shape = call.shape_of(node)
    return Reading(node, kind, axes(shape) if shape else None, **extra)


def linear(call: Call) -> Iterator[Reading]:
    """`F.linear(input, weight, bias)`."""
    yield _shaped(call, call.get(1, "weight"), "linear", linear_axes)
    yield Reading(call.get(2, "bias"), "bias")


def product(left: int, names: tuple[str, str]) -> Reader:
    """Matrix products of the arguments at `left` and after it; before them stands what is added."""

    def read(call: Call) -> Iterator[Reading]:
        if left:
            yield Reading(call.get(0, "input"), "bias")
        yield _shaped(call, call.get(left, names[0]), "matmul", linear_axes)
        yield _shaped(call, call.get(left + 1, names[1]), "matmul", right_axes)

    return read


def swapped_product(call: Call) -> Iterator[Reading]:
    """`__rmatmul__`: the first argument stands on the right."""
    yield _shaped(call, call.get(1, "other"), "matmul", linear_axes)
    yield _shaped(call, call.get(0, "input"), "matmul", right_axes)


def bilinear(call: Call) -> Iterator[Reading]:
    """`F.bilinear`: for every output a matrix between the two inputs."""
    yield _shaped(call, call.get(2, "weight"), "bilinear", linear_axes)
    yield Reading(call.get(3, "bias"), "bias")


def einsum(call: Call) -> Iterator[Reading]:
    """`torch.einsum` with its operands one by one or as a list."""
    equation, *operands = call.args
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = list(operands[0])
    for index, operand in enumerate(operands):
        yield _shaped(call, operand, "einsum", lambda shape, k=index: einsum_axes(equation, k, shape))


def tensordot(call: Call) -> Iterator[Reading]:
    """`torch.tensordot`: an argument's axes are in where they are summed over, else out."""
    dims = call.args[2:4] if len(call.args) > 3 else call.get(2, "dims", 2)
    for place, name in enumerate(("a", "b")):
        node = call.get(place, name)
        rank = len(call.shape_of(node) or ())
        if isinstance(dims, int):
            summed = range(rank - dims, rank) if place == 0 else range(dims)
        else:
            summed = [axis % rank for axis in dims[place]]
        yield _shaped(call, node, "matmul", lambda shape, axes=summed: contracted_axes(shape, axes))


def conv(rank: int, transposed: bool) -> Reader:
    """A convolution over `rank` axes."""
    axes = conv_transpose_axes if transposed else conv_axes
    name = f"conv_transpose{rank}d" if transposed else f"conv{rank}d"

    def read(call: Call) -> Iterator[Reading]:
        groups = call.get(6, "groups", 1)
        weight = call.get(1, "weight")
        shape = call.shape_of(weight)
        kind = "depthwise" if shape and is_depthwise(shape, groups, transposed) else name
        yield _shaped(call, weight, kind, lambda s: axes(s, groups), groups=groups)
        yield Reading(call.get(2, "bias"), "bias")

    return read


def recurrent(gates: int, kind: str) -> Reader:
    """A whole recurrent network: for every layer input weights, recurrent weights, then a projection."""

    def read(call: Call) -> Iterator[Reading]:
        # A packed sequence has its batch sizes as second argument.
        packed = not isinstance(call.args[3], bool)
        weights: Sequence[Any] = call.args[3 if packed else 2]
        biases, layers = call.args[4:6] if packed else call.args[3:5]
        directions = 2 if call.args[-1 if packed else -2] else 1
        each = len(weights) // (layers * directions)
        for k, weight in enumerate(weights):
            layer, place = k // each // directions, k % each
            if biases and place in (2, 3):
                yield Reading(weight, "bias")
                continue
            split = gates if place < 2 else 1  # what follows the biases is the projection, without gates
            level = 3 * layer + min(place, 2)
            yield _shaped(call, weight, kind, lambda shape, g=split: gate_axes(shape, g), level=level)

    return read


def cell(gates: int, kind: str) -> Reader:
    """One step of a recurrent network."""

    def read(call: Call) -> Iterator[Reading]:
        for level, (place, name) in enumerate(((2, "w_ih"), (3, "w_hh"))):
            weight = call.get(place, name)
            yield _shaped(call, weight, kind, lambda shape: gate_axes(shape, gates), level=level)
        yield Reading(call.get(4, "b_ih"), "bias")
        yield Reading(call.get(5, "b_hh"), "bias")

    return read


def attention(call: Call) -> Iterator[Reading]:
    """`F.multi_head_attention_forward`: projections of the inputs first, then the output projection."""
    joint = call.get(5, "in_proj_weight")
    yield _shaped(call, joint, "attention", lambda shape: gate_axes(shape, 3, "three"))
    for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
        yield _shaped(call, call.kwargs.get(name), "attention", linear_axes)
    yield _shaped(call, call.get(11, "out_proj_weight"), "attention", linear_axes, level=1)
    for place, name in ((6, "in_proj_bias"), (7, "bias_k"), (8, "bias_v"), (12, "out_proj_bias")):
        yield Reading(call.get(place, name), "bias")


def every(kind: str, start: int = 1) -> Reader:
    """Every tensor argument from position `start` on is private, of `kind`."""

    def read(call: Call) -> Iterator[Reading]:
        for argument in (*call.args[start:], *call.kwargs.values()):
            if call.shape_of(argument) is not None:
                yield Reading(argument, kind)

    return read
