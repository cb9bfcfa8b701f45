"""Dtypes of transformers folders: what a model's tensors have in the file, whatever names and shapes they have there.

While it loads, transformers renames, merges and splits tensors, and casts all of them to one dtype. So the folder is
loaded in a dtype that holds every value, and each tensor is given the file's dtype afterwards. Where a file holds
several dtypes, which tensor came from which is found out by loading tags: the file's tensors with a number for each
dtype as their only value.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from surgery.errors import LoadError
from surgery.members.origins.dtypes import lossless, put_dtypes, refuse_other_kinds, stored_dtypes, widest
from surgery.members.origins.prefixes import strip_prefix
from surgery.util.quiet import quiet
from surgery.util.text import shorten


@dataclass(frozen=True)
class FileDtypes:
    """The dtypes that a folder's files say.

    Attributes:
        common: the narrowest dtype that holds all values that the model takes from them, None where nothing is known.
        tensors: by the model's own names, where the file holds tensors of several dtypes.
    """

    common: torch.dtype | None = None
    tensors: Mapping[str, torch.dtype] = field(default_factory=dict)

    @classmethod
    def of(cls, kind: Any, config: Any, folder: Path, prefix: str = "") -> FileDtypes:
        """Read the headers of a folder's weights for a model of class `kind`; `prefix` is none of the names' own.

        Raises:
            LoadError: where integers or complex values stand for floating-point weights.
        """
        if getattr(config, "quantization_config", None) is not None:
            return cls()  # what is stored are codes, and their library says what they mean
        stored = strip_prefix(stored_dtypes(folder), prefix)
        dtypes = {dtype for dtype, _ in stored.values()}
        floating = [dtype for dtype in dtypes if dtype.is_floating_point]
        plain = dtypes <= {*floating, torch.int64, torch.bool}  # counters and masks
        if len(floating) == 1 and floating[0].itemsize > 1 and plain:
            return cls(floating[0])
        tensors, own = _by_tag(kind, config, stored)
        refuse_other_kinds(f"{folder} as weights of {kind.__name__}", tensors, own)
        return cls(widest(tensors.values()), tensors)

    def put(self, module: nn.Module, what: str) -> None:
        """Give a model that was loaded in the common dtype the file's, tensor by tensor.

        Raises:
            LoadError: where its class holds a tensor in a dtype that does not hold the file's values.
        """
        state = {name: t for name, t in module.state_dict().items() if isinstance(t, Tensor)}
        floating = {name: t.dtype for name, t in state.items() if t.is_floating_point()}
        common = self.common
        if common is None:
            return
        if lost := [
            f"{name} ({dtype})"
            for name, dtype in floating.items()
            if not lossless(self.tensors.get(name, common), dtype)
        ]:
            raise LoadError(
                f"{what}: {type(module).__name__} holds {shorten(lost)} in a narrower dtype than the file; load it "
                "with transformers and pass the module"
            )
        put_dtypes(module, self.tensors)


def decoded_float8(config: Any, folder: Path, module: nn.Module) -> str | None:
    """A sentence where a quantised folder's float8 tensors became others while transformers loaded them."""
    if getattr(config, "quantization_config", None) is None or not folder.is_dir():
        return None
    small = {n: dtype for n, (dtype, _) in stored_dtypes(folder).items() if dtype.itemsize == 1}
    small = {name: dtype for name, dtype in small.items() if dtype.is_floating_point}
    state = [t for t in module.state_dict().values() if isinstance(t, Tensor) and t.is_floating_point()]
    if not small or any(tensor.dtype.itemsize == 1 for tensor in state):
        return None
    names = " and ".join(sorted({str(dtype).removeprefix("torch.") for dtype in small.values()}))
    held = str(widest(tensor.dtype for tensor in state)).removeprefix("torch.")
    return (
        f"{len(small)} tensors are stored as {names} with scales ({shorten(small, 3)}); transformers multiplied them "
        f"out, and they are held as {held}"
    )


def _by_tag(
    kind: Any, config: Any, stored: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
) -> tuple[dict[str, torch.dtype], dict[str, Tensor]]:
    """The dtype of each tensor of a model by its sources in the file, the widest of several; and the model's own."""
    known = list(dict.fromkeys(dtype for dtype, _ in stored.values()))
    tags = {
        name: torch.tensor(float(known.index(dtype) + 1)).expand(shape)
        for name, (dtype, shape) in stored.items()
    }
    with quiet():
        module, info = kind.from_pretrained(
            None,
            config=deepcopy(config),
            state_dict=tags,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    skipped = {*info["missing_keys"], *(each[0] for each in info["mismatched_keys"])}
    own = {name: t for name, t in module.state_dict().items() if isinstance(t, Tensor)}
    found: dict[str, torch.dtype] = {}
    for name, tensor in own.items():
        numbers = set() if name in skipped else _numbers(tensor)
        if numbers and numbers <= set(range(1, len(known) + 1)):
            dtypes = [known[number - 1] for number in sorted(numbers)]
            merged = widest(dtypes)
            found[name] = dtypes[0] if len(dtypes) == 1 or merged is None else merged
    return found, own


def _numbers(tensor: Tensor) -> set[int]:
    """The distinct values of a tensor of tags; nothing where it is none."""
    if not tensor.numel():
        return set()
    one = not any(step for step, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1)
    values = tensor.flatten()[:1] if one else tensor.unique()
    return {int(value) for value in values.tolist() if not isinstance(value, complex) and value == int(value)}
