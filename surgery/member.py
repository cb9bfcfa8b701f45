"""Member: one of the models being joined, and everything needed to make it loadable again."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Inputs:
    """Arguments of one forward call; tensors hold a batch in their first axis."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    source: str = "given"


@dataclass(frozen=True)
class Origin:
    """Where a member came from, precise enough to build its architecture again without its weights.

    Attributes:
        kind: `transformers`, `timm`, `factory` or `module` (a live `nn.Module` handed over in Python).
        reference: what the user typed, or the class name of a live module.
        architecture: transformers class, timm model name, or `file.py:factory`.
        revision: hub commit or the like, where known.
        options: JSON-able arguments for building the architecture.
        seed: of the weights, where they were drawn at random because none are stored; see
            `surgery.randomness.member_seed`.
    """

    kind: str
    reference: str
    architecture: str
    revision: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None


@dataclass(frozen=True, repr=False)
class Member:
    """A module with its name, example inputs, origin, and the files that make it loadable again.

    Attributes:
        name: unique within a joint model; letters, digits, `_`, `-` and `.`.
        module: in eval mode, weights loaded.
        inputs: example inputs for tracing.
        origin: how to build the architecture again.
        files: small files (config, tokenizer, preprocessor) by their relative path.
        original: whether the weights are those that the origin gives; not after training or a fit.
    """

    name: str
    module: nn.Module
    inputs: Inputs
    origin: Origin
    files: Mapping[str, bytes] = field(default_factory=dict)
    original: bool = True

    def __repr__(self) -> str:
        return (
            f"Member '{self.name}': {type(self.module).__name__}, {self.origin.kind} {self.origin.reference}"
        )


def owners_of(module: nn.Module) -> dict[str, tuple[str, ...]]:
    """Every tensor in the module's state dict by its first name, with all names under which it is tied.

    Two names are owners of one tensor when they hold the same `Parameter` or buffer object, or views of the same
    memory of the same shape. Names come in state-dict order, persistent buffers included.
    """
    first: dict[tuple, str] = {}
    owners: dict[str, list[str]] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            continue
        key = (tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype)
        if tensor.numel() == 0 or tensor.device.type == "meta":
            key = (id(tensor),)
        name0 = first.setdefault(key, name)
        owners.setdefault(name0, []).append(name)
    return {name: tuple(names) for name, names in owners.items()}


def content_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of a state dict, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()
