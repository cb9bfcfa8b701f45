"""Layer kinds: the registry of what a tensor can be to a network, one `register` line each.

A kind names the operations in which a tensor is of that kind and the module types whose parameters are, the
latter by their qualified names, so that nothing has to be imported. Operations come first; module types serve
what no forward pass reached.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import surgery.tracing.layers.operations as operations
from surgery.tracing.layers.axes import (
    Axes,
    Shape,
    conv_axes,
    conv_transpose_axes,
    gate_axes,
    is_depthwise,
    linear_axes,
    right_axes,
)
from surgery.tracing.layers.operations import Call, Reader, Reading

ModuleReader = Callable[[nn.Module], Iterator[tuple[str, Axes | None]]]


@dataclass(frozen=True)
class LayerKind:
    """One way in which a tensor is used.

    Attributes:
        name: of the kind.
        private: whether tensors of this kind stay with their member unless asked for.
        reason: one sentence, for one that is private.
        ops: operation name -> reader of its arguments.
        modules: qualified module type -> reader of its parameters, for models that cannot be run.
        meets: operations in which a parameter meets data without being a map.
    """

    name: str
    private: bool = False
    reason: str = ""
    ops: Mapping[str, Reader] = field(default_factory=dict)
    modules: Mapping[str, ModuleReader] = field(default_factory=dict)
    meets: frozenset[str] = frozenset()


KINDS: dict[str, LayerKind] = {}
_OPS: dict[str, Reader] = {}
_MEETS: dict[str, str] = {}
_MODULES: dict[str, tuple[str, ModuleReader]] = {}


def register(kind: LayerKind) -> LayerKind:
    """Add a layer kind; the operations and module types that it names are known from here on."""
    KINDS[kind.name] = kind
    _OPS.update(kind.ops)
    _MEETS.update(dict.fromkeys(kind.meets, kind.name))
    _MODULES.update({name: (kind.name, reader) for name, reader in kind.modules.items()})
    return kind


def read_call(call: Call) -> tuple[Reading, ...] | None:
    """How the operation uses its arguments; `None` where no kind knows the operation."""
    reader = _OPS.get(call.op)
    return None if reader is None else tuple(r for r in reader(call) if r.argument is not None)


def kind_met_by(op: str) -> str | None:
    """The private kind of a parameter that meets data in `op`, where one says so."""
    return _MEETS.get(op)


def read_module(module: nn.Module) -> tuple[tuple[str, str, Axes | None], ...]:
    """`(parameter, kind, axes)` for the parameters of a module whose type, or a base of it, is known."""
    names = [f"{base.__module__}.{base.__qualname__}" for base in type(module).__mro__]
    if isinstance(
        module, torch.jit.ScriptModule
    ):  # a scripted module is known by the class that it was made of
        names = [_scripted_name(module)]
    for name in names:
        found = _MODULES.get(name)
        if found is not None:
            return tuple((name, found[0], axes) for name, axes in found[1](module))
    return ()


def _scripted_name(module: torch.jit.ScriptModule) -> str:
    """`torch.nn.modules.linear.Linear` for `__torch__.torch.nn.modules.linear.___torch_mangle_3.Linear`."""
    name = str(module._c._type().qualified_name())  # type: ignore[attr-defined]
    return re.sub(r"___torch_mangle_\d+\.", "", name.removeprefix("__torch__."))


# Parameters by module type ---------------------------------------------------------------------------


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _matrix(name: str = "weight", axes: Callable[[Shape], Axes] = linear_axes) -> ModuleReader:
    def read(module: Any) -> Iterator[tuple[str, Axes | None]]:
        yield name, axes(tuple(getattr(module, name).shape))

    return read


def _private(*names: str) -> ModuleReader:
    def read(module: Any) -> Iterator[tuple[str, Axes | None]]:
        yield from ((name, None) for name in names if getattr(module, name, None) is not None)

    return read


def _conv(module: Any) -> Iterator[tuple[str, Axes | None]]:
    shape, groups = tuple(module.weight.shape), int(module.groups)
    transposed = bool(module.transposed)
    axes = conv_transpose_axes if transposed else conv_axes
    yield "weight", None if is_depthwise(shape, groups, transposed) else axes(shape, groups)


def _recurrent(gates: int) -> ModuleReader:
    def read(module: Any) -> Iterator[tuple[str, Axes | None]]:
        for name, weight in module.named_parameters(recurse=False):
            if name.startswith(("weight_ih", "weight_hh")):
                yield name, gate_axes(tuple(weight.shape), gates)
            elif name.startswith("weight_hr"):
                yield name, linear_axes(tuple(weight.shape))

    return read


def _attention(module: Any) -> Iterator[tuple[str, Axes | None]]:
    if getattr(module, "in_proj_weight", None) is not None:
        yield "in_proj_weight", gate_axes(tuple(module.in_proj_weight.shape), 3, "three")
    for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
        if getattr(module, name, None) is not None:
            yield name, linear_axes(tuple(getattr(module, name).shape))


def _named(prefix: str, names: str, reader: ModuleReader) -> dict[str, ModuleReader]:
    return {prefix + name: reader for name in names.split()}


# The kinds -------------------------------------------------------------------------------------------

register(
    LayerKind(
        "linear",
        ops={"linear": operations.linear},
        modules={
            "torch.nn.modules.linear.Linear": _matrix(),
        },
    )
)
register(
    LayerKind(
        "matmul",
        ops={
            **dict.fromkeys(
                ("matmul", "__matmul__", "mm", "bmm", "mv"), operations.product(0, ("input", "mat2"))
            ),
            **dict.fromkeys(
                ("_grouped_mm", "grouped_mm", "grouped_mm_fallback"), operations.product(0, ("input", "mat2"))
            ),
            **dict.fromkeys(("addmm", "addmm_", "addmv"), operations.product(1, ("mat1", "mat2"))),
            **dict.fromkeys(("baddbmm", "addbmm"), operations.product(1, ("batch1", "batch2"))),
            "__rmatmul__": operations.swapped_product,
            "tensordot": operations.tensordot,
        },
        modules={"transformers.pytorch_utils.Conv1D": _matrix(axes=right_axes)},
    )
)
register(LayerKind("einsum", ops={"einsum": operations.einsum}))
register(
    LayerKind(
        "bilinear",
        ops={"bilinear": operations.bilinear},
        modules={"torch.nn.modules.linear.Bilinear": _matrix()},
    )
)
for _rank in (1, 2, 3):
    for _stem, _type in (("conv", "Conv"), ("conv_transpose", "ConvTranspose")):
        _name = f"{_stem}{_rank}d"
        _module = f"torch.nn.modules.conv.{_type}{_rank}d"
        register(
            LayerKind(
                _name,
                ops={_name: operations.conv(_rank, _stem != "conv")},
                modules={_module: _conv},
            )
        )
for _name, _gates, _ops in (
    ("lstm", 4, ("lstm",)),
    ("gru", 3, ("gru",)),
    ("rnn", 1, ("rnn_tanh", "rnn_relu")),
):
    register(
        LayerKind(
            _name,
            ops={
                **dict.fromkeys(_ops, operations.recurrent(_gates, _name)),
                **{f"{op}_cell": operations.cell(_gates, _name) for op in _ops},
            },
            modules=_named(
                "torch.nn.modules.rnn.", f"{_name.upper()} {_name.upper()}Cell", _recurrent(_gates)
            ),
        )
    )
register(
    LayerKind(
        "attention",
        ops={"multi_head_attention_forward": operations.attention},
        modules={"torch.nn.modules.activation.MultiheadAttention": _attention},
    )
)
register(
    LayerKind(
        "embedding",
        private=True,
        reason="looks up rows by index",
        ops={
            "embedding": operations.every("embedding", start=0),
            "embedding_bag": operations.every("embedding", start=0),
        },
        modules=_named("torch.nn.modules.sparse.", "Embedding EmbeddingBag", _private("weight")),
        meets=frozenset({"__getitem__", "index", "index_select", "gather", "take"}),
    )
)
register(LayerKind("depthwise", private=True, reason="a convolution in which each output reads one channel"))
register(
    LayerKind(
        "norm",
        private=True,
        reason="scales or shifts its input element by element",
        ops=dict.fromkeys(
            _words("layer_norm native_layer_norm batch_norm group_norm rms_norm instance_norm prelu"),
            operations.every("norm"),
        ),
        modules={
            **_named(
                "torch.nn.modules.normalization.", "LayerNorm GroupNorm RMSNorm", _private("weight", "bias")
            ),
            **_named("torch.nn.modules.batchnorm.", "_BatchNorm", _private("weight", "bias")),
        },
        meets=_words(
            "mul mul_ __mul__ __rmul__ __imul__ multiply div div_ __truediv__ __itruediv__ "
            "__rtruediv__ true_divide addcmul pow __pow__ __rpow__ minimum maximum clamp"
        ),
    )
)
register(
    LayerKind(
        "bias",
        private=True,
        reason="is added to its input",
        meets=_words(
            "add add_ __add__ __radd__ __iadd__ sub sub_ __sub__ __rsub__ __isub__ rsub "
            "scaled_dot_product_attention"
        ),
    )
)
register(
    LayerKind(
        "input",
        private=True,
        reason="is itself read as an input of the network",
        meets=_words("cat concat concatenate stack where masked_fill masked_scatter __setitem__ copy_"),
    )
)
