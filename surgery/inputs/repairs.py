"""Repairs example inputs by what the error they caused says.

A forward pass that fails usually names what it wanted: an argument, a number of channels, a length, a width.
Each rule reads one kind of sentence and proposes changed arguments; a new rule is a function and a line in
`RULES`. Rules about arguments that are missing or do not belong are here, those about shapes in
`repair_shapes.py`.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from contextlib import suppress

import torch
from torch import Tensor, nn

from surgery.inputs.complaint import Complaint, read
from surgery.inputs.fields import known, make
from surgery.inputs.repair_shapes import SHAPE_RULES, Arguments, Rule, first_examples
from surgery.inputs.sample import Sample, TooLargeError, find, number


def repairs(module: nn.Module, arguments: Arguments, error: Exception, sample: Sample) -> Iterator[Arguments]:
    """Arguments that the error asks for in place of those that caused it, the likeliest first.

    Args:
        module: whose forward raised.
        arguments: that it was given, by name.
        error: what it raised.
        sample: makes values.
    """
    complaint = read(error)
    for rule in RULES:
        with suppress(TooLargeError):
            yield from rule(module, arguments, complaint, sample)


def outline(arguments: Arguments) -> str:
    """Names and shapes of arguments; what does not change between two tries is not worth trying twice."""
    kinds = {k: tuple(v.shape) if isinstance(v, Tensor) else v for k, v in arguments.items()}
    largest = {k: int(v.max()) for k, v in arguments.items() if _are_ids(v)}
    return str(sorted(kinds.items(), key=lambda item: item[0])) + str(largest)


def _missing(module: nn.Module, arguments: Arguments, said: Complaint, sample: Sample) -> Iterator[Arguments]:
    """An argument that the error names and that is not there; or that was None on the line that raised it."""
    accepted = inspect.signature(module.forward).parameters
    words = [*re.findall(r"[a-z_]{4,}", said.said), *said.empty]
    wanted = [w for w in dict.fromkeys(words) if known(w) and w in accepted and w not in arguments]
    one_way = [
        w for w in wanted if w.removesuffix("inputs_embeds") + "input_ids" not in (*arguments, *wanted)
    ]
    for names in ([w for w in wanted if not w.endswith("inputs_embeds")] or one_way, wanted[:1]):
        if names:
            yield {**arguments, **{name: make(name, sample) for name in names}}


def _alluded(module: nn.Module, arguments: Arguments, said: Complaint, sample: Sample) -> Iterator[Arguments]:
    """`Input language unknown`: an optional argument that is called almost so, `lang_ids`."""
    words = re.findall(r"[a-z]{4,}", said.said.lower())
    for name in inspect.signature(module.forward).parameters:
        stem = name.split("_")[0]
        telling = len(stem) > 3 and stem not in ("input", "attention")
        if telling and known(name) and name not in arguments and any(word.startswith(stem) for word in words):
            yield {**arguments, name: make(name, sample)}


def _none(module: nn.Module, arguments: Arguments, said: Complaint, sample: Sample) -> Iterator[Arguments]:
    """`'NoneType' object has no attribute 'sum'`: some optional argument is needed, and none is named."""
    if "NoneType" not in said.said:
        return
    accepted = inspect.signature(module.forward).parameters
    for name in _NEEDED:
        if name in accepted and known(name) and name not in arguments:
            yield {**arguments, name: make(name, sample)}


def _either(module: nn.Module, arguments: Arguments, said: Complaint, sample: Sample) -> Iterator[Arguments]:
    """`You cannot specify both input_ids and inputs_embeds`."""
    if re.search(r"cannot (?:specify|have|use|give) both|mutually exclusive|exactly one of", said.said):
        for name in arguments:
            if name.endswith("inputs_embeds") and name in said.said:
                yield {k: v for k, v in arguments.items() if k != name}


def _placeholders(
    module: nn.Module, arguments: Arguments, said: Complaint, sample: Sample
) -> Iterator[Arguments]:
    """`Image features and image tokens do not match, tokens: 0, features: 64`: tokens that stand for features."""
    found = re.search(r"tokens(?: do not match|:)?.*?tokens:? (\d+),? features:? (\d+)", said.said)
    found = found or re.search(r"tokens: (\d+), features[:\s]+(\d+)", said.said)
    ids = arguments.get("input_ids")
    if not found or not isinstance(ids, Tensor):
        return
    kind = next((k for k in ("video", "audio", "image", "speech") if k in said.said.lower()), "image")
    names = (
        f"{kind}_token_id {kind}_token_index {kind}_token {kind}_patch_id image_token_id image_token_index"
    )
    token = find(sample.config, names, None)
    if not isinstance(token, int) or found[1] == found[2]:
        return
    width = number(sample.config, "hidden_size", 1, "text")
    for count in (int(found[2]) // width, int(found[2])):  # some count numbers, others vectors
        if 0 < count <= 1 << 14:
            if count % len(ids) == 0 and not sample.accepts & {"image_grid_thw", "video_grid_thw"}:
                yield _with_token(arguments, token, count // len(ids), _TYPES.get(kind, 1))
            first = {
                k: v[:1] if isinstance(v, Tensor) and len(v) == len(ids) else v for k, v in arguments.items()
            }
            yield _with_token(first, token, count, _TYPES.get(kind, 1))


def _with_token(arguments: Arguments, token: int, count: int, kind: int) -> Arguments:
    """The texts with `token` `count` times after their first token, masks and types as long as they."""
    ids = arguments["input_ids"]
    clean = torch.where(ids == token, ids[:, :1], ids)
    text = torch.cat([clean[:, :1], torch.full((len(ids), count), token), clean[:, 1:]], 1)
    changed: Arguments = {**arguments, "input_ids": text}
    for name in ("attention_mask", "token_type_ids", "mm_token_type_ids", "position_ids"):
        if isinstance(arguments.get(name), Tensor):
            changed[name] = torch.ones_like(text) if name == "attention_mask" else torch.zeros_like(text)
    if "mm_token_type_ids" in changed:
        changed["mm_token_type_ids"][text == token] = kind
    return changed


def _small_table(
    module: nn.Module, arguments: Arguments, said: Complaint, sample: Sample
) -> Iterator[Arguments]:
    """`index out of range in self`: ids that some table of the model is too small for."""
    if said.rows is None:
        return
    changed = {
        name: value.clamp(max=said.rows - 1) if _are_ids(value) and int(value.max()) >= said.rows else value
        for name, value in arguments.items()
    }
    yield changed


def _cache(module: nn.Module, arguments: Arguments, said: Complaint, sample: Sample) -> Iterator[Arguments]:
    """Some models have caches that do not suit their shrunk selves; a single pass needs none."""
    accepts = "use_cache" in inspect.signature(module.forward).parameters
    words = " ".join((said.said, *said.lines))
    if accepts and re.search(r"[Cc]ache\b|get_seq_length|past_key_values", words):
        yield {**arguments, "use_cache": False}


def _single(module: nn.Module, arguments: Arguments, said: Complaint, sample: Sample) -> Iterator[Arguments]:
    """Models that take one example at a time say so in many words."""
    if re.search(r"batch.{0,30}\b1\b|\bsingle\b|one (?:image|example|audio)", said.said):
        yield first_examples(arguments)


RULES: tuple[Rule, ...] = (
    _placeholders, _small_table, *SHAPE_RULES, _either, _missing, _cache, _single, _none, _alluded,
)  # fmt: skip
"""How errors are read, in the order in which they are tried."""

_TYPES = {"image": 1, "video": 2, "audio": 3}  # of tokens; transformers' convention

_NEEDED = (
    "attention_mask", "input_features_mask", "feature_attention_mask", "pixel_attention_mask", "spatial_shapes",
    "image_grid_thw", "grid_thw", "target_sizes", "states", "actions", "rewards", "returns_to_go", "timesteps",
    "pixel_values", "input_features", "input_values", "decoder_input_values", "decoder_input_ids", "input_ids",
    "bbox", "merge_sizes", "image_attention_mask", "image_embeds_position_mask", "lang_ids",
    "image_sizes", "image_merge_sizes", "video_merge_sizes", "mm_token_type_ids",
)  # fmt: skip


def _are_ids(value: object) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.long and value.ndim > 1 and value.numel() > 0
