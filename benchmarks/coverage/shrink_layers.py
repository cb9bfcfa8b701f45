"""Fewer layers: how many each configuration keeps, and where what points at a layer then points.

A stack keeps so many layers that each kind of layer occurs, and each layer that is pointed at; what points at
layers points at as many of the last ones, in the same order.
"""

from __future__ import annotations

import re
from typing import Any

COUNTS = re.compile(r"(.*_)?(layers|n_layer|depth|mem_blocks|self_attends_per_block)")
_NO_COUNTS = re.compile(r".*(feat_extract|upsampling|fpn|every_n|conv_layers|max_window).*")
INDICES = re.compile(
    r".*(indexes|indices|hook_ids|layer_ids|extract_layers|cross_attention_layers|target_layers|feature_layers?|"
    r"proj_layers|attention_blocks|moe_layers|_layer_end_index)|merge_index|insert_layer_id"
)
_KINDS = ("layer_types", "layers_block_type", "mlp_layer_types")
_MOST = 8  # layers kept for the sake of kinds or of what points at them
_STAGES = 4  # lists of up to so many numbers are of stages, not of layers


def is_count(name: str, value: Any) -> bool:
    """Whether a field counts layers."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    return whole and bool(COUNTS.fullmatch(name)) and not _NO_COUNTS.fullmatch(name)


def fewer(config: Any, values: dict[str, Any], most: int) -> dict[int, int]:
    """For each count of layers among the fields of a configuration, the smaller count."""
    found = {v: most for name, v in values.items() if is_count(name, v) and v > most}
    for value in (*values.values(), *(getattr(config, name, None) for name in _KINDS)):
        if isinstance(value, (list, tuple)) and len(value) in found:
            new = [k for k, v in enumerate(value) if isinstance(v, (str, int)) and v not in value[:k]]
            if len(new) <= 4 and max(new, default=0) < _MOST:
                found[len(value)] = max(found[len(value)], max(new, default=0) + 1)
    shared = values.get("num_kv_shared_layers")
    if shared:  # what is shared and what it is shared with need a layer of each kind
        whole = values.get("num_hidden_layers", 0)
        kinds = found.get(whole, most)
        found.update({shared: kinds, whole: 2 * kinds})
    pointed = pointers(values)
    for count in found:
        if pointed and max(pointed) <= count and len(pointed) <= _MOST:
            found[count] = max(found[count], len(pointed))
    return {old: min(new, old) for old, new in found.items()}


def pointers(values: dict[str, Any]) -> list[int]:
    """Every layer that some field points at, ascending; layers counted from the end are left out."""
    found = set()
    for name, value in values.items():
        if name == "_out_indices" or INDICES.fullmatch(name):
            flat = value if isinstance(value, (list, tuple)) else [value]
            found.update(v for v in flat if isinstance(v, int) and not isinstance(v, bool) and v >= 0)
    return sorted(found)


def earlier(value: Any, counts: dict[int, int], pointed: list[int], first: int = 0) -> Any:
    """What points at layers, after there are fewer of them.

    Args:
        value: one index or a list of them; negative ones count from the end.
        counts: see `fewer`.
        pointed: all that is pointed at beside it.
        first: what the first layer is called.
    """
    flat = list(value) if isinstance(value, (list, tuple)) else [value]
    if not flat or not all(isinstance(v, int) for v in flat):
        return value
    fits = [old for old in counts if max(map(abs, (*flat, *pointed))) <= old]
    count = counts[min(fits)] if fits else 0
    if not fits or (max(map(abs, flat)) < count + first and max(pointed, default=0) < count + first):
        return value
    start = count - len(pointed) + first
    moved = [max(v, -count) if v < 0 else max(0, start + pointed.index(v)) for v in flat]
    if isinstance(value, (list, tuple)):
        return type(value)(dict.fromkeys(min(v, count - 1 + first) for v in moved))
    return min(moved[0], count - 1 + first)


def is_per_layer(value: Any, counts: dict[int, int]) -> bool:
    """Whether a list has an entry for each layer."""
    return isinstance(value, (list, tuple)) and len(value) > _STAGES and len(value) in counts
