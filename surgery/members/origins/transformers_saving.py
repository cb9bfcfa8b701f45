"""A folder that transformers reads without this package."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from surgery.disk.files import write_files
from surgery.members.member import Origin
from surgery.members.origins.dtypes import widest
from surgery.members.origins.layers import KEYS
from surgery.members.origins.weights import save_extra_state
from surgery.safetensors.writing import align_file
from surgery.util.memory import compact
from surgery.util.quiet import quiet


def save_plain(module: Any, origin: Origin, files: Mapping[str, bytes], directory: Path) -> None:
    """Write what `from_pretrained(directory)` reads, tokenizer and preprocessor files included."""
    with quiet():
        state = _untied(module)
        module.save_pretrained(
            directory, state_dict={n: t for n, t in state.items() if isinstance(t, torch.Tensor)}
        )
    save_extra_state(state, directory)
    for file in sorted(directory.glob("*.safetensors")):
        align_file(file)
    _state_what_is_written(module, files, directory / "config.json")
    write_files(files, directory, keep=("config.json",))


def _untied(module: nn.Module) -> dict[str, torch.Tensor]:
    """A state dict in which only names share a tensor that the class ties: of others transformers writes just one."""
    state: dict[str, torch.Tensor] = module.state_dict()
    declared: Mapping[str, str] = getattr(module, "all_tied_weights_keys", None) or {}
    tied = {*declared, *declared.values()}
    seen: set[int] = {t.untyped_storage().data_ptr() for name, t in state.items() if name in tied}
    for name, tensor in state.items():
        if isinstance(tensor, torch.Tensor) and name not in tied:
            pointer = tensor.untyped_storage().data_ptr()
            state[name] = tensor.clone() if pointer in seen else compact(tensor)
            seen.add(pointer)
    return state


def _state_what_is_written(module: nn.Module, files: Mapping[str, bytes], path: Path) -> None:
    """Have a configuration name what was written: a dtype that holds it, its layers, and quantisation only if any."""
    state = [t for t in module.state_dict().values() if isinstance(t, torch.Tensor)]
    before = json.loads(path.read_text(encoding="utf-8"))
    config = dict(before)
    layers = json.loads(files.get("config.json", b"{}"))
    config |= {key: layers[key] for key in (*KEYS, "layer_types") if key in layers and key in config}
    if (dtype := widest(tensor.dtype for tensor in state)) is not None:  # all tensors will be cast to it
        config["dtype"] = str(dtype).removeprefix("torch.")
    if all(tensor.dtype.itemsize > 1 or tensor.dtype == torch.bool for tensor in state):
        config.pop("quantization_config", None)
    if config != before:
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
