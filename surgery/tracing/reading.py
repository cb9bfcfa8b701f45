"""Reading a graph: every use of every parameter, and which maps come first and last.

The graph is walked once. A value is *live* when it depends on the network's inputs; until a parameter meets a
live value, what is computed from it is still the parameter, with a layout that says where its axes went.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx

from surgery.tracing.layers import KINDS, kind_met_by, read_call
from surgery.tracing.layers.axes import Shape
from surgery.tracing.layers.operations import Call, Reading
from surgery.tracing.layout import Layout, Strided, canonical_view, contiguous, through_view
from surgery.tracing.types import Use


@dataclass(frozen=True)
class Lost:
    """A parameter whose axes cannot be followed any further, and the reason."""

    shape: Shape
    reason: str
    kind: str = ""  # of the private tensor that the parameter is seen to be, where it is seen


Origins = dict[str, Layout | Lost]  # by parameter


@dataclass(frozen=True)
class Value:
    """What a node holds: whether it is live, the parameters that it still is, the node it is a part of, and
    which operations led here from each parameter."""

    live: bool
    origins: Origins = field(default_factory=dict)
    part_of: fx.Node | None = None
    through: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # operations since the parameter


@dataclass(frozen=True)
class Found:
    """A use with the node where it happens, and its place among the maps of one operation."""

    use: Use
    node: fx.Node
    level: int = 0


def read_uses(graph: fx.Graph, shapes: Mapping[str, Shape]) -> tuple[Found, ...]:
    """All uses of parameters in the order of the graph.

    Args:
        graph: whose nodes carry `meta["tensor"]`, `meta["module"]` and, where they are parameters,
            `meta["parameter"]`.
        shapes: of the parameters to look for, by state-dict name.

    Returns:
        The uses, each with its node; their `first` and `last` are not yet filled in.
    """
    values: dict[fx.Node, Value] = {}
    found: list[Found] = []
    for node in graph.nodes:
        if node.op == "get_attr":
            name = str(node.meta.get("parameter", ""))
            values[node] = Value(False, {name: Layout.whole(shapes[name])} if name in shapes else {})
        elif node.op == "placeholder":
            values[node] = Value(True)
        elif node.op == "output":
            found += _loose(node, values, node.all_input_nodes, "output")
        else:
            values[node] = _walk(node, values, found)
    return tuple(found)


def operation_name(node: fx.Node) -> str:
    """The plain name of an operation: one for functions, methods, attributes and ATen operators."""
    target: Any = node.target
    if target is getattr:
        return str(node.args[1])
    packet = getattr(target, "overloadpacket", None)
    return str(getattr(packet or target, "__name__", target))


def _walk(node: fx.Node, values: dict[fx.Node, Value], found: list[Found]) -> Value:
    """The value of one operation; uses that happen in it are added to `found`."""
    op = operation_name(node)
    inputs = node.all_input_nodes
    live = any(values[n].live for n in inputs)
    if not live and not any(values[n].origins for n in inputs):
        return Value(False)
    readings = read_call(Call(op, tuple(node.args), node.kwargs, _shape_of))
    if readings is not None and (live or any(r.kind != "norm" for r in readings)):
        read = {reading.argument for reading in readings if values[reading.argument].origins}
        for reading in readings:
            found += _uses(node, op, reading, values)
        found += _loose(node, values, [n for n in inputs if n not in read], op)
        return Value(live)
    if op in _FOLLOWS and inputs:
        return _passed(_follow(node, op, values), node, op, values)
    if node.target is operator.getitem and values[inputs[0]].part_of is not None:
        return _passed(_follow(node, op, values), node, "", values)
    if live:
        found += _loose(node, values, inputs, op)
        return Value(True)
    return _passed(Value(False, _carry(node, op, values)), node, op, values)


def _passed(value: Value, node: fx.Node, op: str, values: dict[fx.Node, Value]) -> Value:
    """A value with the way that each of its parameters came."""
    ways: dict[str, tuple[str, ...]] = {}
    step = () if op in _SILENT else (op,)
    for source in node.all_input_nodes:
        for name, way in values[source].through.items():
            ways.setdefault(name, way)
    through = {name: (ways.get(name, ()) + step)[:LONGEST] for name in value.origins}
    return replace(value, through=through)


def _uses(node: fx.Node, op: str, reading: Reading, values: dict[fx.Node, Value]) -> Iterator[Found]:
    """The uses that a layer kind reads in one argument."""
    kind = KINDS[reading.kind]
    for name, layout in values[reading.argument].origins.items():
        view, reason = None, kind.reason or "its axes are ambiguous"
        if isinstance(layout, Lost) and layout.kind and not kind.private:
            kind, reason = KINDS[layout.kind], layout.reason
        elif isinstance(layout, Lost):
            reason = layout.reason
        elif reading.axes is not None:
            view = canonical_view(layout, reading.axes, _shape_of(reading.argument) or ())
            view, reason = (None, view) if isinstance(view, str) else (view, kind.reason)
        through = values[reading.argument].through.get(name, ())
        use = Use(name, op, "map", reading.kind, _module(node), 0, view, groups=reading.groups, reason=reason)
        use = replace(use, through=through)
        if kind.private:
            reason = layout.reason if isinstance(layout, Lost) and layout.kind == kind.name else kind.reason
            use = replace(use, role="private", kind=kind.name, reason=reason)
        elif view is None and sum(size > 1 for size in layout.shape) < 2:
            scale = KINDS["norm"].reason if isinstance(layout, Lost) else reason
            use = replace(use, role="private", kind="norm", reason=scale)
        elif view is None:
            use = replace(use, role="unclear")
        yield Found(use, node, reading.level)


def _loose(node: fx.Node, values: dict[fx.Node, Value], inputs: list[fx.Node], op: str) -> Iterator[Found]:
    """Parameters that meet live values, or the output, in an operation that is no map of them."""
    kind = kind_met_by(op) or "input"
    reason = KINDS[kind].reason if kind_met_by(op) else f"is read by `{op}` as data"
    for source in inputs:
        if not values[source].live:
            for name in values[source].origins:
                use = Use(name, op, "private", kind, _module(node), 0, reason=reason)
                yield Found(replace(use, through=values[source].through.get(name, ())), node)


def _follow(node: fx.Node, op: str, values: dict[fx.Node, Value]) -> Value:
    """A view, cast or copy of the first argument, whatever the others say."""
    source = values[node.all_input_nodes[0]].part_of or node.all_input_nodes[0]
    value = values[source]
    if node.meta.get("tensor") is None:  # several tensors: `getitem` nodes follow
        return Value(value.live, value.origins, part_of=source)
    if value.live:
        return Value(True)
    origins: Origins = {}
    base, view = source.meta.get("tensor"), node.meta["tensor"]
    for name, layout in value.origins.items():
        moved = None
        if isinstance(layout, Layout) and base is not None:
            if _shares_memory(node, op, source):
                moved = through_view(layout, base, view)
            elif base.shape == view.shape:
                moved = layout
            else:
                moved = through_view(layout, contiguous(base.shape), contiguous(view.shape))
        origins[name] = moved or (
            layout if isinstance(layout, Lost) else Lost(layout.shape, f"`{op}` mixes its axes")
        )
    return Value(False, origins)


def _carry(node: fx.Node, op: str, values: dict[fx.Node, Value]) -> Origins:
    """What an operation among parameters and constants leaves of each of them."""
    after = node.meta.get("tensor")
    origins: Origins = {}
    for source in node.all_input_nodes:
        before = source.meta.get("tensor")
        for name, layout in values[source].origins.items():
            carried: Layout | Lost = Lost(layout.shape, f"`{op}` changes its shape")
            if op in _TABLES:
                carried = Lost(layout.shape, f"is a table that `{op}` reads from", "embedding")
            if isinstance(layout, Lost):
                carried = layout
            elif node.meta.get("view_of") is source and after is not None and before is not None:
                carried = through_view(layout, before, after) or carried
            elif after is not None and before is not None:
                carried = _broadcast(layout, before.shape, after.shape, op) or carried
            if not isinstance(origins.get(name), Layout):
                origins[name] = carried
    return origins


def _broadcast(layout: Layout, before: Shape, after: Shape, op: str) -> Layout | None:
    """The layout where the shape is kept, up to broadcasting or, for `cat`, the length of an axis."""
    if before == after:
        return layout
    extra = len(after) - len(before)
    if op in ("cat", "concat", "concatenate") and extra == 0:
        return layout
    if extra < 0 or any(a != b and b != 1 for a, b in zip(after[extra:], before, strict=True)):
        return None
    kept = tuple(
        () if a != b else atoms for a, b, atoms in zip(after[extra:], before, layout.axes, strict=True)
    )
    return replace(layout, axes=((),) * extra + kept)


def _shares_memory(node: fx.Node, op: str, source: fx.Node) -> bool:
    """Whether a view is one in memory; the recorder has seen it, an exported graph has to be asked."""
    if "view_of" in node.meta:
        return True
    if op not in _MAY_COPY:
        return op in _VIEWS or node.target is operator.getitem
    if not node.meta.get("exported"):
        return False
    base: Strided = source.meta["tensor"]
    return base.strides == contiguous(base.shape).strides


def _shape_of(node: Any) -> Shape | None:
    tensor = node.meta.get("tensor") if isinstance(node, fx.Node) else None
    return None if tensor is None else tensor.shape


def _module(node: fx.Node) -> str:
    return str(node.meta.get("module", ""))


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


LONGEST = 16  # operations of a way that are remembered

# Operations that change nothing.
_SILENT = frozenset(("", "data", "detach", "contiguous", "requires_grad_", "__get__", "alias"))
# What picks rows of a table of positions, or stretches it.
_TABLES = _words(
    "__getitem__ index index_select gather take take_along_dim embedding interpolate grid_sample "
    "upsample_bicubic2d upsample_bilinear2d upsample_linear1d upsample_nearest2d _upsample_bicubic2d_aa"
)
_VIEWS = _words(
    "view reshape flatten unflatten ravel view_as reshape_as transpose transpose_ t T mT H mH permute "
    "movedim moveaxis swapaxes swapdims squeeze unsqueeze select narrow slice chunk split "
    "split_with_sizes tensor_split unsafe_chunk unsafe_split unbind expand expand_as broadcast_to "
    "as_strided diagonal unfold detach alias data real contiguous adjoint numpy_T"
)
_MAY_COPY = _words("reshape flatten ravel reshape_as contiguous")
_CASTS = _words(
    "to _to_copy type type_as float half bfloat16 double clone contiguous requires_grad_ cpu cuda "
    "detach_ requires_grad lift_fresh_copy dropout"
)
_FOLLOWS = _VIEWS | _CASTS
