"""What members whose weights stay packed do not do: train, be changed or saved, and be compiled.

A module refuses what it is asked itself. As a part of another one, which is set to training as a whole, it stays as it
is: heads and adapters train on what a packed member computes.
"""

from __future__ import annotations

import inspect
import sys
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch import nn

from surgery.errors import TrainingError
from surgery.storage.packed import REFUSED, change_together, moved_together

_REFUSED = ("load_state_dict", "share_memory", "save_pretrained", "push_to_hub")
_GUARDED = ("train", "requires_grad_", *_REFUSED)


def guard(module: nn.Module) -> None:
    """Have a member refuse to be set to training, changed or saved, and be left as it is by `torch.compile`."""
    for part in module.modules():
        part.__dict__["train"] = partial(_train, part)
        if isinstance(part, nn.RNNBase):  # cuDNN's one piece of memory is for weights that have some
            part.__dict__["flatten_parameters"] = _nothing
    module.__dict__["requires_grad_"] = partial(_requires_grad, module)
    module.__dict__.update({method: _refuse for method in _REFUSED if hasattr(module, method)})
    if "forward" not in module.__dict__:  # its own
        forward = partial(_eagerly, module)
        forward.__signature__ = inspect.signature(module.forward)  # pyright: ignore  # which transformers looks at
        module.__dict__["forward"] = forward
    module.__dict__["_apply"] = partial(_moved_at_once, module)


def unguard(module: nn.Module) -> None:
    """Make a copy of a member an ordinary module again."""
    for method in _GUARDED:
        module.__dict__.pop(method, None)
    for part in module.modules():
        for method in ("train", "flatten_parameters"):
            part.__dict__.pop(method, None)
    for method, ours in (("forward", _eagerly), ("_apply", _moved_at_once)):
        if getattr(module.__dict__.get(method), "func", None) is ours:
            del module.__dict__[method]


def _train(module: nn.Module, mode: bool = True) -> nn.Module:
    """Refused where it is asked for by itself; a part of what is set to training as a whole stays as it is."""
    if not mode:
        return type(module).train(module, False)
    if not _of_whole(sys._getframe(1)):
        raise TrainingError(REFUSED)
    return module


def _of_whole(caller: FrameType) -> bool:
    """Whether it is PyTorch, on its way through the parts of a module, that calls."""
    return caller.f_code is nn.Module.train.__code__


def _requires_grad(module: nn.Module, requires_grad: bool = True) -> nn.Module:
    if requires_grad:
        raise TrainingError(REFUSED)
    return type(module).requires_grad_(module, False)


_EAGER: dict[Any, Any] = {}


def _eagerly(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    run: Any = type(module).forward
    if "torch._dynamo" in sys.modules:  # importing it takes seconds, and without it nothing compiles
        if run not in _EAGER:
            _EAGER[run] = torch.compiler.disable(run)
        run = _EAGER[run]
    return run(module, *args, **kwargs)


def _moved_at_once(module: nn.Module, change: Any, *args: Any, **kwargs: Any) -> nn.Module:
    """Move or cast a member, of which what its weights have in common stays in common."""
    with moved_together():
        return type(module)._apply(module, change_together(change), *args, **kwargs)


def _nothing() -> None:
    pass


def _refuse(*args: Any, **kwargs: Any) -> None:
    raise TrainingError(REFUSED)
