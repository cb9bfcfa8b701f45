"""The exported graph: `torch.export`, non-strict, read like a recorded one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from surgery.tracing.bounds import Watch
from surgery.tracing.layout import Strided


def export_graph(
    module: nn.Module,
    names: dict[int, str],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    watch: Watch | None = None,
) -> fx.Graph:
    """The graph of `torch.export` with parameters as `get_attr` nodes, in the form that `record` returns.

    Args:
        module: in eval mode.
        names: state-dict name by `id` of the module's tensors.
        args: positional arguments of the forward pass.
        kwargs: keyword arguments of the forward pass.
        watch: bounds, looked at whenever a submodule is entered.

    Raises:
        Exception: whatever `torch.export` raises, and `OutOfBoundsError`.
    """
    hook = watch and register_module_forward_pre_hook(lambda *_: watch.check())
    try:
        with torch.no_grad():
            program = torch.export.export(module, args, kwargs, strict=False)
    finally:
        if hook:
            hook.remove()
    held: dict[str, Tensor] = {**dict(module.named_parameters(remove_duplicate=False))}
    held |= dict(module.named_buffers(remove_duplicate=False))
    signature = program.graph_signature
    lifted = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    lifted |= signature.inputs_to_lifted_tensor_constants
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in lifted:
            twin = graph.get_attr(lifted[node.name])
            tensor = held.get(lifted[node.name])
            if tensor is not None and id(tensor) in names:
                twin.meta["parameter"] = names[id(tensor)]
        else:
            twin = graph.node_copy(node, lambda n: copies[n])
        copies[node] = twin
        twin.meta.update(tensor=_strided(node.meta.get("val")), module=_module(node), exported=True)
        twin.meta.pop("val", None)
    return graph


def _strided(value: Any) -> Strided | None:
    if not isinstance(value, Tensor):
        return None
    return Strided(tuple(value.shape), tuple(value.stride()), int(value.storage_offset()))


def _module(node: fx.Node) -> str:
    """The path of the innermost module that the exporter noted."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [entry[0] for entry in stack.values()]
    return paths[-1] if paths else ""
