"""Stacks: runs of modules of one structure that are applied in sequence, such as the layers of a transformer.

Modules have one structure where their tensors have the same names, shapes and dtypes. That they are applied in
sequence is read off the graph: what one of them computes depends on the one before it. Of modules within one another
those count that cover the most parameters, and among these the smallest. The layers of a stack can get their weights
as mixtures of templates (Compositional models, 3.2).
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING

from torch import fx

from surgery.anatomy.flow import Flow, flow_of
from surgery.anatomy.selectors import matches, miss
from surgery.errors import PlanError
from surgery.tracing.types import Trace

if TYPE_CHECKING:
    from surgery.anatomy.sites import LeftAlone, Site

_NEVER = frozenset({"embedding", "buffer", "unused", "scripted"})  # kinds that belong to no layer's weights
_ENDS = frozenset({"first", "last"})  # kinds of a network's ends: of a layer like the others here
_REQUEST = "by request"
_NO_FLOW = Flow()


@dataclass(frozen=True)
class Part:
    """One tensor of every layer of a stack.

    Attributes:
        name: within the layer, for example `attention.query.weight`.
        kind: layer kind or kind of private tensor, for example `linear`, `bias` or `norm`.
        shape: of the tensor.
        dtype: torch name without prefix.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Run:
    """Layers of one member that are applied one after the other.

    Attributes:
        member: its name.
        layers: module paths in execution order.
        parts: the tensors of each layer.
        flow: what the graph shows of values that pass through them.
    """

    member: str
    layers: tuple[str, ...]
    parts: tuple[Part, ...]
    flow: Flow = _NO_FLOW

    @property
    def parameters(self) -> int:
        """The number of parameters of one layer."""
        return sum(math.prod(part.shape) for part in self.parts)

    @property
    def path(self) -> str:
        """What the layers' paths have in common: `encoder.layer.*` for `encoder.layer.0`, `encoder.layer.1`."""
        split = [layer.split(".") for layer in self.layers]
        if len({len(steps) for steps in split}) > 1:
            return self.layers[0]
        same = (steps[0] if len(set(steps)) == 1 else "*" for steps in zip(*split, strict=True))
        return ".".join(same)


@dataclass(frozen=True)
class Stack:
    """Layers of one structure, of one run or of several, that can draw on one set of templates.

    Attributes:
        name: of the stack among those of a plan, for example `stack0`.
        runs: whose layers these are; several where members, or towers of one, have layers of the same names and shapes.
        parts: the tensors of each layer that are mixed.
    """

    name: str
    runs: tuple[Run, ...]
    parts: tuple[Part, ...]

    @property
    def layers(self) -> tuple[tuple[str, str], ...]:
        """Member and module path of every layer."""
        return tuple((run.member, layer) for run in self.runs for layer in run.layers)

    @property
    def parameters(self) -> int:
        """The number of parameters of one layer."""
        return sum(math.prod(part.shape) for part in self.parts)


def pool_runs(runs: Iterable[Run], mix_norms: bool = False) -> tuple[Stack, ...]:
    """Runs whose layers have the same tensors as one stack, in the order of the first of each.

    Args:
        runs: of any members.
        mix_norms: whether scale and shift of norms are mixed too; running statistics never are.
    """
    alike: dict[object, list[Run]] = defaultdict(list)
    for run in runs:
        alike[frozenset((part.name, part.shape, part.dtype) for part in run.parts)].append(run)
    stacks = []
    for group in alike.values():
        parts = tuple(part for part in group[0].parts if mix_norms or part.kind != "norm")
        if parts:
            stacks.append(Stack(f"stack{len(stacks)}", tuple(group), parts))
    return tuple(stacks)


def choose_runs(runs: Sequence[Run], patterns: Sequence[str]) -> list[Run]:
    """The runs that patterns name; all without any.

    Args:
        runs: of any members.
        patterns: exact paths such as `encoder.layer.*`, or `re:` patterns.

    Raises:
        PlanError: naming the patterns that match none.
    """
    if not patterns:
        return list(runs)
    paths = list(dict.fromkeys(run.path for run in runs))
    if lost := [f"'{pattern}' {why}" for pattern in patterns if (why := miss(pattern, paths))]:
        known = ", ".join(paths) or "none"
        raise PlanError(f"`stacks` must name stacks, but {'; '.join(lost)}; there are: {known}.")
    return [run for run in runs if any(matches(pattern, run.path) for pattern in patterns)]


def find_runs(member: str, tensors: Sequence[Site | LeftAlone], found: Trace) -> tuple[Run, ...]:
    """All runs of a member, in execution order; no layer lies in two of them.

    Args:
        member: its name.
        tensors: everything in its state dict.
        found: how it was traced.

    Example:
        >>> from torch import nn, zeros
        >>> body = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3)), nn.Linear(4, 2))
        >>> anatomy = discover(surgery.load_member(body, name="a", inputs=zeros(1, 4)))
        >>> anatomy.runs[0].layers
        ('0.0', '1.0', '2.0')
    """
    known = {each.name: each for each in tensors if _belongs_to_a_layer(each)}
    layers: dict[str, list[str]] = defaultdict(list)
    for name in known:
        steps = name.split(".")
        for depth in range(1, len(steps)):
            layers[".".join(steps[:depth])].append(name)
    alike: dict[object, list[str]] = defaultdict(list)
    for path, names in layers.items():
        inside = (known[name] for name in names)
        alike[tuple(sorted((e.name[len(path) + 1 :], e.shape, e.dtype) for e in inside))].append(path)
    repeated = [paths for paths in alike.values() if len(paths) > 1 and _has_a_map(layers[paths[0]], known)]
    order = {path: min(known[name].order for name in layers[path]) for paths in repeated for path in paths}
    before = _dependencies(found, {path: layers[path] for path in order})
    runs = [
        Run(member, run, _parts(run, layers, known))
        for paths in repeated
        for run in _sequences(sorted(paths, key=order.__getitem__), before)
    ]
    # The most parameters first; among equals the finest layers.
    runs.sort(key=lambda run: (-run.parameters * len(run.layers), -len(run.layers), run.layers[0].count(".")))
    taken: list[str] = []
    kept = []
    for run in runs:
        if not any(_within(layer, other) for layer in run.layers for other in taken):
            kept.append(run)
            taken += run.layers
    buffers = {each.name for each in tensors if each.kind == "buffer"}
    kept = [
        replace(run, flow=flow_of(found, run.layers, {part.name for part in run.parts}, buffers))
        for run in kept
    ]
    return tuple(sorted(kept, key=lambda run: order[run.layers[0]]))


def _belongs_to_a_layer(each: Site | LeftAlone) -> bool:
    """Whether a tensor can be part of a layer: trainable, its own, and not taken out by request."""
    role, reason = getattr(each, "role", "site"), getattr(each, "reason", "")
    if len(each.owners) > 1 or each.kind in _NEVER or not each.shape:
        return False
    return role == "site" or not reason.endswith(_REQUEST)


def _has_a_map(names: Iterable[str], known: Mapping[str, Site | LeftAlone]) -> bool:
    return any(not hasattr(known[name], "role") for name in names)


def _parts(
    run: Sequence[str], layers: Mapping[str, Sequence[str]], known: Mapping[str, Site | LeftAlone]
) -> tuple[Part, ...]:
    parts = []
    for name in layers[run[0]]:
        inside = name[len(run[0]) + 1 :]
        kinds = [known[f"{layer}.{inside}"].kind for layer in run]
        kind = next((kind for kind in kinds if kind not in _ENDS), "linear")
        parts.append(Part(inside, kind, known[name].shape, known[name].dtype))
    return tuple(parts)


def _within(one: str, other: str) -> bool:
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


def _sequences(paths: Sequence[str], before: Mapping[str, set[str]]) -> list[tuple[str, ...]]:
    """Paths in execution order as chains in which each depends on the one before it."""
    chains: list[list[str]] = []
    for path in paths:
        follows = (c for c in reversed(chains) if c[-1] in before[path] and path not in before[c[-1]])
        chain = next(follows, None)
        if chain is None:
            chains.append([path])
        else:
            chain.append(path)
    return [tuple(chain) for chain in chains if len(chain) > 1]


def _dependencies(found: Trace, layers: Mapping[str, Sequence[str]]) -> dict[str, set[str]]:
    """For every layer those that what it is applied to depends on."""
    if found.graph is None:
        return _by_number(layers)
    bit = {path: 1 << number for number, path in enumerate(layers)}
    owners: dict[str, int] = defaultdict(int)
    for path, names in layers.items():
        for name in names:
            owners[name] |= bit[path]
    seen = dict.fromkeys(layers, 0)
    for prefix, graph in (("", found.graph), *((f"{path}.", g) for path, g in found.parts.items())):
        for path, bits in _inputs_of(graph, prefix, owners, bit).items():
            seen[path] |= bits
    return {path: {other for other in layers if seen[path] & bit[other]} for path in layers}


def _inputs_of(
    graph: fx.Graph, prefix: str, owners: Mapping[str, int], bit: Mapping[str, int]
) -> dict[str, int]:
    """For each layer, as bits, the other layers that the live inputs of its operations depend on."""
    reach: dict[fx.Node, int] = {}  # layers that a value depends on
    weight: dict[fx.Node, int] = {}  # layers that a value is a weight of: it depends on parameters alone
    live: set[fx.Node] = set()
    seen: dict[str, int] = defaultdict(int)

    def layers_in(bits: int) -> list[str]:
        return [path for path, one in bit.items() if bits & one] if bits else []

    for node in graph.nodes:
        parameter = node.meta.get("parameter")
        if parameter is not None:
            weight[node] = reach[node] = owners.get(f"{prefix}{parameter}", 0)
            continue
        moving = [each for each in node.all_input_nodes if each in live]
        fixed = [each for each in node.all_input_nodes if each not in live]
        arriving = _any_of(reach[each] for each in moving)
        reach[node] = arriving | _any_of(reach[each] for each in fixed)
        if node.op != "placeholder" and not moving:
            if fixed:
                weight[node] = reach[node]
            continue
        live.add(node)
        used = _any_of(weight.get(each, 0) for each in fixed)
        for path in layers_in(used):
            seen[path] |= arriving & ~bit[path]
    return seen


def _any_of(bits: Iterable[int]) -> int:
    """The bits that any of some numbers has."""
    return reduce(or_, bits, 0)


def _by_number(layers: Mapping[str, Sequence[str]]) -> dict[str, set[str]]:
    """Without a graph: `layer.1` comes after `layer.0`."""
    before = {}
    for path in layers:
        found = re.fullmatch(r"(.*?)(\d+)", path)
        before[path] = {f"{found[1]}{n}" for n in range(int(found[2]))} if found else set()
    return before
