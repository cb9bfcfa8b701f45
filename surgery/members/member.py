"""Member: one of the models being joined, and everything needed to make it loadable again."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from surgery.errors import LoadError, PlanError
from surgery.members.extra_state import KEY, document_or_nothing, extra_state_of, state_keys
from surgery.members.replacement import Replaced
from surgery.util.text import shorten


@dataclass(frozen=True)
class Spread:
    """What is known of the values of a tensor that were not kept.

    Attributes:
        low: the smallest value.
        high: the largest.
        mean: of real values.
        deviation: standard deviation of real values, over all of them.
    """

    low: float
    high: float
    mean: float = 0.0
    deviation: float = 0.0


@dataclass(frozen=True)
class Inputs:
    """Arguments of one forward call; tensors hold a batch in their first axis.

    Attributes:
        args: by position.
        kwargs: by name.
        source: where they come from, in words.
        spreads: tensors that stand for others, whose values were not kept, by their place, such as `0`, `ids` or
            `states.1`: what is known of those others; None where nothing is.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    source: str = "given"
    spreads: Mapping[str, Spread | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Alone:
    """What a member takes alone: parameters, and bytes of its state dict; a tied tensor once."""

    parameters: int
    nbytes: int


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
            `surgery.util.randomness.member_seed`.
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
        replaced: modules of `module` in whose place others stand, in the order in which they were replaced.
        alone: what the member took before the first of these was replaced; None where none was.
    """

    name: str
    module: nn.Module
    inputs: Inputs
    origin: Origin
    files: Mapping[str, bytes] = field(default_factory=dict)
    original: bool = True
    replaced: tuple[Replaced, ...] = ()
    alone: Alone | None = None

    def __repr__(self) -> str:
        return (
            f"Member '{self.name}': {type(self.module).__name__}, {self.origin.kind} {self.origin.reference}"
        )


def state_tensors(module: nn.Module) -> dict[str, Tensor]:
    """A module's parameters and persistent buffers by the names of its state dict, in its order.

    They are read off the module itself: what hooks add to a state dict, take out of it or call by another name, and
    extra state (`surgery.members.extra_state`), are no tensors that belong to the module.

    Raises:
        LoadError: naming all tensors that hold no dense values: uninitialised, sparse, quantised.

    Example:
        >>> list(state_tensors(nn.BatchNorm1d(2, affine=False)))
        ['running_mean', 'running_var', 'num_batches_tracked']
    """
    found: dict[str, Tensor] = {}
    bad: list[str] = []
    for path, part in module.named_modules(remove_duplicate=False):
        stay = part._non_persistent_buffers_set
        kept = {name: tensor for name, tensor in part._buffers.items() if name not in stay}
        for name, tensor in {**part._parameters, **kept}.items():
            if tensor is not None:
                key = f"{path}.{name}" if path else name
                found[key] = tensor
                bad += [f"{key} ({what})"] if (what := _not_dense(tensor)) else []
    if bad:
        raise LoadError(
            f"Every tensor of a member must hold dense values, but this is not so of {shorten(bad)}: run "
            "lazy modules once, and make sparse or quantised tensors dense before."
        )
    return found


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of a module's parameters and persistent buffers."""
    return {name: tuple(tensor.shape) for name, tensor in state_tensors(module).items()}


def whole_state(module: nn.Module) -> dict[str, Any]:
    """A module's parameters, persistent buffers and extra state by the keys of its state dict, in its order."""
    found = {**state_tensors(module), **extra_state_of(module)}
    return {key: found[key] for key in state_keys(module)}


def _not_dense(tensor: Tensor) -> str:
    """Why a tensor has no values that could be taken apart; empty where it has."""
    if nn.parameter.is_lazy(tensor):
        return "uninitialised"
    if tensor.layout != torch.strided:
        return str(tensor.layout).removeprefix("torch.")
    return "quantised" if tensor.is_quantized else ""


def owners_of(module: nn.Module) -> dict[str, tuple[str, ...]]:
    """Every tensor in the module's state dict by its first name, with all names under which it is tied.

    Two names are owners of one tensor when they hold the same `Parameter` or buffer object, or views of the same
    memory of the same shape. Names come in state-dict order, persistent buffers included.
    """
    first: dict[tuple, str] = {}
    owners: dict[str, list[str]] = {}
    for name, tensor in state_tensors(module).items():
        key = (tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype)
        if tensor.numel() == 0 or tensor.device.type == "meta":
            key = (id(tensor),)
        name0 = first.setdefault(key, name)
        owners.setdefault(name0, []).append(name)
    return {name: tuple(names) for name, names in owners.items()}


def content_hash(tensors: Mapping[str, Any]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of a state dict, in the order of the names.

    Extra state counts as the document that files hold of it; where it has none, its name counts. A state of handles is
    read tensor by tensor.
    """
    digest = hashlib.sha256()
    look = getattr(tensors, "look", tensors.__getitem__)  # of handles, what is mapped is not copied
    for name in sorted(tensors):
        value = look(name)  # once: a handle is read
        if not isinstance(value, Tensor) or name.rpartition(".")[2] == KEY:
            digest.update(f"{name}\0".encode() + document_or_nothing({name: value}))
            continue
        tensor = value.detach().cpu().contiguous()
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()


def check_names(names: Iterable[str]) -> None:
    """Refuse names of members that are given twice.

    Raises:
        PlanError: naming them.
    """
    counts = Counter(names)
    if twice := sorted(name for name, count in counts.items() if count > 1):
        raise PlanError(
            f"Every member needs its own name, but {', '.join(twice)} is given more than once; write NAME=REFERENCE, "
            "or give `name` to load_member."
        )
