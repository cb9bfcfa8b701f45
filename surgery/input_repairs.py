"""Repairs: what the words of an error say about the inputs that caused it.

A forward pass that fails usually names what it wanted: an argument, a number of channels, a length, a width.
Each rule reads one kind of sentence and changes the arguments accordingly; a new rule is a function and a line
in `RULES`.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from surgery.input_fields import FIELDS, Sample, find

Arguments = dict[str, Any]
Rule = Callable[[nn.Module, Arguments, str, Sample], Arguments | None]


def repair(module: nn.Module, arguments: Arguments, error: Exception, sample: Sample) -> Arguments | None:
    """Arguments that the error asks for in place of those that caused it; None where no rule knows it.

    Args:
        module: whose forward raised.
        arguments: that it was given, by name.
        error: what it raised.
        sample: makes values.
    """
    said = " ".join(str(error).split())
    for rule in RULES:
        changed = rule(module, arguments, said, sample)
        if changed is not None and not _same(changed, arguments):
            return changed
    return None


def _missing(module: nn.Module, arguments: Arguments, said: str, sample: Sample) -> Arguments | None:
    """An argument that the error names and that is not there."""
    known = inspect.signature(module.forward).parameters
    words = re.findall(r"[a-z_]{4,}", said)
    wanted = [w for w in dict.fromkeys(words) if w in FIELDS and w in known and w not in arguments]
    return {**arguments, **{name: FIELDS[name](sample) for name in wanted}} if wanted else None


def _channels(module: nn.Module, arguments: Arguments, said: str, sample: Sample) -> Arguments | None:
    """`expected input[2, 2, 16000] to have 1 channels, but got 2 channels instead`."""
    found = re.search(r"expected input\[([\d, ]+)\] to have (\d+) channels", said)
    if not found:
        return None
    shape, wanted = _numbers(found[1]), int(found[2])
    for name, value in _floats(arguments):
        if list(value.shape) == shape or value.numel() == math.prod(shape):
            if len(shape) == value.ndim:
                return {**arguments, name: sample.normal(*value.shape[:1], wanted, *value.shape[2:])}
            return {**arguments, name: sample.normal(value.shape[0], wanted, *shape[2:])}
    return None


def _product(module: nn.Module, arguments: Arguments, said: str, sample: Sample) -> Arguments | None:
    """`mat1 and mat2 shapes cannot be multiplied (256x80 and 320x64)`: an input has another width."""
    found = re.search(r"shapes cannot be multiplied \((\d+)x(\d+) and (\d+)x(\d+)\)", said)
    if not found:
        return None
    had, wanted = int(found[2]), int(found[3])
    for name, value in _floats(arguments):
        if value.shape[-1] == had:
            return {**arguments, name: sample.normal(*value.shape[:-1], wanted)}
    return None


def _norm(module: nn.Module, arguments: Arguments, said: str, sample: Sample) -> Arguments | None:
    """`normalized_shape=[64], expected input with shape [*, 64], but got input of size[2, 16, 48]`."""
    found = re.search(r"expected input with shape \[\*, (\d+)\],? but got input of size ?\[([\d, ]+)\]", said)
    if not found:
        return None
    shape, wanted = _numbers(found[2]), int(found[1])
    for name, value in _floats(arguments):
        if value.shape[-1] == shape[-1]:
            return {**arguments, name: sample.normal(*value.shape[:-1], wanted)}
    return None


def _patches(module: nn.Module, arguments: Arguments, said: str, sample: Sample) -> Arguments | None:
    """`shape '[-1, 3, 2, 14, 14]' is invalid for input of size 7168`: rows of one patch each."""
    found = re.search(r"shape '\[-1, ([\d, ]+)\]' is invalid for input of size (\d+)", said)
    if not found:
        return None
    width, size = math.prod(_numbers(found[1])), int(found[2])
    for name, value in _floats(arguments):
        if value.numel() == size or value.ndim == 2:
            return {**arguments, name: sample.normal(len(value) if value.ndim == 2 else 16, width)}
    return None


def _pairs(module: nn.Module, arguments: Arguments, said: str, sample: Sample) -> Arguments | None:
    """`Input must be a 5D tensor of shape (batch_size, 2, num_channels, height, width)`."""
    if not re.search(r"5D tensor of shape \(batch_size, 2,", said):
        return None
    for name, value in _floats(arguments):
        if value.ndim == 4:
            height, width = (max(side, 64) for side in value.shape[2:])
            return {**arguments, name: sample.normal(1, 2, value.shape[1], height, width)}
    return None


def _frames(module: nn.Module, arguments: Arguments, said: str, sample: Sample) -> Arguments | None:
    """`not enough values to unpack (expected 5, got 4)`: a batch of clips; or the other way round."""
    found = re.search(r"values to unpack \(expected (\d)(?:, got (\d))?\)", said)
    if not found:
        return None
    wanted = int(found[1])
    for name, value in _floats(arguments):
        if value.ndim == 4 and wanted == 5:
            frames = find(sample.config, "num_frames frames_per_clip", 2)
            return {**arguments, name: sample.normal(value.shape[0], int(frames), *value.shape[1:])}
        if value.ndim == 5 and wanted == 4:
            return {**arguments, name: value[:, 0]}
        if value.ndim == 2 and wanted == 3:
            return {**arguments, name: value[:, None]}
        if value.ndim == 3 and wanted == 2:
            return {**arguments, name: value[:, 0]}
    return None


def _mono(module: nn.Module, arguments: Arguments, said: str, sample: Sample) -> Arguments | None:
    """`Audio must be mono, but got 16000`: one channel, not none."""
    for name, value in _floats(arguments):
        if "mono" in said and value.ndim == 2:
            return {**arguments, name: value[:, None]}
    return None


def _none(module: nn.Module, arguments: Arguments, said: str, sample: Sample) -> Arguments | None:
    """`'NoneType' object has no attribute 'sum'`: some optional argument is needed, and none is named."""
    if "NoneType" not in said:
        return None
    known = inspect.signature(module.forward).parameters
    wanted = [name for name in known if name in FIELDS and name in _NEEDED and name not in arguments]
    return {**arguments, wanted[0]: FIELDS[wanted[0]](sample)} if wanted else None


def _multiple(module: nn.Module, arguments: Arguments, said: str, sample: Sample) -> Arguments | None:
    """`length 16000 is not a multiple of 1920`."""
    found = re.search(r"(\d+).{0,40}multiple of.{0,30}?(\d+)", said)
    if not found:
        return None
    had, unit = int(found[1]), int(found[2])
    for name, value in _floats(arguments):
        if unit and had in value.shape:
            axis = list(value.shape).index(had)
            shape = list(value.shape)
            shape[axis] = max(unit, had // unit * unit)
            return {**arguments, name: sample.normal(*shape)}
    return None


def _length(module: nn.Module, arguments: Arguments, said: str, sample: Sample) -> Arguments | None:
    """`expects the mel input features to be of length 3000, but found 60`; `Input size 224 doesn't match 32`."""
    found = re.search(r"of length (\d+),? but (?:found|got) (\d+)", said)
    if found:
        wanted, had = int(found[1]), int(found[2])
    else:
        found = re.search(r"\(?(\d+)\*(\d+)\)? doesn't match model \(?(\d+)\*(\d+)\)?", said)
        if not found:
            return None
        size = (int(found[3]), int(found[4]))
        for name, value in _floats(arguments):
            if value.ndim >= 4:
                return {**arguments, name: sample.normal(*value.shape[:-2], *size)}
        return None
    for name, value in _floats(arguments):
        if had in value.shape:
            shape = [wanted if side == had else side for side in value.shape]
            return {**arguments, name: sample.normal(*shape)}
    return None


def _placeholders(module: nn.Module, arguments: Arguments, said: str, sample: Sample) -> Arguments | None:
    """`Image features and image tokens do not match, tokens: 0, features: 64`: tokens that stand for features."""
    found = re.search(r"tokens(?: do not match|:)?.*?tokens:? (\d+),? features:? (\d+)", said)
    found = found or re.search(r"tokens: (\d+), features[:\s]+(\d+)", said)
    ids = arguments.get("input_ids")
    if not found or not isinstance(ids, Tensor):
        return None
    kind = next((k for k in ("video", "audio", "image", "speech") if k in said.lower()), "image")
    names = f"{kind}_token_id {kind}_token_index {kind}_token {kind}_patch_id image_token_id"
    token = find(sample.config, names, None)
    features = int(found[2])
    if not isinstance(token, int) or features > 1 << 14:
        return None
    each = -(-features // len(ids))
    if each * len(ids) != features:  # all in the first text
        arguments = {
            k: v[:1] if isinstance(v, Tensor) and len(v) == len(ids) else v for k, v in arguments.items()
        }
        ids, each = ids[:1], features
    clean = torch.where(ids == token, ids[:, :1], ids)
    text = torch.cat([clean[:, :1], torch.full((len(ids), each), token), clean[:, 1:]], 1)
    changed: Arguments = {**arguments, "input_ids": text}
    for name in ("attention_mask", "token_type_ids", "mm_token_type_ids", "position_ids"):
        if isinstance(arguments.get(name), Tensor):
            changed[name] = torch.ones_like(text) if name == "attention_mask" else torch.zeros_like(text)
    return changed


def _cache(module: nn.Module, arguments: Arguments, said: str, sample: Sample) -> Arguments | None:
    """Some hybrid models have caches that do not suit their shrunk selves; a single pass needs none."""
    accepts = "use_cache" in inspect.signature(module.forward).parameters
    caches = re.search(r"[Cc]ache|get_seq_length|past_key_values", said)
    return {**arguments, "use_cache": False} if accepts and caches else None


def _single(module: nn.Module, arguments: Arguments, said: str, sample: Sample) -> Arguments | None:
    """Models that take one example at a time say so in many words."""
    if not re.search(r"batch.{0,30}\b1\b|single|one (?:image|example|audio)", said):
        return None
    tensors = {k: v for k, v in arguments.items() if isinstance(v, Tensor) and v.ndim and len(v) > 1}
    return {**arguments, **{k: v[:1] for k, v in tensors.items()}} if tensors else None


RULES: tuple[Rule, ...] = (
    _placeholders, _channels, _product, _norm, _patches, _pairs, _frames, _mono, _multiple, _length, _cache,
    _missing, _single, _none,
)  # fmt: skip
"""How errors are read, in the order in which they are tried."""


_NEEDED = (
    "attention_mask", "input_features_mask", "feature_attention_mask", "pixel_attention_mask", "spatial_shapes",
    "image_grid_thw", "grid_thw", "states", "actions", "rewards", "returns_to_go", "timesteps", "pixel_values",
    "input_features", "input_values", "decoder_input_ids", "input_ids", "bbox", "merge_sizes",
)  # fmt: skip


def _floats(arguments: Arguments) -> list[tuple[str, Tensor]]:
    return [
        (k, v) for k, v in arguments.items() if isinstance(v, Tensor) and v.is_floating_point() and v.ndim > 1
    ]


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _same(one: Arguments, other: Arguments) -> bool:
    def key(arguments: Arguments) -> list[Any]:
        return sorted((k, tuple(v.shape) if isinstance(v, Tensor) else str(v)) for k, v in arguments.items())

    return key(one) == key(other)
