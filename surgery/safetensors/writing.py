"""Writes safetensors files whose tensors begin at multiples of 64 bytes, as `surgery.util.alignment` wants them.

A safetensors header may be padded with spaces, and tensors follow one another without holes: so the header is padded to
64 bytes, tensors whose size is a multiple of 64 come first, and all of them begin at one. What still does not is copied
when it is read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surgery.errors import OutputError
from surgery.handles.handle import Handle, read
from surgery.safetensors.dtypes import check_dtypes, known_dtypes
from surgery.safetensors.header import parse_header
from surgery.safetensors.reading import tensors_in_file
from surgery.util.alignment import ALIGNMENT

MANY = 2**20  # bytes from which hashing is worth a thread

NOTES = "__metadata__"  # what the format calls the entry of a header that is no tensor

Entry = tuple[str, torch.dtype, tuple[int, ...]]
"""Name, dtype and shape of a tensor."""


def write_shards(
    folder: Path,
    stem: str,
    tensors: Mapping[str, Tensor],
    max_shard_size: int | str = "5GB",
    metadata: Mapping[str, str] | None = None,
    *,
    hashed: bool = False,
) -> dict[Path, str]:
    """Write `stem.safetensors`, or shards and `stem.safetensors.index.json` as the hub's libraries name them.

    Args:
        folder: made where it does not exist.
        stem: file name without its ending.
        tensors: by name; nothing is written where there is none.
        max_shard_size: bytes, or a text such as `"5GB"`.
        metadata: for each file's header.
        hashed: whether hashes are taken.

    Returns:
        the SHA-256 of each file of tensors, taken while it was written; nothing where they are not taken.

    Raises:
        OutputError: naming all tensors of dtypes that the format does not know, or one that has a name of the format's.
    """
    from huggingface_hub import split_state_dict_into_shards_factory

    if not tensors:
        return {}
    check_dtypes({name: tensor.dtype for name, tensor in tensors.items()})
    if NOTES in tensors:
        raise OutputError(
            f"A tensor of a safetensors file cannot be called {NOTES}, which is where these files keep their notes, "
            f"but one of {folder.name} is: give that parameter or buffer another name."
        )
    folder.mkdir(parents=True, exist_ok=True)
    split = split_state_dict_into_shards_factory(
        {name: tensors[name] for name in sorted(tensors)},
        get_storage_size=lambda tensor: tensor.nbytes,  # a file that is mapped is one storage of many tensors
        filename_pattern=f"{stem}{{suffix}}.safetensors",
        max_shard_size=max_shard_size,
    )
    hashes: dict[Path, str] = {}
    for file, names in split.filename_to_tensors.items():
        digest = hashlib.sha256() if hashed else None
        write_aligned(folder / file, {name: tensors[name] for name in names}, metadata, digest)
        if digest is not None:
            hashes[folder / file] = digest.hexdigest()
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / f"{stem}.safetensors.index.json").write_text(
            json.dumps(index, sort_keys=True, separators=(",", ":"))
        )
    return hashes


def write_aligned(
    path: Path,
    tensors: Mapping[str, Tensor | Handle],
    metadata: Mapping[str, str] | None = None,
    digest: Any = None,
) -> None:
    """Write a safetensors file whose tensors begin at multiples of 64 bytes, as far as their sizes allow.

    Args:
        path: of the file.
        tensors: by name, of dtypes that the format knows; handles are read one after another.
        metadata: for the header.
        digest: of `hashlib`, which is given what is written, that of large tensors in a thread meanwhile.
    """
    entries = [(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()]
    header, order = _layout(entries, metadata)
    with path.open("wb") as file, ThreadPoolExecutor(1) as beside:  # whose thread begins when it has work

        def write(data: Any) -> None:
            if digest is None or len(data) < MANY:
                file.write(data)
                return digest.update(data) if digest is not None else None
            hashing = beside.submit(digest.update, data)
            file.write(data)
            hashing.result()
            return None

        write(len(header).to_bytes(8, "little") + header)
        for name in order:
            tensor = read(tensors[name])
            if tensor.numel():
                whole = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
                write(whole.reshape(-1).view(torch.uint8).numpy().data)


def aligned_file_bytes(entries: Iterable[Entry]) -> int:
    """Size of the file that `write_aligned` makes of tensors of these names, dtypes and shapes.

    Example:
        >>> aligned_file_bytes([("a", torch.float32, (3, 5)), ("b", torch.bfloat16, (2,))])
        192
    """
    entries = list(entries)
    return 8 + len(_layout(entries, None)[0]) + sum(_size(dtype, shape) for _, dtype, shape in entries)


def align_file(path: Path) -> None:
    """Write a safetensors file of somebody else anew where tensors that could be aligned are not.

    Args:
        path: of the file; it is replaced, its metadata are kept.
    """
    tensors = tensors_in_file(path)
    if all(t.begin % ALIGNMENT == 0 for t in tensors.values() if t.nbytes % ALIGNMENT == 0):
        return
    beside = path.with_name(f".{path.name}.aligned")
    write_aligned(beside, tensors, parse_header(path).metadata)
    beside.chmod(path.stat().st_mode)
    beside.replace(path)


def _layout(entries: Iterable[Entry], metadata: Mapping[str, str] | None) -> tuple[bytes, list[str]]:
    """The header, padded so that data begin at a multiple of 64 bytes, and the order of the tensors."""
    names, ordered = known_dtypes(), in_order(entries)
    document: dict[str, object] = {NOTES: dict(metadata)} if metadata else {}
    end = 0
    for name, dtype, shape in ordered:
        start, end = end, end + _size(dtype, shape)
        document[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [start, end]}
    header = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
    return header + b" " * (-(8 + len(header)) % ALIGNMENT), [name for name, *_ in ordered]


def in_order(entries: Iterable[Entry]) -> list[Entry]:
    """Tensors as a file has them: after those that keep the alignment come those that do not, of the widest elements
    first, so that each begins at least at a multiple of its own."""
    return sorted(entries, key=lambda e: (_size(e[1], e[2]) % ALIGNMENT != 0, -e[1].itemsize, e[0]))


def _size(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return dtype.itemsize * torch.Size(shape).numel()
