"""Weight files: read them safely, compare their keys with a module, and write every tensor of a module."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from surgery.disk.untrusted import UnreadableError, check_archive
from surgery.errors import LoadError
from surgery.members.extra_state import NAME as EXTRA_STATE
from surgery.members.extra_state import to_document
from surgery.members.origins.dtypes import not_tensors_alone, put_dtypes, refuse_other_kinds, widest
from surgery.members.origins.layers import say_layers
from surgery.safetensors.header import misnamed, parse_header
from surgery.safetensors.writing import write_shards
from surgery.util.text import one_line, shorten


def check_safetensors(path: Path) -> None:
    """Read the header of a safetensors file, and with it the length that the file must have.

    Raises:
        LoadError: where the file is truncated or its header lies.
    """
    from safetensors import SafetensorError, safe_open

    try:
        parse_header(path)
        with safe_open(str(path), framework="pt"):
            pass
    except UnreadableError as error:
        if other := misnamed(path):
            raise LoadError(f"{path} {other}") from None
        raise LoadError(
            f"{path} is no complete safetensors file, it {error}: copy or download it again"
        ) from None
    except (SafetensorError, OSError, ValueError) as error:
        raise LoadError(
            f"{path} must be a complete safetensors file, but reading it says {one_line(error)}: copy or download it "
            "again"
        ) from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict in a `.safetensors`, `.pth`, `.pt`, `.bin` or `.tar` file; code in it never runs.

    Training checkpoints are unwrapped as timm does it: averaged weights first, `state_dict`, `model`.

    Raises:
        LoadError: where the file does not exist, is damaged, needs code to be read, or holds no state dict.
    """
    from timm.models import load_state_dict

    try:
        check_archive(path)
    except UnreadableError as error:
        raise LoadError(f"the weights file {path} {error}: check the path") from None
    if path.suffix not in (".safetensors", ".pth", ".pt", ".bin", ".tar"):
        raise LoadError(f"weights are read from .safetensors, .pth, .pt or .bin, not from '{path.name}'")
    if path.suffix == ".safetensors":
        check_safetensors(path)
    try:
        state = load_state_dict(str(path), weights_only=True)
    except Exception as error:
        raise not_tensors_alone(path, error) from error
    if not isinstance(state, Mapping) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise LoadError(f"{path} must hold a state dict (names to tensors): save model.state_dict() into it")
    return dict(state)


def check_fit(module: nn.Module, state: Mapping[str, Tensor], what: str, advice: str) -> None:
    """Compare names and shapes of `state` with the module's own state dict.

    Raises:
        LoadError: naming all missing, unexpected and mismatched tensors in one sentence.
    """
    own = module.state_dict()
    missing = [name for name in own if name not in state]
    unexpected = [name for name in state if name not in own]
    mismatched = [
        (name, tuple(state[name].shape), tuple(own[name].shape))
        for name in own
        if name in state and isinstance(own[name], Tensor) and state[name].shape != own[name].shape
    ]
    said = [f"{note[0].upper()}{note[1:]}." for note in say_layers({}, own, state)]
    raise_misfit(what, missing, unexpected, mismatched, " ".join([*said, advice]))


def raise_misfit(what: str, missing: list, unexpected: list, mismatched: list, advice: str) -> None:
    """Raise one `LoadError` for everything that does not fit; do nothing where all fits."""
    shapes = [f"{name} (file {found}, model {wanted})" for name, found, wanted in mismatched]
    parts = [
        f"{len(names)} {word} ({shorten(names)})"
        for word, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if names
    ]
    if parts:
        raise LoadError(f"{what}: tensors that do not fit: {'; '.join(parts)}. {advice}")


def load_exactly(module: nn.Module, state: Mapping[str, Tensor], what: str) -> nn.Module:
    """Load `state` strictly, every tensor in the dtype that it has there.

    Raises:
        LoadError: where tensors are of another kind than the module's, or one tensor of the module has two values.
    """
    own = module.state_dict(keep_vars=True)
    dtypes = {name: tensor.dtype for name, tensor in state.items()}
    refuse_other_kinds(what, dtypes, {name: t for name, t in own.items() if isinstance(t, Tensor)})
    tied: dict[int, list[str]] = {}
    for name, tensor in own.items():
        tied.setdefault(id(tensor), []).append(name)
    if torn := [
        " and ".join(names)
        for names in tied.values()
        if any(not torch.equal(state[names[0]], state[name]) for name in names[1:])
    ]:
        raise LoadError(
            f"{what}: names that are one tensor in the model must have one value, but differ in the file: "
            f"{shorten(torn)}. Give the options that leave them apart, or a file in which they agree"
        )
    if (common := widest(dtypes.values())) is not None:
        module.to(common)  # what is in no state dict follows
    put_dtypes(module, dtypes)
    module.load_state_dict(dict(state), strict=True)
    return module


def check_finite(module: nn.Module, what: str) -> None:
    """Every weight must be a number, and every buffer must not be NaN (masks may hold infinities).

    Raises:
        LoadError: naming every bad tensor with its count.
    """
    parameters = {id(parameter) for parameter in module.parameters()}
    bad = []
    for name, tensor in module.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.device.type == "meta":
            continue
        if not tensor.numel():
            continue
        values = tensor.detach() if tensor.dtype.itemsize > 1 else tensor.detach().float()
        low, high = values.aminmax()  # one pass, no copy; NaN where any value is
        if torch.isfinite(low) & torch.isfinite(high):
            continue
        wrong = ~torch.isfinite(values) if id(tensor) in parameters else torch.isnan(values)
        if count := int(wrong.sum()):
            bad.append(f"{name} ({count:,} of {tensor.numel():,})")
    if bad:
        raise LoadError(
            f"{what}: every weight must be finite, but NaN or infinite values are in {shorten(bad, 20)}: "
            "take another checkpoint, or allow them with `allow_nonfinite`"
        )


def save_weights(module: nn.Module, directory: Path) -> None:
    """Write `model.safetensors` (shards with an index above 5 GB) with every name of the state dict.

    Tied names are written in full, because a strict `load_state_dict` asks for all of them.
    """
    state = module.state_dict()
    tensors = {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
    write_shards(directory, "model", tensors, metadata={"format": "pt"})
    save_extra_state(state, directory)


def save_extra_state(state: Mapping[str, Any], directory: Path) -> None:
    """Write what a state dict holds besides tensors as `extra_state.json`; nothing where that is nothing."""
    if rest := {name: value for name, value in state.items() if not isinstance(value, Tensor)}:
        document = to_document(rest, directory.name)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / EXTRA_STATE).write_bytes(document)
