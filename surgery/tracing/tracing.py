"""`trace`: the graph of the first tier that serves, and the uses of all parameters.

What the forward pass did not reach is traced by itself where inputs for it can be made, and otherwise known by the
table of module types.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import fx, nn

from surgery.errors import TraceError
from surgery.members.member import Inputs
from surgery.tracing.bounds import Bounds, Watch
from surgery.tracing.copying import canonical_names
from surgery.tracing.ends import mark_ends
from surgery.tracing.once import take
from surgery.tracing.parts import trace_parts
from surgery.tracing.reading import read_uses
from surgery.tracing.table import table_uses
from surgery.tracing.tiers import TIERS, NotMine, Tier, made_before
from surgery.tracing.types import Trace, Use
from surgery.util.quiet import torch_silent

TABLE = "table of module types"

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
                graph, said = made_before(kept, way) or way.run(module, inputs, Watch(bounds))
            uses = mark_ends(graph, read_uses(graph, shapes))
            return _Traced(way.name, graph, uses, tuple(said)), failures
        except NotMine:
            continue
        except Exception as error:
            failures.append((way.name, _sentence(error)))
    return None, failures


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
