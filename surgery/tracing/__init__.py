"""Tracing: one forward pass of any module as a graph, and the uses of its parameters.

Ways of tracing are tried in order until one serves; what it did not reach is completed from the table of
module types. The user's module is never run itself: see `surgery.tracing.copying`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, fx, nn

from surgery.errors import TraceError
from surgery.member import Inputs
from surgery.tracing.copying import canonical_names, copy_module, map_inputs, share_parameters, to_meta
from surgery.tracing.ends import mark_ends
from surgery.tracing.exported import export_graph
from surgery.tracing.reading import read_uses
from surgery.tracing.recorder import record
from surgery.tracing.table import table_uses
from surgery.tracing.types import Trace, Use

__all__ = ["TABLE", "TIERS", "Tier", "Trace", "Use", "trace"]

TABLE = "table of module types"


@dataclass(frozen=True)
class Tier:
    """One way of tracing: a name, and a function from a module and its inputs to a graph."""

    name: str
    run: Callable[[nn.Module, Inputs], fx.Graph]


def trace(module: nn.Module, inputs: Inputs, tiers: Sequence[Tier] | None = None) -> Trace:
    """Trace one forward pass of `module`, by the first tier that serves.

    Args:
        module: any module; it is left exactly as it was.
        inputs: example inputs; without any, only the table of module types serves.
        tiers: ways of tracing to try in order; all of `TIERS` by default, the table of module types last.

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
    notes: list[str] = []
    graph, tier, uses = None, TABLE, ()
    for way in (TIERS if tiers is None else tiers) if inputs.args or inputs.kwargs else ():
        try:
            found = way.run(module, inputs)
            uses = mark_ends(found, read_uses(found, shapes))
            graph, tier = found, way.name
            break
        except Exception as error:
            notes.append(f"{way.name} failed: {_sentence(error)}")
    from_table = table_uses(module, names)
    if graph is None:
        if parameters and not from_table:
            tried = "; ".join(notes) or "there were no example inputs"
            raise TraceError(
                f"required: a module that runs with the inputs '{inputs.source}', or has a known type; "
                f"found: {type(module).__name__}, {tried}; give example inputs with which the module runs"
            )
        notes.append("no execution order: uses are in order of registration")
        return Trace(None, from_table, TABLE, inputs.source, tuple(notes))
    uses = _complete(uses, from_table)
    missed = sum(not use.reached for use in uses)
    if missed:
        notes.append(f"{missed} parameters were not reached and are known by their module's type alone")
    return Trace(graph, uses, tier, inputs.source, tuple(notes))


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


def _record_meta(module: nn.Module, inputs: Inputs) -> fx.Graph:
    twin, names = copy_module(module, to_meta)
    return record(twin, names, *map_inputs(inputs, lambda tensor: tensor.to("meta")))


def _record_real(module: nn.Module, inputs: Inputs) -> fx.Graph:
    twin, names = copy_module(module, share_parameters)
    return record(twin, names, *map_inputs(inputs, Tensor.clone))


def _export(module: nn.Module, inputs: Inputs) -> fx.Graph:
    twin, names = copy_module(module, share_parameters)
    for part in twin.modules():  # a cache of keys and values is nothing that an exported graph can return
        config = getattr(part, "config", None)
        if config is not None and getattr(config, "use_cache", False) is True:
            config.use_cache = False
    return export_graph(twin, names, *map_inputs(inputs, Tensor.clone))


TIERS: tuple[Tier, ...] = (
    Tier("recorder on the meta device", _record_meta),
    Tier("recorder with the weights", _record_real),
    Tier("torch.export", _export),
)
