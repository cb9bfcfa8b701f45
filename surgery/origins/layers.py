"""Layers: how many of them tensors hold, and how many a configuration says."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

KEYS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "num_decoder_layers",
    "num_encoder_layers", "depth",
)  # fmt: skip
"""Names under which configurations say how many layers there are."""
_NUMBERED = re.compile(r"\.(\d+)\.")


def count_layers(names: Iterable[str]) -> dict[str, int]:
    """How many members each outermost numbered list has, by its path: one more than its largest number.

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


def layer_keys(config: Mapping[str, Any], path: str, count: int) -> list[str]:
    """The entries of a configuration that can mean the list at `path` and do not say `count`."""
    keys = [key for key in KEYS if isinstance(config.get(key), int) and config[key] != count]
    side = "decoder" if "decoder" in path else "encoder" if "encoder" in path else ""
    own = [key for key in keys if side and side in key]
    if side == "encoder" and not own:
        own = [key for key in keys if "decoder" not in key]
    return own or [key for key in keys if "encoder" not in key and "decoder" not in key]


def correct_layers(config: Mapping[str, Any], names: Iterable[str]) -> tuple[dict[str, Any], list[str]]:
    """A configuration that says as many layers as tensors of these names hold.

    Returns:
        the configuration, and a sentence with both numbers for each entry that was changed.

    Example:
        >>> correct_layers({"n_layer": 12}, ["h.0.w", "h.1.w"])
        ({'n_layer': 2}, ['config.json says n_layer = 12, but its tensors hold 2 layers (h)'])
    """
    changed, notes = dict(config), []
    for path, count in count_layers(names).items():
        for key in layer_keys(changed, path, count)[:1]:
            notes.append(
                f"config.json says {key} = {changed[key]}, but its tensors hold {count} layers ({path})"
            )
            changed[key] = count
    return changed, notes
