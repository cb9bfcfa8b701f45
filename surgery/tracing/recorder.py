"""Recorder: one forward pass written down as a `torch.fx` graph.

A `TorchFunctionMode` sees every torch function and tensor method that a forward pass calls, whatever Python
control flow surrounds it. Each call becomes a node. Nothing is rewritten and nothing needs to be traceable;
on the meta device no data is needed either.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import base_types
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from surgery.tracing.bounds import Bounds, Watch
from surgery.tracing.layout import Strided
from surgery.tracing.remembered import call
from surgery.tracing.shapes import META


def after(value: Any, write: Any) -> Any:
    """`value` once `write`, an operation that changes a part of it in place, has been done."""
    del write
    return value


def unseen(before: Any) -> Any:
    """A value that no recorded call made, for example a scripted function; `before` came before it."""
    raise NotImplementedError(f"what was computed after {before} was not recorded")


def off_meta(item: Any) -> Any:
    """What a call on the CPU is given in place of an argument that names a device; anything else as it is."""
    return torch.device("cpu") if isinstance(item, torch.device) or item == "meta" else item


def record(module: nn.Module, recorder: Recorder, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Graph:
    """Run one forward pass of `module` and return its graph.

    Args:
        module: in eval mode; hooks are added to it and taken off again.
        recorder: fresh.
        args: positional arguments of the forward pass.
        kwargs: keyword arguments of the forward pass.

    Returns:
        A graph whose nodes carry `meta["tensor"]` (`Strided`), `meta["module"]` (path), on `get_attr` nodes
        of the state dict `meta["parameter"]`, and on views `meta["view_of"]` (a node).

    Raises:
        Exception: whatever the forward pass raises, and `OutOfBoundsError`.
    """
    for name, value in [*((f"arg{k}", v) for k, v in enumerate(args)), *kwargs.items()]:
        recorder.add_input(name, value)
    with recorder.paths_of(module), _eager(), torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            with recorder:
                output = module(*args, **kwargs)
        finally:
            recorder.restore()
    recorder.graph.output(recorder.argument(output))
    return recorder.graph


class Recorder(TorchFunctionMode):
    """Builds the graph while it is the active mode; see `record`.

    Args:
        names: state-dict name by `id` of the module's tensors; empty for those that are not in the state
            dict.
        parameters: of the module, whose values are put back should the forward pass change them.
        watch: bounds.
    """

    def __init__(
        self, names: dict[int, str], parameters: Sequence[nn.Parameter], watch: Watch | None = None
    ) -> None:
        super().__init__()
        self.watch = watch or Watch(Bounds())
        self.graph = fx.Graph()
        self.names = names
        self.nodes: Any = WeakTensorKeyDictionary()
        self.modules: list[str] = [""]
        self.constants = 0
        self.last: fx.Node | None = None
        self.parameters = {_storage(p): p for p in parameters if not p.is_meta}
        self.kept: dict[int, tuple[nn.Parameter, Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        writes = writes_to(name, args, kwargs)
        if writes is not None:
            self._keep(writes)
        if name == "__get__":
            func, args, kwargs = getattr, (args[0], func.__self__.__name__), {}
        self.watch.check()
        output = self.run(func, args, kwargs)
        tensors = [leaf for leaf in tree_flatten(output)[0] if isinstance(leaf, Tensor)]
        if writes is None and all(tensor in self.nodes for tensor in tensors):
            return output
        node = self._call(func, args, kwargs)
        if writes is not None:
            self._written(writes, node)
        elif isinstance(output, Tensor):
            self._name(output, node, args)
        else:
            self._unpack(output, node, args)
        return output

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Make the call that was seen."""
        name = getattr(func, "__name__", "")
        if name in META and any(isinstance(a, Tensor) and a.is_meta for a in args):
            return META[name](*args, **kwargs)
        return (
            func(*args, **kwargs) if writes_to(name, args, kwargs) is not None else call(func, args, kwargs)
        )

    def add_input(self, name: str, value: Any) -> None:
        """A placeholder for every tensor in `value`."""
        for leaf in tree_flatten(value)[0]:
            if isinstance(leaf, Tensor) and leaf not in self.nodes:
                node = self.graph.placeholder(name)
                node.meta.update(tensor=_strided(leaf), module="")
                self.nodes[leaf] = node

    def argument(self, value: Any) -> Any:
        """`value` as it can stand in a graph: nodes for tensors, a string for what a graph cannot hold."""

        def leaf(item: Any) -> Any:
            if isinstance(item, Tensor):
                return self._node(item)
            if isinstance(item, slice):
                return slice(*(leaf(part) for part in (item.start, item.stop, item.step)))
            return item if item is None or item is ... or isinstance(item, base_types) else str(type(item))

        if isinstance(value, torch.Size):
            value = tuple(value)
        return tree_map(leaf, value)

    @contextmanager
    def paths_of(self, module: nn.Module) -> Iterator[None]:
        """Keeps the path of the module that is running, by hooks."""
        handles = []
        for path, part in module.named_modules():
            try:
                handles.append(part.register_forward_pre_hook(self._enter(path), prepend=True))
                handles.append(part.register_forward_hook(self._leave, always_call=True))
            except RuntimeError:  # a scripted module takes no hooks; what runs in it counts to its parent
                continue
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, path: str) -> Callable[..., None]:
        return lambda *_: self.modules.append(path)

    def _leave(self, *_: Any) -> None:
        self.modules.pop()

    def restore(self) -> None:
        """Give the parameters that the forward pass wrote to their values back."""
        for owner, before in self.kept.values():
            owner.data.copy_(before)

    def _call(self, func: Any, args: Any, kwargs: Any) -> fx.Node:
        node = self.graph.call_function(func, self.argument(tuple(args)), self.argument(dict(kwargs)))
        node.meta["module"] = self.modules[-1]
        self.last = node
        return node

    def _node(self, tensor: Tensor) -> fx.Node:
        """The node of a tensor; one that no call made is a parameter, a buffer or a constant."""
        node = self.nodes.get(tensor)
        if node is not None:
            return node
        name = self.names.get(id(tensor))
        if name is None and self.last is not None:
            node = self.graph.call_function(unseen, (self.last,))
        else:
            self.constants += not name
            node = self.graph.get_attr(name or f"_constant{self.constants}")
        node.meta.update(tensor=_strided(tensor), module=self.modules[-1])
        if name:
            node.meta["parameter"] = name
        self.nodes[tensor] = node
        return node

    def _name(self, tensor: Tensor, node: fx.Node, args: Any) -> None:
        node.meta["tensor"] = _strided(tensor)
        source = next((a for a in tree_flatten(args)[0] if isinstance(a, Tensor)), None)
        if source is not None and _storage(source) == _storage(tensor) is not None:
            node.meta["view_of"] = self._node(source)
        self.nodes[tensor] = node

    def _unpack(self, output: Any, node: fx.Node, args: Any) -> None:
        """A `getitem` node for every tensor of an output with several."""
        if not isinstance(output, list | tuple):
            for leaf in tree_flatten(output)[0]:
                if isinstance(leaf, Tensor):
                    self._name(leaf, node, args)
            return
        for index, item in enumerate(output):
            if isinstance(item, Tensor | list | tuple):
                part = self.graph.call_function(operator.getitem, (node, index))
                part.meta["module"] = self.modules[-1]
                self._name(item, part, args) if isinstance(item, Tensor) else self._unpack(item, part, args)

    def _written(self, tensor: Tensor, node: fx.Node) -> None:
        """A write in place: the tensor, and the tensor that it is a view of, stand for their new values."""
        node.meta["tensor"] = _strided(tensor)
        base = tensor._base
        if base is not None and base in self.nodes:
            joined = self.graph.call_function(after, (self.nodes[base], node))
            joined.meta.update(tensor=_strided(base), module=self.modules[-1])
            self.nodes[base] = joined
        self.nodes[tensor] = node

    def _keep(self, tensor: Tensor) -> None:
        """Remember the value of a parameter that is about to be written to, through whatever view of it."""
        owner = self.parameters.get(_storage(tensor))
        if owner is not None and id(owner) not in self.kept:
            self.kept[id(owner)] = (owner, owner.detach().clone())


def writes_to(name: str, args: Any, kwargs: Any) -> Tensor | None:
    """The tensor that a call changes in place."""
    if isinstance(kwargs.get("out"), Tensor):
        return kwargs["out"]
    in_place = name.endswith("_") and not name.endswith("__") and name != "requires_grad_"
    in_place |= kwargs.get("inplace") is True or name == "__setitem__" or name in _IN_PLACE
    return args[0] if in_place and args and isinstance(args[0], Tensor) else None


_OPERATORS = ("add", "sub", "mul", "div", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "matmul")
_IN_PLACE = frozenset(f"__i{name}__" for name in _OPERATORS)


def _strided(tensor: Tensor) -> Strided | None:
    try:
        return Strided(tuple(tensor.shape), tuple(tensor.stride()), int(tensor.storage_offset()))
    except (RuntimeError, NotImplementedError):
        return None  # tensors inside a vmap, sparse and nested tensors have no strides


def _storage(tensor: Tensor) -> int | None:
    try:
        return tensor.untyped_storage()._cdata
    except (RuntimeError, NotImplementedError):
        return None


def _eager() -> Any:
    """Compiled parts run uncompiled, where any module can have been compiled."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
