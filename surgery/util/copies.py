"""Copies of modules, whatever a forward pass left in them.

`copy.deepcopy` refuses a tensor that is part of a graph. Modules keep such tensors between passes: activations for a
picture, the weights that weight norm, spectral norm and pruning make of others. A copy gets their values without
their history; what a module makes anew at each pass it makes anew in its copy too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


def duplicate(module: nn.Module, memo: MutableMapping[int, Any] | None = None) -> nn.Module:
    """An independent copy of a module; the module itself is not touched.

    Args:
        module: also right after a forward pass with gradients.
        memo: by `id`, what stands in the copy for an object of the module, as `copy.deepcopy` has it. Copies made
            with one memo share what their modules share.

    Example:
        >>> import torch
        >>> net = nn.Linear(3, 5)
        >>> net.kept = net(torch.ones(1, 3))
        >>> duplicate(net).kept.requires_grad, net.kept.requires_grad
        (False, True)
    """
    return copy_with(module, _without_history, {} if memo is None else memo)


def copy_with(
    module: nn.Module, make: Callable[[Tensor, Callable[[], Tensor]], Tensor], memo: MutableMapping[int, Any]
) -> nn.Module:
    """A copy of a module whose tensors, wherever they are held, are copied by a function of ours.

    Attributes that cannot be copied, such as locks and open files, are shared with the module.

    Args:
        module: what to copy.
        make: from a tensor and a function that copies it as PyTorch does, its copy; parameters do not come here.
        memo: as in `duplicate`.
    """
    with _CopyTensors(make):
        try:
            made = dict(memo)  # a copy that fails halfway leaves halves in it
            twin = copy.deepcopy(module, made)
        except Exception:
            made = {**memo, **_shared_attributes(module, memo)}
            twin = copy.deepcopy(module, made)
    # Under its own `id` a memo keeps alive what it knows by `id`.
    memo.setdefault(id(memo), []).extend(made.pop(id(made), []))
    memo.update((key, value) for key, value in made.items() if key != id(memo))
    return twin


def _without_history(tensor: Tensor, copied: Callable[[], Tensor]) -> Tensor:
    return copied() if tensor.is_leaf else tensor.detach().clone()


def _shared_attributes(module: nn.Module, memo: Mapping[int, Any]) -> dict[int, Any]:
    """Attributes that cannot be copied by `id`: the copy shares them."""
    shared: dict[int, Any] = {}
    inner = {"_parameters", "_buffers", "_modules"}
    for part in module.modules():
        for value in (value for key, value in vars(part).items() if key not in inner):
            try:
                copy.deepcopy(value, dict(memo))
            except Exception:
                shared[id(value)] = value
    return shared


class _CopyTensors(TorchFunctionMode):
    """While a module is copied, has tensors copied by a function of ours, wherever they are held."""

    def __init__(self, make: Callable[[Tensor, Callable[[], Tensor]], Tensor]) -> None:
        super().__init__()
        self.make = make

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__:
            return self.make(args[0], lambda: func(*args, **(kwargs or {})))
        return func(*args, **(kwargs or {}))
