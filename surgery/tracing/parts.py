"""Parts: submodules that no forward pass reached, traced by themselves.

A multimodal model that is given text alone does not run its tower for pictures. Such a tower is a model of its
own; with inputs of its own it is traced like one, and its uses are added to those of the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass, replace

from torch import fx, nn

from surgery.members.member import Inputs
from surgery.tracing.types import Trace, Use
from surgery.util.text import one_line


@dataclass(frozen=True)
class Parts:
    """What tracing parts by themselves gave: uses, graphs by path, and notes."""

    uses: tuple[Use, ...]
    graphs: Mapping[str, fx.Graph]
    notes: tuple[str, ...]


def trace_parts(
    module: nn.Module,
    names: Mapping[int, str],
    reached: Set[str],
    inputs_for: Callable[[nn.Module], Inputs | None],
    trace: Callable[[nn.Module, Inputs], Trace],
) -> Parts:
    """Trace the largest submodules of which nothing was reached and for which there are inputs.

    Args:
        module: the whole.
        names: state-dict name by `id` of its tensors.
        reached: parameters that need nothing more.
        inputs_for: makes inputs for a submodule, or returns None.
        trace: traces one submodule.
    """
    uses: list[Use] = []
    graphs: dict[str, fx.Graph] = {}
    notes: list[str] = []
    done: list[str] = []
    for path, part in _unreached(module, names, reached):
        if any(path.startswith(f"{other}.") for other in done):
            continue
        inputs = inputs_for(part)
        if inputs is None:
            continue
        try:
            found = trace(part, inputs)
        except Exception as error:  # the table of module types still knows its parameters
            notes.append(f"{path} by itself failed: {one_line(error, 200)}")
            continue
        if found.graph is None:
            continue
        whole = {
            name: names[id(p)] for name, p in part.named_parameters(remove_duplicate=False) if id(p) in names
        }
        known = {use.parameter for use in uses}
        for use in found.uses:
            name = whole.get(use.parameter)
            if use.reached and name is not None and name not in reached and name not in known:
                where = f"{path}.{use.module}".rstrip(".")
                uses.append(replace(use, parameter=name, module=where, last=False))
        graphs[path] = found.graph
        notes.append(f"{path} was traced by itself ({found.tier}, inputs: {found.inputs})")
        done.append(path)
    return Parts(tuple(uses), graphs, tuple(notes))


def _unreached(
    module: nn.Module, names: Mapping[int, str], reached: Set[str]
) -> Iterator[tuple[str, nn.Module]]:
    """Submodules with parameters of which none was reached, parents before their children."""
    for path, part in module.named_modules():
        own = {names[id(p)] for p in part.parameters() if id(p) in names}
        if path and own and not own & reached:
            yield path, part
