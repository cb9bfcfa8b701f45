"""A copy of a module to run in place of the user's own: without weights, or with the weights shared.

A forward pass can leave marks: cached weights, running statistics, hooks, train or eval mode. Running a copy
keeps the user's module as it was, also after an error. Parameters are not duplicated: on the meta device they
have no data, on their own device they are shared with the module, and the recorder undoes what a forward
writes to them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from surgery.members.member import Inputs, owners_of
from surgery.util.copies import copy_with


def canonical_names(module: nn.Module) -> dict[int, str]:
    """State-dict name by `id` of every tensor in the state dict; tied tensors go by their first owner."""
    first = {name: names[0] for names in owners_of(module).values() for name in names}
    state = module.state_dict(keep_vars=True)
    return {id(tensor): first[name] for name, tensor in state.items() if name in first}


def copy_module(module: nn.Module, make: Callable[[Tensor], Tensor]) -> tuple[nn.Module, dict[int, str]]:
    """A copy of `module` in eval mode whose tensors, registered or not, are `make(tensor)`.

    Returns:
        The copy, and the state-dict name by `id` of its tensors, empty for those that are not in the state
        dict.
    """
    made: dict[int, Tensor] = {}

    def once(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            made[id(tensor)] = make(tensor)
        return made[id(tensor)]

    tensors = [*module.parameters(), *module.buffers()]
    twin = copy_with(module, lambda tensor, _: once(tensor), {id(tensor): once(tensor) for tensor in tensors})
    known = canonical_names(module)
    return twin.eval(), {id(twin): known.get(key, "") for key, twin in made.items()}


def to_meta(tensor: Tensor) -> Tensor:
    """A tensor or parameter without data; what is no parameter but needs a value, keeps none either."""
    twin = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(twin, requires_grad=tensor.requires_grad)
    return twin


def on_meta(value: Any) -> Any:
    """A tensor without its data; anything else as it is."""
    return value.to("meta") if isinstance(value, Tensor) and not value.is_meta else value


def share_parameters(tensor: Tensor) -> Tensor:
    """A parameter itself; a clone of any other tensor, because a forward may write to it."""
    return tensor if isinstance(tensor, nn.Parameter) else tensor.detach().clone()


def map_inputs(inputs: Inputs, make: Callable[[Tensor], Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """`inputs` as arguments with every tensor replaced by `make(tensor)`."""

    def replace(leaf: Any) -> Any:
        return make(leaf) if isinstance(leaf, Tensor) else leaf

    kwargs: Mapping[str, Any] = inputs.kwargs
    return tuple(tree_map(replace, inputs.args)), {
        key: tree_map(replace, value) for key, value in kwargs.items()
    }
