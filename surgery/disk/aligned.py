"""Aligned tensors: in memory, and in safetensors files, whose data begin at multiples of 64 bytes.

PyTorch allocates at multiples of 64 bytes, and vectorised kernels may sum in another order where a tensor begins
elsewhere, so that one weight in two places gives outputs that differ in their last bit. Tensors that are mapped from a
file lie where the file has them. A safetensors header may be padded with spaces, and tensors follow one another without
holes: so the header is padded to 64 bytes, tensors whose size is a multiple of 64 come first, and all of them begin at
one. What still does not is copied when it is read; so is what lies unaligned in files of others.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from surgery.disk.aside import put_aside
from surgery.disk.mapped import places_of
from surgery.disk.tensorheader import parse_header
from surgery.errors import OutputError, shorten
from surgery.storage.lazy import Handle, file_dtypes, read, tensors_in_file

ALIGNMENT = 64  # bytes; PyTorch's own on the CPU, and the width of its widest vectors

MUCH = 128 * 2**20  # bytes of mapped tensors that are not copied for their alignment before they have to run

MANY = 2**20  # bytes from which hashing is worth a thread

NOTES = "__metadata__"  # what the format calls the entry of a header that is no tensor

Entry = tuple[str, torch.dtype, tuple[int, ...]]
"""Name, dtype and shape of a tensor."""


def align(tensor: Tensor) -> Tensor:
    """The tensor itself where it begins at a multiple of 64 bytes, else a copy that does.

    Example:
        >>> row = torch.zeros(3, 5)[1]
        >>> row.data_ptr() % 64, align(row).data_ptr() % 64
        (20, 0)
    """
    return tensor if is_aligned(tensor) else tensor.clone()


def is_aligned(tensor: Tensor) -> bool:
    """Whether a tensor begins at a multiple of 64 bytes; one that is not in the CPU's memory counts as such."""
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and tensor.numel() > 0
    return not plain or tensor.data_ptr() % ALIGNMENT == 0


@torch.no_grad()
def align_module(module: nn.Module, *, to_run: bool = False) -> nn.Module:
    """Move parameters and buffers that begin elsewhere to multiples of 64 bytes, in place; ties are kept.

    Where that would copy `MUCH` or more of a model that is mapped from files, these tensors stay until the module runs.

    Args:
        module: of any kind.
        to_run: whether it is about to run.
    """
    moved: dict[tuple, Tensor] = {}
    plain = (
        t for t in (*module.parameters(), *module.buffers()) if type(t) in (Tensor, nn.Parameter, nn.Buffer)
    )
    apart = [tensor for tensor in plain if not is_aligned(tensor)]
    if not to_run and sum(tensor.nbytes for tensor in apart) >= MUCH and (stay := places_of(apart)):
        apart = [tensor for tensor in apart if id(tensor) not in stay]
        if _ALIGN_FIRST not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_ALIGN_FIRST)
    for tensor in apart:
        if not is_aligned(tensor):
            place = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
            if place not in moved:
                moved[place] = put_aside(tensor.detach().clone())
            tensor.data = moved[place]
    return module


class _AlignFirst:
    """Hook before a module runs: moves what is not aligned yet."""

    def __call__(self, module: nn.Module, *args: object) -> None:
        """Align what a call is about to read; not while the module is traced, where nothing is read."""
        if not torch.compiler.is_compiling() and not torch._C._len_torch_function_stack():
            align_module(module, to_run=True)

    def __deepcopy__(self, memo: dict) -> _AlignFirst:
        return self


_ALIGN_FIRST = _AlignFirst()


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


def check_dtypes(dtypes: Mapping[str, torch.dtype]) -> None:
    """Refuse what a file cannot hold.

    Raises:
        OutputError: naming all tensors of dtypes that the format does not know.
    """
    known = known_dtypes()
    if bad := [f"{name} ({str(dtype)[6:]})" for name, dtype in dtypes.items() if dtype not in known]:
        raise OutputError(
            "Every tensor must have a dtype that safetensors files hold, but this is not so of "
            f"{shorten(bad, 10)}; convert these first, such as complex128 to complex64 or to two real tensors."
        )


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


def known_dtypes() -> dict[torch.dtype, str]:
    """safetensors' names of the dtypes that its files can hold."""
    return {dtype: name for name, dtype in file_dtypes().items()}


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
