"""Tiers: ways of turning one forward pass of a module into a graph, in the order in which they are tried.

The user's module is never run itself: see `surgery.tracing.copying`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten

from surgery.members.member import Inputs
from surgery.tracing.bounds import Bounds, OutOfBoundsError, Watch
from surgery.tracing.copying import copy_module, map_inputs, share_parameters, to_meta
from surgery.tracing.exported import export_graph
from surgery.tracing.lazy import LazyRecorder
from surgery.tracing.once import Recording, keep
from surgery.tracing.recorder import Recorder, record
from surgery.tracing.stubbed import StubbedRecorder
from surgery.util.quiet import torch_silent


@dataclass(frozen=True)
class Tier:
    """One way of tracing: a name, and a function from a module, its inputs and bounds to a graph and notes."""

    name: str
    run: Callable[[nn.Module, Inputs, Watch], tuple[fx.Graph, tuple[str, ...]]]


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
"""A new way of tracing is a file and a line here."""


def made_before(kept: Recording | None, way: Tier) -> tuple[fx.Graph, tuple[str, ...]] | None:
    """What a tier would make, where a recording with stubs is known."""
    if kept is None or not (way.run is _record_stubbed or (way.run is _record_meta and not kept.helped)):
        return None
    return kept.graph, kept.notes
