"""How a transformers model is loaded besides its class: its attention, and names that a wrapper changed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from surgery.errors import LoadError
from surgery.members.origins.dtypes import stored_dtypes
from surgery.members.origins.empty import build_empty
from surgery.members.origins.prefixes import WRAPPERS, find_prefix

ATTENTION = ("eager", "sdpa", "flex_attention")
"""Implementations that are part of PyTorch; others would be fetched as compiled code."""


def attention_of(options: Mapping[str, Any], reference: str) -> dict[str, Any]:
    """The `attn_implementation` among options, for `from_pretrained`; nothing where the class shall choose.

    Raises:
        LoadError: for one that is not PyTorch's own.

    Example:
        >>> attention_of({"attn_implementation": "eager", "dtype": "float32"}, "bert")
        {'attn_implementation': 'eager'}
    """
    wanted = options.get("attn_implementation")
    if wanted is None:
        return {}
    if wanted not in ATTENTION:
        raise LoadError(
            f"attn_implementation of '{reference}' must be one of {', '.join(ATTENTION)}, found '{wanted}'"
        )
    return {"attn_implementation": wanted}


def attention_in_use(module: Any) -> dict[str, Any]:
    """The option for a live model whose attention is not the one that its class chooses by itself."""
    used = module.config._attn_implementation
    try:
        usual = module.get_correct_attn_implementation(None)
    except (ValueError, ImportError):
        usual = "eager"
    return {"attn_implementation": used} if used in ATTENTION and used != usual else {}


def wrappers_prefix(kind: Any, config: Any, folder: Path) -> str:
    """What a wrapper put before every name in a folder's weights; empty where there is nothing."""
    names = stored_dtypes(folder).keys()
    if not names or not any(all(name.startswith(wrapper) for name in names) for wrapper in WRAPPERS):
        return ""
    own = build_empty(lambda: kind._from_config(deepcopy(config))).state_dict().keys()
    inner = kind.base_model_prefix
    return find_prefix(names, own) or find_prefix(names, [f"{inner}.{name}" for name in own])


def renaming(prefix: str) -> dict[str, Any]:
    """The argument that makes `from_pretrained` leave a prefix out."""
    return {"key_mapping": {_pattern(prefix): ""}} if prefix else {}


def forget_renaming(module: Any, prefix: str) -> None:
    """Let a model not put the prefix back when it is saved."""
    known = getattr(module, "_weight_conversions", None)
    if prefix and known:
        module._weight_conversions = [each for each in known if _pattern(prefix) not in each.source_patterns]


def _pattern(prefix: str) -> str:
    return f"^{re.escape(prefix)}"
