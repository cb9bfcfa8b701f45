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

from benchmarks.coverage.shrink_layers import INDICES, earlier, fewer, is_count, is_per_layer, pointers

_WIDTH = re.compile(
    r"(.*_)?(hidden|embed|emb|embedding|embeddings|intermediate|inner|ffn|feedforward|dim|dims|dimension|width|"
    r"channels?|proj|projection|project|units|rank|filters|latent|chans|embd|feats)(_.*)?|d_(model|ff|kv|head|inner|latents)|"
    r"hidden_sizes?(_.*)?|dff|(fpn|mask)_feature_size|upsample_groups|n_inner|flow_size|feed_forward_size|"
    r"visual_feat_dim|upsample_initial_channel|(.*_)?channel_list|(.*_)?encoder_sizes|adapter_input_size|kv_channels"
)
_NO_WIDTH = re.compile(
    r"(.*_)?(num_(?!filters|pos_feats|channels)|n_(?!embd|inner)|layers?|heads|kernel|strides?|dilations?|position|"
    r"positions|vocab|dropout|ratios?|token|ids?|indices|index|max|min|types?|mel|factor|mult|multiple|state|bins|"
    r"length|blocks?|patch|config|every|std|prob)(_.*)?"
)
_KEPT_WIDTH = re.compile(
    r"hidden_size_per_layer_input|patch_embeds_hidden_size|index_head_dim|num_filters|num_pos_feats"
)
_DEPTHS = re.compile(
    r"depths?|layers|(.*_)?(block_repeats|num_blocks|blocks_per_stage|numb_of_layers|block_sizes|attn_blocks)"
)
_EXPERTS = re.compile(r"(.*_)?(num|n)_(local_|routed_)?experts")
_HEADS = re.compile(r"(.*_)?(num_heads|attention_heads|key_value_heads|n_heads?|num_attention_heads)")
_HEAD_WIDTH = re.compile(r"(.*_)?(head_dim|d_head|d_kv|kv_channels|head_size)|rotary_dim")
_TOP_EXPERTS = re.compile(
    r"(.*_)?(experts_per_tok|moe_k|moe_topk|moe_top_k|top_k_experts|num_selected_experts)"
)
_VOCABULARY = re.compile(r"(.*_)?vocab_size(_per_layer_input)?|unpadded_vocab_size|(.*_)?group_vocab")
_TOKENS = re.compile(r".*(token_id|token_index|token_ids|suppress_tokens)|(bos|eos|pad|sep|cls|mask)_id")
_PLACEHOLDER = re.compile("(image|video)_token_(id|index)")
_SIDES = re.compile(
    r"(image|img|crop|pretrain_image|max_img|spec)_size|(.*_)?(feature_sizes|feat_sizes|rope_k_sizes)|"
    r"pos_emb_(height|width)"
)
_PICTURE_TOKENS = re.compile(r"image_seq_length|mm_tokens_per_image|video_seq_length|num_image_tokens")


@dataclass(frozen=True)
class Scale:
    """How much smaller.

    Attributes:
        width: what widths are divided by.
        layers: at most so many of a kind, more where kinds differ.
        vocabulary: at most so many tokens.
        picture: largest side of a picture.
        heads: whether it is the number of heads that becomes smaller, and not their width.
    """

    width: int
    layers: int = 2
    vocabulary: int = 512
    picture: int = 256
    heads: bool = False


@dataclass
class _Family:
    """What the nested configurations of one model share."""

    scale: Scale
    side: int  # what sides of pictures are divided by
    layers: dict[int, int]  # for each count of layers anywhere in the family, the smaller one
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
        if _is_side(name, value)
        for side in _numbers(value)
    ]
    divisor = 1
    while (
        sides
        and max(sides) // divisor > scale.picture
        and all(side % (2 * divisor) == 0 for side in sides if side > 64)
    ):
        divisor *= 2
    layers: dict[int, int] = {}
    for part in _parts(config):
        layers.update(fewer(part, _values(part), scale.layers))
    return _shrink(config, _Family(scale, divisor, layers))


def _shrink(config: Any, family: _Family) -> Any:
    kind = type(config)
    values = _values(config)
    usual, declared = _values(_usual(kind, config)), {f.name: f.default for f in fields(kind)}
    layers = fewer(config, values, family.scale.layers)
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
        elif name == "model_args" and values.get("architecture"):
            changed[name] = {**(value or {}), **_smaller_timm(values["architecture"])}
        elif name.startswith("_"):
            continue
        elif (small != value and not (derived and isinstance(value, int) and not is_count(name, value))) or (
            not derived and usual.get(name) != value
        ):
            changed[name] = small
    more = {k: v for k, v in vars(config).items() if k[0] != "_" and k not in values and not _common(k)}
    extra = {k: v for k, v in more.items() if vars(_usual(kind, config)).get(k) != v}
    small = kind(**changed, **{k: _rule(k, v, values, layers, family) for k, v in extra.items()})
    _add_sections(small)
    return small


def _add_sections(config: Any) -> None:
    """Sections of rotary positions that fit the width of a head, where a class would take its large default."""
    rope = getattr(config, "rope_parameters", None)
    if "mrope_section" not in getattr(config, "ignore_keys_at_rope_validation", ()) or not isinstance(
        rope, dict
    ):
        return
    if "mrope_section" not in rope and getattr(config, "num_attention_heads", None):
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        half = int(width * rope.get("partial_rotary_factor", 1.0)) // 2
        side = 3 * half // 8
        rope["mrope_section"] = [side, side, half - 2 * side]  # Ernie needs two equal ones in front


def _smaller_timm(architecture: str) -> dict[str, Any]:
    """An argument that makes one of timm's models smaller and leaves the width of what comes out of it."""
    import timm
    import torch

    def size(**arguments: Any) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in timm.create_model(architecture, **arguments).parameters())

    whole = size()
    for arguments in ({"depth": 2}, {"channel_multiplier": 0.25}):
        try:
            if size(**arguments) < whole / 2:
                return arguments
        except Exception:  # not an argument of this architecture
            continue
    return {}


def _rule(name: str, value: Any, values: dict[str, Any], layers: dict[int, int], family: _Family) -> Any:
    """The smaller value of one field."""
    scale = family.scale
    if value is None:
        return _unset(name, family)
    if isinstance(value, (bool, str, float)):
        return value
    if isinstance(value, dict):
        return _rope(value, scale) if name.startswith("rope") and not scale.heads else value
    if name == "_out_indices":
        return earlier(value, layers, value or [], 1)
    if INDICES.fullmatch(name):
        own = earlier(value, layers, pointers(values))
        return earlier(value, family.layers, pointers(values)) if own == value else own
    if is_per_layer(value, layers):
        value = type(value)(value[: layers[len(value)]])
    if is_count(name, value) and value in layers:
        return layers[value]
    if name == "attention_types":  # each with how often it is repeated
        old, new = next(iter(layers.items()), (1, 1))
        return _each(value, lambda v: max(1, v * new // old))
    if _is_side(name, value):
        return _each(value, lambda v: v // family.side if v > 0 else v)
    for pattern, smaller in _simple(family):
        if pattern.fullmatch(name):
            return _each(value, smaller)
    if _VOCABULARY.fullmatch(name):
        return _each(value, lambda v: min(v, scale.vocabulary))
    if _DEPTHS.fullmatch(name) and isinstance(value, (list, tuple)):
        return _each(value, lambda v: min(v, scale.layers))
    if scale.heads and (counted := _HEADS.fullmatch(name) or _HEAD_WIDTH.fullmatch(name)):
        return _each(value, lambda v: max(1, v // scale.width)) if counted.re is _HEADS else value
    wide = _KEPT_WIDTH.fullmatch(name) or (_WIDTH.fullmatch(name) and not _NO_WIDTH.fullmatch(name))
    return _each(value, lambda v: _narrow(v, scale.width)) if wide else value


def _unset(name: str, family: _Family) -> int | None:
    """A value for what the defaults leave open and every published checkpoint sets."""
    if _PLACEHOLDER.fullmatch(name):
        return family.token(1 << 40)
    return 2 if _TOP_EXPERTS.fullmatch(name) else None


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
        (_PICTURE_TOKENS, lambda v: max(1, v // family.side**2)),
    ]


def _is_side(name: str, value: Any) -> bool:
    """Whether a field holds sides of pictures; of patches too where they are as large as pictures."""
    return bool(_SIDES.fullmatch(name)) or (name == "patch_size" and isinstance(value, int) and value >= 128)


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
    own = vars(config)
    names = [f.name for f in fields(config) if not _common(f.name)]
    return {name: own[name] for name in dict.fromkeys([*names, "_out_indices"]) if name in own}


def _common(name: str) -> bool:
    """Whether every configuration has a field."""
    from transformers import PreTrainedConfig

    return name in {f.name for f in fields(PreTrainedConfig)}


def _usual(kind: type, config: Any) -> Any:
    try:
        return kind()
    except Exception:  # a few have no defaults of their own
        return config
