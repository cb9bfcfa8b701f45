"""One file per kind of origin: how a reference becomes a module, and how that is built again and saved.

A new kind of reference is one new file and one line in `KINDS`. Every file offers the same four functions

- `claims(reference) -> bool`: whether this kind reads that reference;
- `load(reference, request) -> Loaded`: module, origin, small files and, where known, example inputs;
- `build(origin, files, request) -> nn.Module`: the architecture again, without weights;
- `save_plain(module, origin, files, directory)`: a folder that works without this package;

where something can be found wrong without loading anything, `check(reference)`; where a live module can be
recognised, `adopt(module) -> Loaded | None`; and where it does not say with which dtypes it was built,
`take_dtypes(module, dtypes)`, for what is in no state dict.
"""

from __future__ import annotations

import importlib
from typing import Any

from surgery.errors import LoadError
from surgery.members.origins.base import said_of_file

KINDS = {
    "module": "surgery.members.origins.module",
    "factory": "surgery.members.origins.factory",
    "timm": "surgery.members.origins.timm",
    "transformers": "surgery.members.origins.transformers",
}
"""Kinds in the order in which they are asked whether a reference is theirs."""


def origin_kind(kind: str) -> Any:
    """The file of one kind of origin.

    Raises:
        LoadError: where no such kind is registered.
    """
    if kind not in KINDS:
        raise LoadError(f"the origin's kind must be one of {', '.join(KINDS)}, not '{kind}'")
    return importlib.import_module(KINDS[kind])


def kind_for(reference: str) -> Any:
    """The file of the first kind that claims `reference`; the last kind, a hub id, is asked last."""
    for kind in KINDS:
        handler = origin_kind(kind)
        if handler.claims(reference):
            return handler
    if said := said_of_file(reference.partition("?")[0]):
        raise LoadError(said)
    raise LoadError(
        f"'{reference}' is no reference, or its folder does not exist: give a transformers folder, a hub id "
        "org/name[@revision], timm:NAME, timm:NAME=weights.safetensors, a timm folder, or "
        "path/module.py:factory"
    )
