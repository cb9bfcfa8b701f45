"""Live modules as they come: wrappers are taken off, and tensors that are no ordinary weights are refused by name."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from surgery.errors import LoadError
from surgery.util.text import shorten


def unwrap(module: nn.Module) -> nn.Module:
    """The module inside `torch.compile`, `DataParallel` and `DistributedDataParallel`; its layers may be compiled too.

    Args:
        module: as the user has it; compiled layers below it are replaced by what was compiled, which shares their
            weights.

    Example:
        >>> net = nn.Linear(3, 5)
        >>> unwrap(nn.DataParallel(net)) is net
        True
    """
    while True:
        if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            module = module.module
        elif _is_compiled(module):
            module = module._orig_mod  # pyright: ignore[reportAssignmentType]
        else:
            break
    for parent in list(module.modules()):
        for name, child in parent._modules.items():
            if child is not None and _is_compiled(child):
                parent._modules[name] = child._orig_mod  # pyright: ignore[reportArgumentType]
    return module


def check_ordinary(module: nn.Module) -> None:
    """Every tensor must be there, dense, whole, and of a dtype that computes.

    Args:
        module: unwrapped.

    Raises:
        LoadError: naming each kind of tensor that is not, with what to do.
    """
    if isinstance(module, torch.jit.ScriptModule):
        raise LoadError(
            f"a live module must be Python code, but {type(module).__name__} is compiled by TorchScript, whose weights "
            "cannot come from elsewhere: give the module that was scripted or traced"
        )
    if sharded := [path or "the module itself" for path, part in module.named_modules() if _is_sharded(part)]:
        raise LoadError(
            f"a live module must hold all of its weights, but FSDP has cut those of {shorten(sharded)}: load the "
            "checkpoint without FSDP, or give the full state dict to an ordinary module"
        )
    bad: dict[str, list[str]] = {}
    for name, tensor in _tensors(module):
        if reason := _why_not(tensor):
            bad.setdefault(reason, []).append(name)
    if bad:
        raise LoadError(
            "a live module must hold its weights as ordinary tensors, but "
            + "; ".join(f"{shorten(names)} {reason}" for reason, names in bad.items())
        )
    _take_off_hooks(module)


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    persistent = {name for name, value in _state_names(module) if isinstance(value, Tensor)}
    yield from ((name, buffer) for name, buffer in module.named_buffers() if name in persistent)


def _state_names(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for path, part in module.named_modules():
        for name, value in part._buffers.items():
            if name not in part._non_persistent_buffers_set:
                yield f"{path}.{name}" if path else name, value


def _why_not(tensor: Tensor) -> str:
    from torch.nn.parameter import is_lazy
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    kind = type(tensor).__name__
    if is_lazy(tensor):
        return "have no shape yet: run the module once with real inputs"
    data = tensor.data if isinstance(tensor, nn.Parameter) else tensor
    inner = type(data).__name__
    if "DTensor" in (kind, inner):
        return "are parts of sharded tensors (DTensor): load the checkpoint in one process, without FSDP"
    if hasattr(tensor, "quant_state") or kind in ("Params4bit", "Int8Params"):
        return "are quantised by bitsandbytes: call module.dequantize(), or load them without quantization_config"
    if tensor.is_quantized or is_traceable_wrapper_subclass(data) or is_traceable_wrapper_subclass(tensor):
        name = inner if inner not in ("Tensor", "Parameter") else kind
        return f"are quantised or wrapped ({name}): give the module as it was before, or dequantise it"
    if tensor.layout != torch.strided:
        return f"are sparse ({tensor.layout}): make them dense with to_dense()"
    if tensor.is_meta:
        return (
            "are on the meta device, without values, as disk and CPU offload leave them: load the checkpoint without "
            "device_map, or with device_map='cpu'"
        )
    return ""


def _take_off_hooks(module: nn.Module) -> None:
    """Take off accelerate's hooks where everything is on one device: nothing is moved any more."""
    if "accelerate" not in sys.modules or not any(hasattr(part, "_hf_hook") for part in module.modules()):
        return
    devices = sorted({str(tensor.device) for _, tensor in _tensors(module)})
    if len(devices) > 1:
        raise LoadError(
            f"a live module must lie on one device, but accelerate has spread it over {', '.join(devices)}: load the "
            "checkpoint with device_map='cpu', or with one device"
        )
    from accelerate.hooks import remove_hook_from_module

    remove_hook_from_module(module, recurse=True)


def _is_compiled(module: nn.Module) -> bool:
    return "torch._dynamo" in sys.modules and isinstance(module, torch._dynamo.eval_frame.OptimizedModule)


def _is_sharded(module: nn.Module) -> bool:
    if "torch.distributed.fsdp" not in sys.modules:
        return False
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    return isinstance(module, (FSDPModule, FullyShardedDataParallel))
