"""Weights of a transformers model: every tensor in its place and in its file's dtype, or drawn at random."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from surgery.errors import LoadError
from surgery.members.origins.base import READ, Request
from surgery.members.origins.dtypes import stored_dtypes
from surgery.members.origins.empty import build_empty
from surgery.members.origins.layers import say_layers
from surgery.members.origins.transformers_dtypes import FileDtypes
from surgery.members.origins.transformers_places import failed, snapshot
from surgery.members.origins.weights import raise_misfit
from surgery.permission import Permission


class _UnableError(LoadError):
    """A class that transformers cannot load so."""


def load_weights(
    kind: Any,
    config: Any,
    where: str,
    revision: str | None,
    request: Request,
    unused: str,
    how: Mapping[str, Any],
    prefix: str,
) -> tuple[Any, dict[str, Any], torch.dtype]:
    """The module with every tensor in its place and in its file's dtype, options, and the dtype to build it in."""
    if Path(where).is_dir():
        dtypes = FileDtypes.of(kind, config, Path(where), prefix)
        if outlined := _outline(kind, config, where, request, unused, dtypes, how):
            return *outlined, dtypes.common or outlined[0].dtype
        module, extra = _load_weights(kind, where, revision, request, unused, dtypes.common or "auto", how)
    else:  # transformers chooses and fetches the files, of which only headers are read again
        module, extra = _load_weights(kind, where, revision, request, unused, "auto", how)
        commit = getattr(config, "_commit_hash", None)
        dtypes = FileDtypes.of(kind, config, snapshot(where, commit or revision))
        if dtypes.common not in (None, module.config.dtype):
            module, extra = _load_weights(
                kind, where, revision, request, unused, dtypes.common or "auto", how
            )
    dtypes.put(module, where)
    return module, extra, dtypes.common or module.dtype


def _outline(
    kind: Any,
    config: Any,
    where: str,
    request: Request,
    unused: str,
    dtypes: FileDtypes,
    how: Mapping[str, Any],
) -> tuple[Any, dict[str, Any]] | None:
    """A large model whose weights are not to be read, from its configuration and its files' headers, and options.

    Tensors that transformers merges while it loads, such as experts, would be read for that; on the meta device they
    are merged as shapes. What is in no file, such as frequencies of positions, is made.

    Returns:
        None where weights are to be read, and where the class cannot be built so.

    Raises:
        LoadError: where tensors are missing, too many, or of other shapes.
    """
    if request.read or getattr(config, "quantization_config", None) is not None:
        return None
    stored = stored_dtypes(Path(where))
    if sum(math.prod(shape) for _, shape in stored.values()) <= READ:
        return None
    shapes = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (dtype, shape) in stored.items()}
    given = {**how, "config": deepcopy(config), "state_dict": shapes, "device_map": {"": "meta"}}
    try:
        module, extra = _load_weights(kind, where, None, request, unused, dtypes.common or "auto", given)
        options = {name: value for name, value in extra.items() if name != "dropped"}
        twin = build_empty(lambda: kind._from_config(deepcopy(config), **options))
    except _UnableError:  # the ordinary way may be able to, or says what is wrong
        return None
    _take_buffers(module, twin)
    dtypes.put(module, where)
    return module, extra


def _take_buffers(module: nn.Module, twin: nn.Module) -> None:
    """Give a module on the meta device the buffers of another one of its class, which have values."""
    parts = dict(twin.named_modules())
    for path, part in module.named_modules():
        held = parts[path]._buffers if path in parts else {}
        for name, buffer in part._buffers.items():
            own = held.get(name)
            if buffer is not None and own is not None and buffer.is_meta and buffer.shape == own.shape:
                part._buffers[name] = own.to(buffer.dtype)


def draw_weights(kind: Any, config: Any, where: str) -> Any:
    """The module with weights drawn at random, by its class's own initialisation."""
    try:
        return kind._from_config(config)
    except Exception as error:
        raise LoadError(
            failed(where, None, f"building {kind.__name__} from its configuration", error)
        ) from error


def _load_weights(
    kind: Any,
    where: str,
    revision: str | None,
    request: Request,
    unused: str,
    dtype: torch.dtype | str,
    how: Mapping[str, Any],
) -> tuple[Any, dict[str, Any]]:
    """The module with every tensor in its place, cast to `dtype`, and the options that were needed for it."""
    extra: dict[str, Any] = {}
    module, info = _from_pretrained(kind, where, revision, request, dtype, how)
    missing = sorted(info["missing_keys"])
    optional = "add_pooling_layer" in inspect.signature(kind.__init__).parameters
    if optional and missing and all(name.startswith("pooler.") for name in missing):
        # An encoder that was saved without its pooler is complete without one: invent no weights for it.
        extra["add_pooling_layer"] = False
        module, info = _from_pretrained(kind, where, revision, request, dtype, {**how, **extra})
    unexpected = sorted(info["unexpected_keys"])
    if unused == "drop" and unexpected:
        extra["dropped"], unexpected = unexpected, []
    own = {*module.state_dict()}
    notes = say_layers(module.config.to_dict(), own, (own - {*info["missing_keys"]}) | {*unexpected})
    raise_misfit(
        f"{where} as weights of {kind.__name__}",
        sorted(info["missing_keys"]),
        unexpected,
        sorted(info["mismatched_keys"]),
        "".join(f"The file {note.removeprefix('the ')}: make these agree. " for note in notes)
        + "Check that config.json belongs to the weights, or choose the class that owns exactly these "
        "weights with ?class=NAME; unexpected tensors alone can be left out with ?unused=drop.",
    )
    return module, extra


def _from_pretrained(
    kind: Any,
    where: str,
    revision: str | None,
    request: Request,
    dtype: torch.dtype | str,
    how: Mapping[str, Any],
) -> tuple[Any, dict[str, Any]]:
    """The module, and what transformers says about tensors that did not fit."""
    try:
        return kind.from_pretrained(
            None if "state_dict" in how else where,
            revision=revision,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that all of them are named in one error
            trust_remote_code=request.permission >= Permission.ALL,
            **how,
        )
    except LoadError:
        raise
    except Exception as error:
        raise _UnableError(failed(where, revision, f"loading weights into {kind.__name__}", error)) from error
