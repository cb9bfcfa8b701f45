"""Safetensors files: write named tensors, sharded where large, and read them back with every header checked.

The header is read here before the file is handed to safetensors, so that a damaged file is named with what
it should hold and what it does.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from surgery.errors import ArtifactError
from surgery.tensorheader import Header, parse_header
from surgery.untrusted import UnreadableError, shown_text


def write_tensors(folder: Path, stem: str, tensors: Mapping[str, Tensor], max_shard_size: int | str) -> None:
    """Write `stem.safetensors`, or shards and `stem.safetensors.index.json` as the hub's libraries name them.

    Args:
        folder: made where it does not exist.
        stem: file name without its ending.
        tensors: by name; nothing is written where there is none.
        max_shard_size: bytes, or a text such as `"5GB"`.
    """
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    if not tensors:
        return
    folder.mkdir(parents=True, exist_ok=True)
    ready = _separate({name: tensors[name] for name in sorted(tensors)})
    pattern = f"{stem}{{suffix}}.safetensors"
    split = split_torch_state_dict_into_shards(ready, filename_pattern=pattern, max_shard_size=max_shard_size)
    for file, names in split.filename_to_tensors.items():
        save_file({name: ready[name] for name in names}, str(folder / file))
        (folder / file).chmod(folder.stat().st_mode & 0o666)  # safetensors writes for the owner alone
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / f"{stem}.safetensors.index.json").write_text(
            json.dumps(index, sort_keys=True, separators=(",", ":"))
        )


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file, without reading any tensor.

    Raises:
        ArtifactError: where the file is shorter or longer than its header says, or the header makes no sense.
    """
    try:
        return parse_header(path)
    except UnreadableError as error:
        raise ArtifactError(f"{path} {error}; {_ADVICE}") from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, mapped from the disk and not copied.

    Raises:
        ArtifactError: where safetensors refuses the file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise ArtifactError(
            f"{path} must be a whole safetensors file, but reading it says "
            f"'{shown_text(' '.join(str(error).split()))}'; {_ADVICE}"
        ) from error


def plain_file_bytes(tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]]) -> int:
    """Size of the safetensors file that would hold tensors of these names, dtypes and shapes.

    Example:
        >>> from safetensors.torch import save
        >>> state = {"a": torch.zeros(3, 5), "b": torch.zeros(2, dtype=torch.bfloat16)}
        >>> plain_file_bytes((n, t.dtype, tuple(t.shape)) for n, t in state.items()) == len(save(state))
        True
    """
    entries, end = {}, 0
    for name, dtype, shape in sorted(tensors, key=lambda each: (-each[1].itemsize, each[0])):
        start, end = end, end + dtype.itemsize * torch.Size(shape).numel()
        entries[name] = {"dtype": _short(dtype), "shape": shape, "data_offsets": [start, end]}
    header = len(json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + header + -header % 8 + end


_ADVICE = "copy the artifact again, or write it anew"


def _short(dtype: torch.dtype) -> str:
    """safetensors' name of a dtype."""
    name = str(dtype).removeprefix("torch.")
    if name.startswith("float8_"):
        return (
            name.removesuffix("fn")
            .removesuffix("nu" if "e8m0" in name else "")
            .replace("float8", "F8")
            .upper()
        )
    letters = {"float": "F", "bfloat": "BF", "int": "I", "uint": "U", "complex": "C"}
    kind = name.rstrip("0123456789")
    return letters[kind] + name[len(kind) :] if kind in letters else name.upper()


def _separate(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, contiguous, no two in the same memory."""
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    end = 0
    for name in sorted(ready, key=lambda each: ready[each].data_ptr()):
        start, size = ready[name].data_ptr(), ready[name].nbytes
        if size and start < end:
            ready[name] = ready[name].clone()
        end = max(end, start + size)
    return ready
