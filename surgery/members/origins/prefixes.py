"""Prefixes: what wrappers put before every name of a state dict, found by what is left fitting.

`DataParallel` writes `module.`, `torch.compile` `_orig_mod.`, peft `base_model.model.`, and a model with a head
`model.` before the names of the model inside.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Collection, Mapping
from typing import TypeVar

from surgery.errors import SurgeryWarning

WRAPPERS = ("module.", "_orig_mod.", "base_model.model.", "model.")
_DEEPEST = 3
_T = TypeVar("_T")


def find_prefix(names: Collection[str], wanted: Collection[str]) -> str:
    """The wrappers' prefix without which names are those of a module; empty where there is none.

    Args:
        names: in a file.
        wanted: in the module's state dict.

    Example:
        >>> find_prefix(["module.model.a.weight", "module.model.b.weight"], ["a.weight", "b.weight"])
        'module.model.'
    """
    names, wanted = list(names), set(wanted)
    if not names or not wanted or wanted & set(names):
        return ""
    for depth in range(1, _DEEPEST + 1):
        for parts in itertools.product(WRAPPERS, repeat=depth):
            prefix = "".join(parts)
            if all(name.startswith(prefix) for name in names):
                left = {name.removeprefix(prefix) for name in names}
                if len(left & wanted) * 2 > len(wanted):
                    return prefix
    return ""


def without_prefix(state: Mapping[str, _T], wanted: Collection[str], what: str) -> dict[str, _T]:
    """The same values under a module's own names; a wrapper's prefix that is left out is said in a warning.

    Args:
        state: by the names in a file.
        wanted: the names of the module's state dict.
        what: the file, for the warning.
    """
    if not (prefix := find_prefix(state.keys(), wanted)):
        return dict(state)
    warnings.warn(said(what, prefix), SurgeryWarning, stacklevel=3)
    return strip_prefix(state, prefix)


def said(what: str, prefix: str) -> str:
    """The sentence that says what was left out."""
    return f"{what}: every name begins with '{prefix}', which a wrapper put there; it was left out"


def strip_prefix(state: Mapping[str, _T], prefix: str) -> dict[str, _T]:
    """The same values under names without the prefix."""
    return {name.removeprefix(prefix): value for name, value in state.items()}
