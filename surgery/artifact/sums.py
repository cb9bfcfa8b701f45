"""Sums of a checkpoint's tensors: what tells a file from the one that was written, wherever values are read anyway.

A loader that decodes codes cannot see that two of them were exchanged, or that one was changed on the way. A sum of
four bytes for each tensor can; it takes a small part of the time of decoding. It is no seal against whoever means to
deceive: that is what hashes of whole files are for (`surgery.artifact.verify`).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surgery.disk.files import sha256_of
from surgery.disk.untrusted import is_regular

try:
    from isal.isal_zlib import crc32  # many times as fast
except ImportError:  # no wheel for this platform
    from zlib import crc32

Sum = tuple[str, tuple[int, ...], int]
"""A tensor's dtype, shape and CRC-32."""


def sum_of(tensor: Tensor) -> Sum:
    """What is kept of a tensor of the CPU.

    Example:
        >>> sum_of(torch.zeros(2))
        ('float32', (2,), 1696784233)
    """
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b""
    return str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), crc32(flat)


def as_entry(sums: Mapping[str, Sum]) -> dict[str, str]:
    """Sums as a document has them: one digest of all names, dtypes and shapes, and the CRCs by sorted names."""
    forms = [[name, dtype, list(shape)] for name, (dtype, shape, _) in sorted(sums.items())]
    digest = hashlib.blake2b(json.dumps(forms).encode(), digest_size=16).hexdigest()
    return {"names": digest, "values": "".join(f"{sums[name][2]:08x}" for name in sorted(sums))}


def hashes_beside(files: Mapping[str, bytes]) -> dict[str, str]:
    """SHA-256 of what other modules of a member are made of, such as pooling and dense layers behind it.

    Tokenizers, prompts and lengths are not among them: these are settings, which people change.

    Args:
        files: that come along, by path.

    Example:
        >>> [*hashes_beside({"modules.json": b"[]", "1_Pooling/config.json": b"{}", "tokenizer.json": b"{}"})]
        ['1_Pooling/config.json', 'modules.json']
    """
    return {
        name: hashlib.sha256(files[name]).hexdigest() for name in sorted(files) if _BESIDE.fullmatch(name)
    }


_MODULES = "modules.json"
# The list of modules, and what lies below the checkpoint's folder.
_BESIDE = re.compile(r"modules\.json|(?:(?!\.+/)[^/\x00]+/)+[^/\x00]+\.(?:safetensors|json)")


def wrong_beside(entry: Any, folder: Path) -> list[str]:
    """Which of these files are not as they were written, in words.

    One that is not there its own module asks for; but without the list of modules others are made up, so that must be
    there, except in the cache of the hub's client, where only what was asked for is.

    Args:
        entry: as `hashes_beside` made it, or somebody else.
        folder: of the checkpoint.
    """
    if not isinstance(entry, Mapping) or not all(_BESIDE.fullmatch(str(name)) for name in entry):
        return ["it has no hashes of files beside that can be read"]
    there = {name: folder / name for name in entry if (folder / name).exists()}
    lost = _MODULES in entry and _MODULES not in there and folder.absolute().parent.name != "snapshots"
    return [f"there is no {_MODULES}"] * lost + [
        f"{name} is another file than was written"
        for name, file in there.items()
        if not is_regular(file) or sha256_of(file) != entry[name]
    ]


def wrong_sums(entry: Any, sums: Mapping[str, Sum]) -> list[str]:
    """What is not as it was written, in words.

    Args:
        entry: as `as_entry` made it, or somebody else.
        sums: of the tensors that there are.
    """
    now = as_entry(sums)
    if not isinstance(entry, Mapping) or {*entry} != {*now} or not isinstance(entry["values"], str):
        return ["it has no sums that can be read"]
    if entry["names"] != now["names"] or len(entry["values"]) != len(now["values"]):
        return ["it holds other tensors than were written"]
    then = [entry["values"][at : at + 8] for at in range(0, len(entry["values"]), 8)]
    return [
        f"{name} holds other values than were written"
        for name, value in zip(sorted(sums), then, strict=True)
        if value != f"{sums[name][2]:08x}"
    ]
