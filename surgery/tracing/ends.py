"""The first and last maps of a network, read off its graph.

A map, embeddings included, with no other map between it and the network's inputs is a first one; a map with
no other map after it is a last one. Maps that only compute weights, as in a factorised matrix, lie on no path
from the inputs. A parameter that is used several times is one map.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import fx

from surgery.tracing.reading import Found
from surgery.tracing.types import Use

_COUNTED = frozenset({"embedding", "depthwise"})


def is_map(use: Use) -> bool:
    """Whether a use counts as a map of the network: linear maps, and private tensors that are linear in disguise."""
    return use.role == "map" or use.kind in _COUNTED


def mark_ends(graph: fx.Graph, found: Sequence[Found]) -> tuple[Use, ...]:
    """The uses of `found` in order, numbered, with `first` and `last` filled in."""
    bits = {name: 1 << k for k, name in enumerate(dict.fromkeys(f.use.parameter for f in found))}
    maps: dict[fx.Node, list[Found]] = {}
    for item in found:
        if is_map(item.use):
            maps.setdefault(item.node, []).append(item)
    own = {node: sum({bits[f.use.parameter] for f in items}) for node, items in maps.items()}
    live = _live(graph)
    before = _reach(graph, {node: bits for node, bits in own.items() if node in live}, forward=True)
    behind = _reach(graph, own, forward=False)
    uses = []
    for order, item in enumerate(found):
        use = replace(item.use, order=order)
        if is_map(use):
            peers = maps[item.node]
            mine = bits[use.parameter]
            earlier = any(f.level < item.level for f in peers)
            later = any(f.level > item.level for f in peers)
            first = item.node in live and not earlier and not before[item.node] & ~mine
            use = replace(use, first=first, last=not later and not behind[item.node] & ~mine)
        uses.append(use)
    return tuple(uses)


def _reach(graph: fx.Graph, own: dict[fx.Node, int], forward: bool) -> dict[fx.Node, int]:
    """For every node the set, as bits, of the parameters whose maps lie before it (or behind it)."""
    reached: dict[fx.Node, int] = {}
    nodes = list(graph.nodes)
    for node in nodes if forward else reversed(nodes):
        bits = 0
        for other in node.all_input_nodes if forward else node.users:
            bits |= reached[other] | own.get(other, 0)
        reached[node] = bits
    return reached


def _live(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that depend on an input; all of them in a graph that takes none."""
    live: set[fx.Node] = set()
    for node in graph.nodes:
        starts = node.op == "placeholder" and "parameter" not in node.meta
        if starts or any(n in live for n in node.all_input_nodes):
            live.add(node)
    return live or set(graph.nodes)
