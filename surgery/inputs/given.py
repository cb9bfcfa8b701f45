"""Checks example inputs from a user, a factory or a task's data by running the member on them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from surgery.errors import LoadError
from surgery.inputs.candidates import forward_error
from surgery.members.member import Inputs
from surgery.util.text import one_line


def check_runs(module: nn.Module, inputs: Inputs, name: str) -> None:
    """Run a module once on example inputs.

    A module without data (on the meta device) cannot be tried; nothing is said of it.

    Args:
        module: in eval mode.
        inputs: to be tried; they are moved to where the module is.
        name: of the member.

    Raises:
        LoadError: saying what the module raised, and which shapes and dtypes it was given.

    Example:
        >>> check_runs(nn.Linear(3, 5), Inputs((torch.zeros(2, 3),)), "net")
    """
    devices = {tensor.device for tensor in (*module.parameters(), *module.buffers())}
    if any(device.type == "meta" for device in devices):
        return
    moved = inputs
    if len(devices) == 1:
        device = next(iter(devices))
        args, kwargs = _placed((inputs.args, dict(inputs.kwargs)), device)
        moved = Inputs(args, kwargs, inputs.source)
    cuda = [device for device in devices if device.type == "cuda"]
    with torch.random.fork_rng(devices=cuda):
        error = forward_error(module, moved)
    if error is not None:
        raise LoadError(
            f"the example inputs of '{name}' ({inputs.source}) must run in {type(module).__name__}, but its forward "
            f"raised {one_line(error)}; given were {outlined(inputs)}: give inputs that it takes"
        )


def outlined(inputs: Inputs) -> str:
    """Shapes and dtypes of arguments, in one line.

    Example:
        >>> outlined(Inputs((torch.zeros(2, 3),), {"mask": None}))
        'float32 [2, 3], mask None'
    """
    outlines = [_outline(value) for value in inputs.args]
    outlines += [f"{name} {_outline(value)}" for name, value in inputs.kwargs.items()]
    return ", ".join(outlines) or "no arguments"


def _outline(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, tuple | list):
        return f"({', '.join(_outline(item) for item in value)})"
    return "None" if value is None else type(value).__name__


def _placed(value: Any, device: torch.device) -> Any:
    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, value)
