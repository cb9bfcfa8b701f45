"""Flow: what the graph shows of values that pass through the layers of a stack.

*Readers* of a layer are those that use what it gives beside the layer after it. *Branches* of a layer are what it adds
to its stream: an addition one of whose terms is computed from the other, where all that passes through the layer passes
that other term and the sum.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import fx

from surgery.tracing.types import Trace

_ADDS = frozenset({"add", "add_", "iadd", "__add__", "__iadd__", "__radd__", "add.Tensor", "add_.Tensor"})
_SCALES = frozenset({"mul", "mul_", "__mul__", "__imul__", "__rmul__", "mul.Tensor", "mul_.Tensor"})
_MAPS = frozenset({"linear", "conv1d", "conv2d", "conv3d", "addmm", "layer_norm", "batch_norm", "group_norm"})
_KEEP_ZEROS = frozenset({
    "dropout", "view", "reshape", "transpose", "permute", "contiguous", "flatten", "unflatten", "squeeze", "unsqueeze",
    "to", "type_as", "float", "_to_copy", "clone",
})  # fmt: skip


@dataclass(frozen=True)
class Branch:
    """What a layer adds to its stream at one place.

    Attributes:
        module: path of the module that gives it, within the layer.
        zeros: parameters, within the layer, without which it adds zeros.
    """

    module: str
    zeros: tuple[str, ...]


@dataclass(frozen=True)
class Flow:
    """What the graph shows of a run of layers.

    Attributes:
        read: layers with readers, and the module of one.
        branches: of every layer, in execution order; none where they cannot be found, or are not those of the others.
        passes_on: whether a layer without its branches gives what it gets.
        width: of the last axis of what every layer gives, as that of a transformer's hidden states; None where it
            cannot be told.
    """

    read: tuple[tuple[str, str], ...] = ()
    branches: tuple[Branch, ...] = ()
    passes_on: bool = False
    width: int | None = None


def flow_of(
    found: Trace, layers: Sequence[str], parameters: Collection[str], buffers: Collection[str]
) -> Flow:
    """What flows through a run of layers.

    Args:
        found: how the member was traced.
        layers: module paths in execution order.
        parameters: names, within a layer, of those that are its own.
        buffers: names of the member's.
    """
    graphs = [] if found.graph is None else [("", found.graph)]
    for prefix, graph in (*graphs, *((f"{path}.", part) for path, part in found.parts.items())):
        seen = _Graph(graph, prefix, layers, frozenset(parameters), frozenset(buffers))
        if all(seen.inside[layer] for layer in layers):
            return Flow(seen.readers(), *seen.branches(), seen.width())
    return Flow()


class _Graph:
    """One graph, and which of its nodes lie in which layers."""

    def __init__(
        self,
        graph: fx.Graph,
        prefix: str,
        layers: Sequence[str],
        parameters: frozenset[str],
        buffers: frozenset[str],
    ):
        self.prefix, self.layers, self.own, self.buffers = prefix, layers, parameters, buffers
        self.place: dict[fx.Node, str] = {}
        self.layer: dict[fx.Node, str] = {}
        self.inside: dict[str, set[fx.Node]] = defaultdict(set)  # live nodes alone
        self.live: set[fx.Node] = set()
        self.ends: set[fx.Node] = set()
        known, depths = set(layers), {layer.count(".") + 1 for layer in layers}
        for node in graph.nodes:
            path = self.place[node] = f"{prefix}{node.meta.get('module') or ''}"
            if node.op == "placeholder" or any(each in self.live for each in node.all_input_nodes):
                self.live.add(node)
                steps = path.split(".")
                for above in (".".join(steps[:depth]) for depth in depths):
                    if above in known:
                        self.layer[node] = above
                        self.inside[above].add(node)
        for node in reversed(graph.nodes):  # what outputs depend on
            if node.op == "output" or node in self.ends:
                self.ends |= {node, *node.all_input_nodes}
        self.order = {node: number for number, node in enumerate(graph.nodes)}

    def width(self) -> int | None:
        """Of the last axis of what all layers give, where each gives one value of at most three axes."""
        given = [
            {
                _shape(node)
                for node in self.inside[layer]
                if any(u in self.ends - self.inside[layer] for u in node.users)
            }
            for layer in self.layers
        ]
        shapes = {shape for some in given for shape in some}
        if any(len(some) != 1 for some in given) or any(not s or len(s) > 3 for s in shapes):
            return None
        widths = {int(shape[-1]) for shape in shapes}
        return widths.pop() if len(widths) == 1 else None

    # -- readers -------------------------------------------------------------------------------------------

    def readers(self) -> tuple[tuple[str, str], ...]:
        """Layers from which a way leads to the outputs that does not pass the next one, and who is first on it."""
        found = {}
        for layer, after in pairwise(self.layers):
            reader = self._way_around(self.inside[layer], after)
            if reader is not None:
                found[layer] = self.place[reader] or "the model's outputs"
        return tuple(found.items())

    def _way_around(self, own: set[fx.Node], after: str) -> fx.Node | None:
        waiting = [(user, user) for node in own for user in node.users if user not in own]
        seen: set[fx.Node] = set()
        while waiting:
            node, first = waiting.pop()
            if node in seen or node not in self.ends or self.layer.get(node) == after:
                continue
            if node.op == "output":
                return first
            seen.add(node)
            waiting += [(user, first) for user in node.users]
        return None

    # -- branches ------------------------------------------------------------------------------------------

    def branches(self) -> tuple[tuple[Branch, ...], bool]:
        """Those that all layers have, and whether nothing is left of a layer without them."""
        found = {self._branches_of(layer) for layer in self.layers}
        return found.pop() if len(found) == 1 else ((), False)

    def _branches_of(self, layer: str) -> tuple[tuple[Branch, ...], bool]:
        inside = self.inside[layer]
        given = {each for node in inside for each in node.all_input_nodes if each in self.live - inside}
        ends = [node for node in inside if any(user in self.ends - inside for user in node.users)]
        if len(ends) != 1:
            return (), False
        (end,) = ends
        shape = _shape(end)
        begins = [each for each in given if _shape(each) == shape and self._leads(each, end, inside, None)]
        if len(begins) != 1:
            return (), False
        (begin,) = begins
        found: list[Branch] = []
        stream = begin  # the last value on the way that is nothing but sums so far
        passes_on = True
        for node in sorted(inside, key=self.order.__getitem__):
            terms = self._terms(node, begin, end, inside)
            if terms is None:
                continue
            kept, added = terms
            made = [self._branch(layer, term, node) for term in added]
            if any(each is None for each in made):
                return (), False
            found += [each for each in made if each is not None]
            passes_on = passes_on and kept is stream
            stream = node
        return tuple(found), passes_on and stream is end and bool(found)

    def _terms(
        self, node: fx.Node, begin: fx.Node, end: fx.Node, inside: set[fx.Node]
    ) -> tuple[fx.Node, list[fx.Node]] | None:
        """Of an addition to the stream the stream, and what is added to it."""
        values = [each for each in node.args if isinstance(each, fx.Node)]
        if (
            _named(node) not in _ADDS
            or len(values) != 2
            or len({_shape(each) for each in (node, *values)}) > 1
        ):
            return None
        if node is not end and self._leads(begin, end, inside, node):
            return None
        for kept, added in (values, values[::-1]):
            if kept is begin or (kept in inside and not self._leads(begin, end, inside, kept)):
                terms = [added]
                while _named(terms[0]) in _ADDS and terms[0] in inside:  # branches beside one another
                    inner = [each for each in terms[0].args if isinstance(each, fx.Node)]
                    if len(inner) != 2 or any(each not in inside for each in inner):
                        break
                    terms[:1] = inner
                return kept, terms
        return None

    def _leads(self, begin: fx.Node, end: fx.Node, inside: set[fx.Node], without: fx.Node | None) -> bool:
        """Whether a way leads from one value to another within a layer, without passing some node."""
        waiting, seen = [begin], {without}
        while waiting:
            node = waiting.pop()
            if node is end:
                return True
            for user in node.users:
                if user in inside and user not in seen:
                    seen.add(user)
                    waiting.append(user)
        return False

    def _branch(self, layer: str, value: fx.Node, node: fx.Node) -> Branch | None:
        """The module that gives what is added, and the parameters of the last map in it."""
        inside = self.inside[layer]
        chain: list[fx.Node] = []
        parameters: tuple[
            str, ...
        ] = ()  # the last ones; modules before a scale of the branch give zeros as well
        while value in inside:
            chain.append(value)
            own = self._parameters(value, layer)
            parameters = parameters or own
            inputs = [each for each in value.all_input_nodes if each in self.live]
            keeps = _named(value) in _KEEP_ZEROS or (own and _named(value) in _SCALES)
            if not keeps or len(inputs) != 1:
                break
            value = inputs[0]
        if not parameters:
            return None
        module = self._module(layer, chain, node)
        if module is None:
            return None
        return Branch(module, parameters)

    def _parameters(self, node: fx.Node, layer: str) -> tuple[str, ...]:
        """The layer's own parameters whose zeros make a node give zeros; none where there are no such."""
        tensors = [each for each in node.all_input_nodes if each.meta.get("parameter") is not None]
        names = {f"{self.prefix}{each.meta['parameter']}" for each in tensors} - self.buffers
        inside = tuple(sorted(name.removeprefix(f"{layer}.") for name in names))
        live = [each for each in node.all_input_nodes if each in self.live]
        if len(live) != 1 or len(tensors) + 1 != len(node.all_input_nodes) or not self.own.issuperset(inside):
            return ()
        return inside if _named(node) in _MAPS | _SCALES else ()

    def _module(self, layer: str, chain: Iterable[fx.Node], node: fx.Node) -> str | None:
        """The largest module within a layer that gives one value alone, which is on the chain, and has no sum of it."""
        best: tuple[int, str] | None = None
        for value in chain:
            steps = self.place[value].split(".")
            for depth in range(layer.count(".") + 2, len(steps) + 1):
                path = ".".join(steps[:depth])
                own = {each for each in self.inside[layer] if _within(self.place[each], path)}
                leaving = {each for each in own if any(user not in own for user in each.users)}
                if node not in own and leaving == {value} and (best is None or len(own) > best[0]):
                    best = (len(own), path[len(layer) + 1 :])
        return None if best is None else best[1]


def _within(path: str, above: str) -> bool:
    return path == above or path.startswith(f"{above}.")


def _named(node: fx.Node) -> str:
    """Plain name of an operation."""
    target: Any = node.target
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))


def _shape(node: fx.Node) -> Any:
    return getattr(node.meta.get("tensor"), "shape", None)
