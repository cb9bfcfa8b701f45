"""Recording once: what example inputs were tried with is the recording that sites are found in.

Whether a large module runs with some inputs is seen by recording a copy of it on the meta device, and sites are found
in a recording of the same pass. Within `recorded_once` the first is kept for the second. It serves for the very module
and tensors that it was made with, as long as the module has the parts, shapes and dtypes that it had, and once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import fx, nn
from torch.utils._pytree import tree_flatten

from surgery.members.member import Inputs


@dataclass(frozen=True)
class Recording:
    """One forward pass on the meta device.

    Attributes:
        graph: of the pass.
        notes: what was assumed.
        helped: whether the recorder answered anything that tensors without data cannot; a recorder that answers
            nothing would otherwise have made this very graph.
    """

    graph: fx.Graph
    notes: tuple[str, ...]
    helped: bool


@dataclass(frozen=True)
class _Kept:
    recording: Recording
    structure: list[Any]
    arguments: tuple[list[Any], Any]


_kept: ContextVar[dict[int, _Kept] | None] = ContextVar("recordings", default=None)


@contextmanager
def recorded_once() -> Iterator[None]:
    """Keep recordings of modules that nobody changes from their first pass until their sites are found.

    Example:
        >>> with recorded_once():
        ...     keep(nn.Linear(2, 2), Inputs(), Recording(fx.Graph(), (), False))
    """
    token = _kept.set({})
    try:
        yield
    finally:
        _kept.reset(token)


def keep(module: nn.Module, inputs: Inputs, recording: Recording) -> None:
    """Keep a recording of a module where somebody asked for it; the module's former one is dropped."""
    kept = _kept.get()
    if kept is not None:
        kept[id(module)] = _Kept(recording, _structure(module), _flat(inputs))


def take(module: nn.Module, inputs: Inputs) -> Recording | None:
    """The recording of a module with these inputs, which is then no longer kept; None where there is none."""
    kept = (_kept.get() or {}).pop(id(module), None)
    if kept is None or kept.structure != _structure(module):
        return None
    (leaves, spec), (others, other) = kept.arguments, _flat(inputs)
    same = spec == other and all(a is b for a, b in zip(leaves, others, strict=True))
    return kept.recording if same else None


def _structure(module: nn.Module) -> list[Any]:
    """A module's parts, held so that no other takes their place, and the shapes and dtypes of its tensors."""
    tensors = (
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    )
    described = [(name, id(tensor), tensor.shape, tensor.dtype) for name, tensor in tensors]
    return [list(module.named_modules(remove_duplicate=False)), described]


def _flat(inputs: Inputs) -> tuple[list[Any], Any]:
    return tree_flatten((inputs.args, dict(inputs.kwargs)))
