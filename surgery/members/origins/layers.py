"""Layers: how many of them tensors hold, and how many a configuration says."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from copy import deepcopy
from typing import Any

KEYS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "num_decoder_layers",
    "num_encoder_layers", "decoder_num_hidden_layers", "depth",
)  # fmt: skip
"""Names under which configurations say how many layers there are."""
_NUMBERED = re.compile(r"\.(\d+)\.")


def count_layers(names: Iterable[str]) -> dict[str, int]:
    """How many layers each outermost numbered list has, by its path: one more than its largest number.

    Example:
        >>> count_layers(["encoder.layer.0.w", "encoder.layer.1.w", "head.w"])
        {'encoder.layer': 2}
    """
    found: dict[str, int] = {}
    for name in names:
        if match := _NUMBERED.search(name):
            path = name[: match.start()]
            found[path] = max(found.get(path, 0), int(match.group(1)) + 1)
    return found


def layers_apart(built: Collection[str], held: Collection[str]) -> dict[str, tuple[int, int]]:
    """Lists of layers that an architecture and tensors have in different numbers: by path, what each has.

    Args:
        built: names of the architecture's tensors.
        held: names of the tensors that there are.
    """
    of_model, of_tensors = count_layers(built), count_layers(held)
    return {
        path: (of_model[path], of_tensors[path])
        for path in of_model
        if path in of_tensors and of_model[path] != of_tensors[path]
    }


def say_layers(config: Mapping[str, Any], built: Collection[str], held: Collection[str]) -> list[str]:
    """A sentence with both numbers for each list of layers of which a configuration says another number.

    Example:
        >>> say_layers({"n_layer": 2}, ["h.0.w", "h.1.w"], ["h.0.w"])
        ['config.json says n_layer = 2, but the tensors hold 1 in h']
    """
    return correct_layers(config, built, held)[1]


def correct_layers(
    config: Mapping[str, Any], built: Collection[str], held: Collection[str]
) -> tuple[dict[str, Any], list[str]]:
    """A configuration that says as many layers as there are tensors for, and the sentences of `say_layers`."""
    changed, notes = deepcopy(dict(config)), []
    for path, (says, holds) in layers_apart(built, held).items():
        place, key = _entry(changed, path, says)
        if key:
            notes.append(f"config.json says {key} = {says}, but the tensors hold {holds} in {path}")
            place[key] = holds
            kinds = place.get("layer_types")
            if isinstance(kinds, list) and len(kinds) == says > holds:
                place["layer_types"] = kinds[:holds]
        else:
            notes.append(f"the model has {says} layers in {path}, but the tensors hold {holds}")
    return changed, notes


def _entry(config: dict[str, Any], path: str, says: int) -> tuple[dict[str, Any], str]:
    """The part of a configuration, and the entry in it, that says how long the list at `path` is."""
    for name, part in config.items():  # of one part of several, such as text_config
        if name.endswith("_config") and isinstance(part, dict) and name.removesuffix("_config") in path:
            place, key = _entry(part, "", says)
            if key:
                return place, key
    keys = [key for key in KEYS if config.get(key) == says and not isinstance(config[key], bool)]
    decoder, encoder = "decoder" in path, "encoder" in path
    own = [key for key in keys if (decoder and "decoder" in key) or (encoder and "encoder" in key)]
    rest = [key for key in keys if "decoder" not in key and "encoder" not in key]
    return config, next(iter(own + rest), "")
