"""Modules without weights: parameters on the meta device, buffers real, ties kept.

`accelerate.init_empty_weights` does the same, but wraps a parameter anew each time it is registered, which
unties `head.weight = embed.weight`; here a parameter that was emptied once stays the same object.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

_META = torch.device("meta")


def build_empty(make: Callable[[], nn.Module]) -> nn.Module:
    """The module that `make` builds, without weights.

    Some architectures compute with a parameter's values or device while they are built; those are built with
    memory first and emptied then.

    Example:
        >>> build_empty(lambda: nn.Linear(3, 5)).weight.device.type
        'meta'
    """
    try:
        with empty_parameters():
            module = make()
    except Exception:  # the second attempt raises what is truly wrong
        return drop_weights(make())
    if any(buffer.device == _META for buffer in module.buffers()):
        module = make()
    return drop_weights(module)


def _empty(parameter: nn.Parameter) -> nn.Parameter:
    """The same parameter without memory, its class and its marks kept."""
    empty = nn.Parameter(parameter.detach().to(_META), requires_grad=parameter.requires_grad)
    empty.__class__ = type(parameter)
    for mark, value in vars(parameter).items():
        setattr(empty, mark, value)
    empty._is_hf_initialized = True  # type: ignore[attr-defined] # spares transformers drawing values for nothing
    return empty


@contextlib.contextmanager
def empty_parameters() -> Iterator[None]:
    """Inside, every parameter that a module registers goes to the meta device; buffers stay real.

    Example:
        >>> with empty_parameters():
        ...     layer = nn.Linear(3, 5)
        >>> layer.weight.device.type
        'meta'
    """
    register = nn.Module.register_parameter
    # The original is held so that its id stays its own.
    emptied: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}

    def register_empty(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(module, name, param)
        if param is None or param.device == _META:
            return
        if id(param) not in emptied:
            emptied[id(param)] = (param, _empty(param))
        module._parameters[name] = emptied[id(param)][1]

    nn.Module.register_parameter = register_empty  # pyright: ignore[reportAttributeAccessIssue]
    try:
        with _without_initialization():
            yield
    finally:
        nn.Module.register_parameter = register


@contextlib.contextmanager
def _without_initialization() -> Iterator[None]:
    """Inside, the functions of `torch.nn.init` leave tensors on the meta device alone: a tenth of a build's time."""

    def skipping(initialize: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        @functools.wraps(initialize)
        def only_real(tensor: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
            return tensor if tensor.is_meta else initialize(tensor, *arguments, **options)

        return only_real

    originals = {
        name: f for name, f in vars(nn.init).items() if name.endswith("_") and not name.startswith("_")
    }
    for name, initialize in originals.items():
        setattr(nn.init, name, skipping(initialize))
    try:
        yield
    finally:
        for name, initialize in originals.items():
            setattr(nn.init, name, initialize)


def drop_weights(module: nn.Module) -> nn.Module:
    """Move the parameters of a finished module to the meta device, in place, ties kept."""
    emptied: dict[int, nn.Parameter] = {}
    held = []
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is None:
                continue
            held.append(parameter)
            owner._parameters[name] = emptied.setdefault(id(parameter), _empty(parameter))
    return module
