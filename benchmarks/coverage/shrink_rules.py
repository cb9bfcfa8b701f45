"""Shrinking rules: a transformers configuration made small, field by field, so that it still fits together.

Widths are all divided by one number, whatever they are the width of, and counts of heads and groups stay: then
what was equal stays equal and what was a product stays one, within a configuration and between nested ones.
Layers become few, at least one of each kind. Ids of special tokens move into the smaller vocabulary, the same
id everywhere. A field is recognised by the words of its name; one that no rule knows keeps its value.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

_WIDTH = re.compile(
    r"(.*_)?(hidden|embed|emb|embedding|embeddings|intermediate|inner|ffn|feedforward|dim|dims|dimension|width|"
    r"channels?|proj|projection|project|units|rank|filters|latent|chans|embd|feats)(_.*)?|d_(model|ff|kv|head|inner)|"
    r"hidden_sizes?(_.*)?|dff|(fpn|mask)_feature_size|upsample_groups|n_inner|flow_size|feed_forward_size|"
    r"visual_feat_dim|upsample_initial_channel|(.*_)?channel_list|(.*_)?encoder_sizes|embed_dim_per_stage|kv_channels"
)
_NO_WIDTH = re.compile(
    r"(.*_)?(num_(?!filters|pos_feats|channels)|n_(?!embd|inner)|layers?|heads|kernel|strides?|dilations?|position|"
    r"positions|vocab|dropout|ratios?|token|ids?|indices|index|max|min|types?|mel|factor|mult|multiple|state|bins|"
    r"length|blocks?|patch|config|every|std|prob)(_.*)?"
)
_KEPT_WIDTH = re.compile(r"hidden_size_per_layer_input|patch_embeds_hidden_size|index_head_dim|num_filters|num_pos_feats")
_LAYERS = re.compile(r"(.*_)?(layers|n_layer|depth|mem_blocks)")
_NO_LAYERS = re.compile(r".*(feat_extract|upsampling|fpn|every_n|per_block|conv_layers|max_window).*")
_DEPTHS = re.compile(
    r"depths?|layers|(.*_)?(block_repeats|num_blocks|blocks_per_stage|numb_of_layers|block_sizes|attn_blocks)"
)
_EXPERTS = re.compile(r"(.*_)?(num|n)_(local_|routed_)?experts")
_TOP_EXPERTS = re.compile(r"(.*_)?(experts_per_tok|moe_k|moe_topk|moe_top_k|top_k_experts|num_selected_experts)")
_VOCABULARY = re.compile(r"(.*_)?vocab_size(_per_layer_input)?|unpadded_vocab_size")
_TOKENS = re.compile(r".*(token_id|token_index|token_ids|suppress_tokens)|(bos|eos|pad|sep|cls|mask)_id")
_SIDES = re.compile(
    r"(image|img|crop|pretrain_image|max_img|spec)_size|(.*_)?(feature_sizes|feat_sizes|rope_k_sizes)|pos_emb_(height|width)"
)
_PICTURE_TOKENS = re.compile(r"image_seq_length|mm_tokens_per_image|video_seq_length|num_image_tokens")
_INDICES = re.compile(
    r".*(indexes|indices|_ids|extract_layers|cross_attention_layers|target_layers|feature_layers?|proj_layers|"
    r"attention_blocks|moe_layers|_layer_end_index)"
)
_MOST_LAYERS = 8


@dataclass(frozen=True)
class Scale:
    """How much smaller.

    Attributes:
        width: what widths are divided by.
        layers: at most so many of a kind, more where kinds differ.
        vocabulary: at most so many tokens.
        picture: largest side of a picture.
    """

    width: int
    layers: int = 2
    vocabulary: int = 512
    picture: int = 256


@dataclass
class _Family:
    """What the nested configurations of one model share."""

    scale: Scale
    side: int  # what sides of pictures are divided by
    tokens: dict[int, int] = field(default_factory=dict)

    def token(self, old: int) -> int:
        """The id that stands for a special token in the smaller vocabulary."""
        if old < self.scale.vocabulary:
            return old
        return self.tokens.setdefault(old, self.scale.vocabulary - 1 - len(self.tokens))


def shrink(config: Any, scale: Scale) -> Any:
    """A new, smaller configuration of the same class; what is derived from other fields is derived anew."""
    sides = [
        side
        for part in _parts(config)
        for name, value in _values(part).items()
        if _SIDES.fullmatch(name)
        for side in _numbers(value)
    ]
    divisor = 1
    while sides and max(sides) // divisor > scale.picture and all(side % (2 * divisor) == 0 for side in sides if side > 64):
        divisor *= 2
    return _shrink(config, _Family(scale, divisor))


def _shrink(config: Any, family: _Family) -> Any:
    kind = type(config)
    values = _values(config)
    usual, declared = _values(_usual(kind, config)), {f.name: f.default for f in fields(kind)}
    layers = _layers(config, values, family.scale)
    changed: dict[str, Any] = {}
    for name, value in values.items():
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            changed[name] = _shrink(value, family)
            continue
        small = _rule(name, value, values, layers, family)
        derived = declared.get(name, value) is None and usual.get(name) == value
        if name == "_out_indices":
            if small != value or usual.get(name) != value:
                changed["out_indices"] = small
        elif name.startswith("_"):
            continue
        elif (small != value and not (derived and not isinstance(value, (list, tuple)))) or (
            not derived and usual.get(name) != value
        ):
            changed[name] = small
    return kind(**changed)


def _rule(name: str, value: Any, values: dict[str, Any], layers: dict[int, int], family: _Family) -> Any:
    """The smaller value of one field."""
    scale = family.scale
    if isinstance(value, (bool, str, float)) or value is None:
        return value
    if isinstance(value, dict):
        return _rope(value, scale) if name.startswith("rope") else value
    if name == "_out_indices" or _INDICES.fullmatch(name):
        return _earlier(value, layers, 1 if name == "_out_indices" else 0)
    if isinstance(value, (list, tuple)) and len(value) in layers and len(value) > 4:
        return type(value)(value[: layers[len(value)]])
    if isinstance(value, int) and value in layers and _LAYERS.fullmatch(name) and not _NO_LAYERS.fullmatch(name):
        return layers[value]
    for pattern, smaller in _simple(family):
        if pattern.fullmatch(name):
            return _each(value, smaller)
    if _VOCABULARY.fullmatch(name):
        return _each(value, lambda v: min(v, scale.vocabulary))
    if _DEPTHS.fullmatch(name) and isinstance(value, (list, tuple)):
        return _each(value, lambda v: min(v, 2))
    wide = _KEPT_WIDTH.fullmatch(name) or (_WIDTH.fullmatch(name) and not _NO_WIDTH.fullmatch(name))
    return _each(value, lambda v: _narrow(v, scale.width)) if wide else value


def _simple(family: _Family) -> list[tuple[re.Pattern[str], Callable[[int], int]]]:
    """Rules that look at a number alone."""
    return [
        (_TOKENS, family.token),
        (_EXPERTS, lambda v: min(v, 8)),
        (_TOP_EXPERTS, lambda v: min(v, 2)),
        (re.compile("n_group"), lambda v: min(v, 2)),
        (re.compile("topk_group"), lambda v: min(v, 1)),
        (re.compile("first_k_dense_replace|num_dense_layers"), lambda v: min(v, 1)),
        (re.compile("max_source_positions"), lambda v: min(v, 200)),
        (_SIDES, lambda v: v // family.side if v > 0 else v),
        (_PICTURE_TOKENS, lambda v: max(1, v // family.side**2)),
    ]


def _layers(config: Any, values: dict[str, Any], scale: Scale) -> dict[int, int]:
    """For each count of layers in a configuration, the smaller count: one of each kind, one for each index."""
    found: dict[int, int] = {}
    for name, value in values.items():
        if not _LAYERS.fullmatch(name) or _NO_LAYERS.fullmatch(name) or isinstance(value, bool):
            continue
        if isinstance(value, int) and value > scale.layers:
            found[value] = scale.layers
    kinds = [getattr(config, name, None) for name in ("layer_types", "layers_block_type", "mlp_layer_types")]
    for value in (*values.values(), *kinds):
        if not isinstance(value, (list, tuple)):
            continue
        if len(value) in found and all(isinstance(v, (str, bool, int)) for v in value):
            new = [k for k, v in enumerate(value) if v not in value[:k]]
            if new and len(new) <= 4 and new[-1] < _MOST_LAYERS:
                found[len(value)] = max(found[len(value)], new[-1] + 1)
    picked = [v for name, v in values.items() if _INDICES.fullmatch(name) or name == "_out_indices"]
    for value in picked:
        if isinstance(value, (list, tuple)) and value and all(isinstance(v, int) for v in value):
            for count in found:
                if len(value) <= _MOST_LAYERS < max(value) + _MOST_LAYERS and max(value) <= count:
                    found[count] = max(found[count], len(value))
    return {old: min(new, old) for old, new in found.items()}


def _earlier(value: Any, layers: dict[int, int], first: int) -> Any:
    """Indices of layers, moved to the last of fewer layers; their order and their number stay."""
    if isinstance(value, int):
        fits = [new for old, new in layers.items() if abs(value) <= old]
        return max(min(value, min(fits) - 1), -min(fits)) if fits and abs(value) >= min(fits) else value
    flat = [v for v in value if isinstance(v, int)]
    fits = [new for old, new in layers.items() if flat and max(map(abs, flat)) <= old]
    if not fits or len(flat) != len(value) or max(map(abs, flat)) < min(fits) + first:
        return value
    count = min(fits)
    if min(flat) < 0:
        return type(value)(dict.fromkeys(max(v, -count) for v in flat))
    ranks = {v: k for k, v in enumerate(sorted(set(flat))[-count:])}
    start = count - len(ranks) + first
    return type(value)(start + ranks[v] for v in flat if v in ranks)


def _narrow(value: int, divisor: int) -> int:
    return value // divisor if value >= 32 and value % divisor == 0 else value


def _rope(value: dict[str, Any], scale: Scale) -> dict[str, Any]:
    """Rotary parameters whose sections still add up to what they did, divided."""
    small = dict(value)
    for key, part in value.items():
        if isinstance(part, dict):
            small[key] = _rope(part, scale)
        elif key.endswith("section") and isinstance(part, (list, tuple)):
            sections = [v // scale.width for v in part]
            sections[0] += sum(part) // scale.width - sum(sections)
            small[key] = sections
    return small


def _each(value: Any, smaller: Callable[[int], int]) -> Any:
    """`smaller` of a number, or of every number in nested lists."""
    if isinstance(value, (list, tuple)):
        return type(value)(_each(v, smaller) for v in value)
    return smaller(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _numbers(value: Any) -> list[int]:
    if isinstance(value, (list, tuple)):
        return [n for v in value for n in _numbers(v)]
    return [value] if isinstance(value, int) and not isinstance(value, bool) else []


def _parts(config: Any) -> list[Any]:
    nested = [v for v in _values(config).values() if hasattr(v, "to_dict") and hasattr(v, "model_type")]
    return [config, *(part for value in nested for part in _parts(value))]


def _values(config: Any) -> dict[str, Any]:
    """The fields that a configuration class declares itself, with what they hold."""
    from transformers import PreTrainedConfig

    common = {f.name for f in fields(PreTrainedConfig)}
    own = vars(config)
    return {f.name: own[f.name] for f in fields(config) if f.name not in common and f.name in own}


def _usual(kind: type, config: Any) -> Any:
    try:
        return kind()
    except Exception:  # a few have no defaults of their own
        return config
