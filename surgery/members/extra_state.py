"""Extra state: what modules put into a state dict besides tensors, by `get_extra_state` and `set_extra_state`.

PyTorch lets it be anything that can be pickled. While a member lives its modules keep it themselves. In files it is a
JSON document without code: plain values, containers of them, and tensors, which is what extra states are made of as a
rule; anything else is refused with its place and type, as nothing else can be read again safely.
"""

from __future__ import annotations

import base64
import json
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from surgery.errors import OutputError
from surgery.util.text import shorten

NAME = "extra_state.json"
"""The file beside a member's weights that holds it."""

KEY = "_extra_state"
"""PyTorch's last step of its key in a state dict."""

DEEPEST = 64  # containers inside of one another


def parts_with_extra_state(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Keys of a module's state dict that are extra state, each with the submodule that it belongs to."""
    for path, part in module.named_modules(remove_duplicate=False):
        if type(part).get_extra_state is not nn.Module.get_extra_state:
            yield (f"{path}.{KEY}" if path else KEY), part


def extra_state_of(module: nn.Module) -> dict[str, Any]:
    """The extra state of all submodules, by its key in the state dict.

    Example:
        >>> extra_state_of(nn.Linear(2, 2))
        {}
    """
    return {key: part.get_extra_state() for key, part in parts_with_extra_state(module)}


def state_keys(module: nn.Module) -> tuple[str, ...]:
    """The keys of a module's state dict, in its order: parameters, persistent buffers, extra state, part by part."""
    keys: list[str] = []
    for path, part in module.named_modules(remove_duplicate=False):
        stay = part._non_persistent_buffers_set
        own = [name for name, tensor in part._parameters.items() if tensor is not None]
        own += [name for name, tensor in part._buffers.items() if tensor is not None and name not in stay]
        own += [KEY] if type(part).get_extra_state is not nn.Module.get_extra_state else []
        keys += [f"{path}.{name}" if path else name for name in own]
    return tuple(keys)


def set_extra_state(module: nn.Module, values: Mapping[str, Any]) -> None:
    """Give submodules their extra state back; keys that a module does not have are left out."""
    for key, part in parts_with_extra_state(module):
        if key in values:
            part.set_extra_state(values[key])


def to_document(values: Mapping[str, Any], whose: str) -> bytes:
    """Extra state as a JSON document.

    Args:
        values: by key of the state dict.
        whose: the member's name, for errors.

    Raises:
        OutputError: naming every value that is neither plain nor a tensor, with its key and type.
    """
    bad: list[str] = []
    document = {key: _encoded(value, key, bad, 0) for key, value in values.items()}
    if bad:
        raise OutputError(
            f"Extra state must consist of plain values, containers and tensors to be written, but that of '{whose}' "
            f"holds {shorten(bad)}: return such from get_extra_state, or leave it out."
        )
    return json.dumps(document, separators=(",", ":"), allow_nan=False).encode()


def document_or_nothing(values: Mapping[str, Any]) -> bytes:
    """Extra state as a JSON document, empty where it is of values that a document cannot hold."""
    try:
        return to_document(values, "")
    except OutputError:
        return b""


def from_document(document: Any) -> dict[str, Any]:
    """The inverse of `to_document`, of parsed JSON.

    Raises:
        ValueError: where it is no such document.
    """
    if not isinstance(document, Mapping):
        raise ValueError("it must be an object of keys")
    try:
        return {key: _decoded(value, 0) for key, value in document.items()}
    except (TypeError, KeyError, AttributeError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error


def _encoded(value: Any, key: str, bad: list[str], depth: int) -> Any:
    kind = type(value)
    if depth > DEEPEST:
        bad.append(f"{key} (nested too deeply)")
        return None
    if value is None or kind in (bool, int, str):
        return value
    if kind is float:
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, Tensor):
        if value.layout == torch.strided and not value.is_quantized and value.device.type != "meta":
            whole = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
            content = whole.reshape(-1).view(torch.uint8).numpy().tobytes() if whole.numel() else b""
            return {"tensor": [str(whole.dtype)[6:], list(whole.shape), base64.b64encode(content).decode()]}
    elif kind is bytes:
        return {"bytes": base64.b64encode(value).decode()}
    elif kind in (torch.dtype, torch.device):
        return {kind.__name__: str(value).removeprefix("torch.")}
    elif kind is list:
        return [_encoded(each, f"{key}[{i}]", bad, depth + 1) for i, each in enumerate(value)]
    elif kind in (tuple, torch.Size):
        return {
            kind.__name__: [_encoded(each, f"{key}[{i}]", bad, depth + 1) for i, each in enumerate(value)]
        }
    elif kind in (dict, OrderedDict):
        pairs = value.items()
        return {
            kind.__name__: [
                [_encoded(k, f"{key} (a key)", bad, depth + 1), _encoded(v, f"{key}[{k!r}]", bad, depth + 1)]
                for k, v in pairs
            ]
        }
    bad.append(f"{key} ({kind.__module__}.{kind.__qualname__})")
    return None


def _tensor(found: Any) -> Tensor:
    dtype, shape, content = found
    kind = getattr(torch, dtype)
    if not isinstance(kind, torch.dtype):
        raise ValueError(f"'{dtype}' is no dtype")
    raw = bytearray(base64.b64decode(content, validate=True))
    if math.prod(shape) * kind.itemsize != len(raw) or any(size < 0 for size in shape):
        raise ValueError(f"{len(raw)} bytes are no {dtype} of {shape}")
    return torch.frombuffer(raw, dtype=kind).clone().view(shape) if raw else torch.empty(shape, dtype=kind)


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"'{name}' is no dtype")
    return found


_READERS: dict[str, Callable[[Any], Any]] = {
    "float": float,
    "tensor": _tensor,
    "bytes": lambda text: base64.b64decode(text, validate=True),
    "dtype": _dtype,
    "device": torch.device,
}


def _decoded(value: Any, depth: int) -> Any:
    if depth > DEEPEST:
        raise ValueError("it is nested too deeply")
    if isinstance(value, list):
        return [_decoded(each, depth + 1) for each in value]
    if not isinstance(value, Mapping):
        return value
    if len(value) != 1:
        raise ValueError("a value must be plain or say its one kind")
    ((kind, found),) = value.items()
    if kind in ("tuple", "Size"):
        made = tuple(_decoded(each, depth + 1) for each in found)
        return made if kind == "tuple" else torch.Size(made)
    if kind in ("dict", "OrderedDict"):
        pairs = [(_decoded(k, depth + 1), _decoded(v, depth + 1)) for k, v in found]
        return dict(pairs) if kind == "dict" else OrderedDict(pairs)
    if kind not in _READERS:
        raise ValueError(f"'{kind}' is no kind of value")
    return _READERS[kind](found)
