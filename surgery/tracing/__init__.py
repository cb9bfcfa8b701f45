"""Tracing: one forward pass of any module as a graph, and the uses of its parameters.

Ways of tracing are tried in order until one serves; what it did not reach is completed from the table of
module types. The user's module is never run itself: see `surgery.tracing.copying`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten

from surgery.errors import TraceError
from surgery.members.member import Inputs
from surgery.tracing.bounds import Bounds, OutOfBoundsError, Watch
from surgery.tracing.copying import canonical_names, copy_module, map_inputs, share_parameters, to_meta
from surgery.tracing.ends import mark_ends
from surgery.tracing.exported import export_graph
from surgery.tracing.lazy import LazyRecorder
from surgery.tracing.once import Recording, keep, recorded_once, take
from surgery.tracing.parts import trace_parts
from surgery.tracing.reading import read_uses
from surgery.tracing.recorder import Recorder, record
from surgery.tracing.stubbed import StubbedRecorder
from surgery.tracing.table import table_uses
from surgery.tracing.types import Trace, Use
from surgery.util.quiet import torch_silent

__all__ = [
    "TABLE",
    "TIERS",
    "Bounds",
    "Tier",
    "Trace",
    "Use",
    "recorded_once",
    "run_without_weights",
    "trace",
]

TABLE = "table of module types"


@dataclass(frozen=True)
class Tier:
    """One way of tracing: a name, and a function from a module, its inputs and bounds to a graph and notes."""

    name: str
    run: Callable[[nn.Module, Inputs, Watch], tuple[fx.Graph, tuple[str, ...]]]


InputsFor = Callable[[nn.Module], Inputs | None]
"""Makes inputs for a part of a module, or says that it cannot."""


def trace(
    module: nn.Module,
    inputs: Inputs,
    tiers: Sequence[Tier] | None = None,
    *,
    bounds: Bounds | None = None,
    inputs_for: InputsFor | None = None,
) -> Trace:
    """Trace one forward pass of `module`, by the first tier that serves.

    Args:
        module: any module; it is left exactly as it was.
        inputs: example inputs; without any, only the table of module types serves.
        tiers: ways of tracing to try in order; all of `TIERS` by default, the table of module types last.
        bounds: of each way; one that hits them is passed over, and the notes say so.
        inputs_for: makes inputs for parts of the module that the forward pass does not reach, such as a tower
            for pictures of a model that was given text; these parts are then traced by themselves.

    Returns:
        The graph, where a tier gave one, and the uses of all parameters that were found.

    Raises:
        TraceError: where no tier served and no module is of a known type.

    Example:
        >>> import torch
        >>> found = trace(torch.nn.Linear(4, 2), Inputs(args=(torch.zeros(1, 4),)))
        >>> [use.kind for use in found.uses]
        ['linear', 'bias']
    """
    names = canonical_names(module)
    parameters = {names[id(p)]: p for p in module.parameters() if id(p) in names}
    shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    bounds = bounds or Bounds()
    first, failures = _first_that_serves(module, inputs, tiers, bounds, shapes)
    from_table = table_uses(module, names)
    if first is None:
        notes = [f"{name} failed: {reason}" for name, reason in failures]
        if parameters and not from_table:
            tried = "; ".join(notes) or "there were no example inputs"
            raise TraceError(
                f"required: a module that runs with the inputs '{inputs.source}', or has a known type; "
                f"found: {type(module).__name__}, {tried}; give example inputs with which the module runs"
            )
        notes.append("no execution order: uses are in order of registration")
        return Trace(None, from_table, TABLE, inputs.source, tuple(notes))
    uses, parts = first.uses, dict[str, fx.Graph]()
    notes = [f"{name} was passed over: {reason}" for name, reason in failures] + list(first.notes)
    if inputs_for is not None:
        more = trace_parts(
            module, names, {use.parameter for use in uses}, inputs_for, _trace_part(tiers, bounds)
        )
        uses += tuple(replace(use, order=len(uses) + k) for k, use in enumerate(more.uses))
        parts, notes = dict(more.graphs), [*notes, *more.notes]
    uses = _complete(uses, from_table)
    missed = sum(not use.reached for use in uses)
    if missed:
        notes.append(f"{missed} parameters were not reached and are known by their module's type alone")
    return Trace(first.graph, uses, first.tier, inputs.source, tuple(notes), parts)


@dataclass(frozen=True)
class _Traced:
    """What a tier made of a module: its graph, the uses in it, and what it has to say."""

    tier: str
    graph: fx.Graph
    uses: tuple[Use, ...]
    notes: tuple[str, ...]


def _first_that_serves(
    module: nn.Module,
    inputs: Inputs,
    tiers: Sequence[Tier] | None,
    bounds: Bounds,
    shapes: Mapping[str, tuple[int, ...]],
) -> tuple[_Traced | None, list[tuple[str, str]]]:
    """What the first tier that serves made, None where none does; and the tiers before it, with why they failed."""
    failures: list[tuple[str, str]] = []
    kept = take(module, inputs) if tiers is None else None
    for way in (TIERS if tiers is None else tiers) if inputs.args or inputs.kwargs else ():
        try:
            with torch_silent():
                graph, said = _made_before(kept, way) or way.run(module, inputs, Watch(bounds))
            uses = mark_ends(graph, read_uses(graph, shapes))
            return _Traced(way.name, graph, uses, tuple(said)), failures
        except NotMine:
            continue
        except Exception as error:
            failures.append((way.name, _sentence(error)))
    return None, failures


def _made_before(kept: Recording | None, way: Tier) -> tuple[fx.Graph, tuple[str, ...]] | None:
    """What a tier would make, where a recording with stubs is known."""
    if kept is None or not (way.run is _record_stubbed or (way.run is _record_meta and not kept.helped)):
        return None
    return kept.graph, kept.notes


def _trace_part(tiers: Sequence[Tier] | None, bounds: Bounds) -> Callable[[nn.Module, Inputs], Trace]:
    return lambda part, inputs: trace(part, inputs, tiers, bounds=bounds)


def _complete(uses: tuple[Use, ...], from_table: tuple[Use, ...]) -> tuple[Use, ...]:
    """`uses`, with finer views where a module's type knows gates, and after them what was not reached."""
    known = {use.parameter: use for use in from_table if use.view is not None}
    finer = tuple(
        replace(use, view=known[use.parameter].view, kind=known[use.parameter].kind)
        if use.view is not None and use.parameter in known and _splits(known[use.parameter], use)
        else use
        for use in uses
    )
    reached = {use.parameter for use in uses}
    rest = [use for use in from_table if use.parameter not in reached]
    return finer + tuple(replace(use, order=len(uses) + k) for k, use in enumerate(rest))


def _splits(table: Use, use: Use) -> bool:
    """Whether the table knows a stack, such as the gates of an LSTM, where the graph saw one matrix."""
    return table.view is not None and use.view is not None and use.view.shape[0] < table.view.shape[0]


def _sentence(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"


class NotMine(Exception):
    """Raised by a tier for modules that it is not meant for; nothing is noted."""


def _record_meta(module: nn.Module, inputs: Inputs, watch: Watch) -> tuple[fx.Graph, tuple[str, ...]]:
    twin, names = copy_module(module, to_meta)
    recorder = Recorder(names, list(twin.parameters()), watch)
    return record(twin, recorder, *map_inputs(inputs, lambda tensor: tensor.to("meta"))), ()


def _record_stubbed(module: nn.Module, inputs: Inputs, watch: Watch) -> tuple[fx.Graph, tuple[str, ...]]:
    found = _with_stubs(module, inputs, watch)
    return found.graph, found.notes


def _with_stubs(module: nn.Module, inputs: Inputs, watch: Watch) -> Recording:
    """Unknown truth values are taken for False; where the forward pass then fails, for True."""
    failure: Exception | None = None
    for verdict in (False, True):
        shadows: dict[Tensor, Tensor] = {}

        def to_shadowed(tensor: Tensor, shadows: dict[Tensor, Tensor] = shadows) -> Tensor:
            twin = to_meta(tensor)
            if not isinstance(tensor, nn.Parameter) and not tensor.is_meta:
                shadows[twin] = tensor.detach().clone()
            return twin

        twin, names = copy_module(module, to_shadowed)
        arguments = map_inputs(inputs, to_shadowed)
        recorder = StubbedRecorder(names, list(twin.parameters()), shadows, verdict, watch)
        try:
            graph = record(twin, recorder, *arguments)
        except OutOfBoundsError:
            raise
        except Exception as error:
            failure = failure or error
            continue
        said = [f"{what} in {where or 'the model itself'}" for what, where in recorder.assumed.items()]
        notes = (f"branch assumed: {', '.join(said)}",) if said else ()
        return Recording(graph, notes, recorder.helped or not _contiguous(inputs))  # twins are contiguous
    assert failure is not None
    raise failure


def _contiguous(inputs: Inputs) -> bool:
    leaves = tree_flatten((inputs.args, dict(inputs.kwargs)))[0]
    return all(leaf.is_contiguous() for leaf in leaves if isinstance(leaf, Tensor))


def run_without_weights(module: nn.Module, inputs: Inputs) -> None:
    """Run a copy of a module on the meta device, where what does not depend on weights has its values.

    Within `recorded_once` the recording is kept for `trace`.

    Raises:
        Exception: whatever the module raises.
    """
    with torch_silent():
        keep(module, inputs, _with_stubs(module, inputs, Watch(Bounds())))


def _record_real(module: nn.Module, inputs: Inputs, watch: Watch) -> tuple[fx.Graph, tuple[str, ...]]:
    if any(p.is_meta for p in module.parameters()):
        raise NotMine
    twin, names = copy_module(module, share_parameters)
    recorder = Recorder(names, list(twin.parameters()), watch)
    return record(twin, recorder, *map_inputs(inputs, Tensor.clone)), ()


def _record_lazy(module: nn.Module, inputs: Inputs, watch: Watch) -> tuple[fx.Graph, tuple[str, ...]]:
    if not any(p.is_meta for p in module.parameters()):
        raise NotMine
    twin, names = copy_module(module, share_parameters)
    recorder = LazyRecorder(names, list(twin.parameters()), watch)
    return record(twin, recorder, *map_inputs(inputs, Tensor.clone)), ("weights were made up",)


def _export(module: nn.Module, inputs: Inputs, watch: Watch) -> tuple[fx.Graph, tuple[str, ...]]:
    twin, names = copy_module(module, share_parameters)
    for part in twin.modules():  # a cache of keys and values is nothing that an exported graph can return
        config = getattr(part, "config", None)
        if config is not None and getattr(config, "use_cache", False) is True:
            config.use_cache = False
    return export_graph(twin, names, *map_inputs(inputs, Tensor.clone), watch), ()


TIERS: tuple[Tier, ...] = (
    Tier("recorder on the meta device", _record_meta),
    Tier("recorder on the meta device, with stubs", _record_stubbed),
    Tier("recorder with the weights", _record_real),
    Tier("recorder with weights made when used", _record_lazy),
    Tier("torch.export", _export),
)
