"""Dtypes: of the tensors in weight files, and how a module takes each of them over.

A configuration may name another dtype than its file holds, and a file may hold several: float32 norms beside bfloat16
matrices, float8 matrices beside both. The file decides, tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from surgery.disk.untrusted import DOCUMENT_BYTES, UnreadableError, is_regular, parse_json, read_regular
from surgery.errors import LoadError
from surgery.safetensors.header import misnamed
from surgery.util.text import one_line, shorten

_SINGLE = ("model.safetensors", "pytorch_model.bin")
_SAFETENSORS = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "C64": torch.complex64, "C128": torch.complex128,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "BOOL": torch.bool,
}  # fmt: skip


def stored_dtypes(folder: Path) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of every tensor in a folder's weight files, by its name there; no tensor is read.

    The files are the ones that transformers takes: safetensors before pickled ones, one file before shards.

    Raises:
        LoadError: naming dtypes that this torch does not have, or a file that holds more than tensors.
    """
    for single in _SINGLE:
        paths = [folder / single] if (folder / single).is_file() else _shards(folder / f"{single}.index.json")
        if paths:
            return {name: entry for path in paths for name, entry in file_entries(path).items()}
    return {}


def _shards(index: Path) -> list[Path]:
    try:
        document = parse_json(read_regular(index, DOCUMENT_BYTES), unique=False)
        files = document["weight_map"].values()
    except (UnreadableError, KeyError, TypeError, AttributeError):
        return []  # transformers says what is wrong with an index
    return [path for name in dict.fromkeys(files) if is_regular(path := index.parent / str(name))]


def not_tensors_alone(path: Path, error: Exception) -> LoadError:
    """What is said of a file of pickled weights that torch.load refuses."""
    if other := misnamed(path):
        return LoadError(f"{path} {other}")
    return LoadError(
        f"{path} must hold tensors alone, readable by torch.load(weights_only=True): {one_line(error)}; "
        "convert it to safetensors where you trust it"
    )


def file_entries(path: Path) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of every tensor in one file, by name; no tensor is read.

    Raises:
        LoadError: as `stored_dtypes`.
    """
    if path.suffix != ".safetensors":
        try:
            state = torch.load(path, map_location="meta", weights_only=True)
        except Exception as error:
            raise not_tensors_alone(path, error) from error
        tensors = state.items() if isinstance(state, Mapping) else ()
        return {name: (t.dtype, tuple(t.shape)) for name, t in tensors if isinstance(t, Tensor)}
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        found = {name: (str(each.get_dtype()), tuple(each.get_shape())) for name, each in slices.items()}
    if unknown := [f"{name} ({dtype})" for name, (dtype, _) in found.items() if dtype not in _SAFETENSORS]:
        raise LoadError(
            f"{path}: tensors must be of a dtype of torch, but {shorten(unknown)} are not: convert these first"
        )
    return {name: (_SAFETENSORS[dtype], shape) for name, (dtype, shape) in found.items()}


def widest(dtypes: Iterable[torch.dtype]) -> torch.dtype | None:
    """The narrowest floating dtype that holds every value of all the floating ones and computes; None without any.

    Example:
        >>> widest([torch.bfloat16, torch.float16]), widest([torch.float8_e4m3fn, torch.int8])
        (torch.float32, torch.bfloat16)
    """
    found: torch.dtype | None = None
    small = False
    for dtype in set(dtypes):
        if dtype.is_floating_point and dtype.itemsize == 1:
            small = True  # every float8 value is a bfloat16 and, but for bare exponents, a float16 one
        elif dtype.is_floating_point:
            found = dtype if found is None else torch.promote_types(found, dtype)
    if small and (found is None or (found == torch.float16 and torch.float8_e8m0fnu in set(dtypes))):
        return torch.bfloat16 if found is None else torch.float32
    return found


def lossless(one: torch.dtype, other: torch.dtype) -> bool:
    """Whether every value of one floating dtype is a value of the other.

    Example:
        >>> lossless(torch.bfloat16, torch.float32), lossless(torch.bfloat16, torch.float16)
        (True, False)
    """
    return one == other or widest((one, other)) == other


def put_dtypes(module: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
    """Give tensors of a module other dtypes, in place; every name of a tied tensor sees the change."""
    for name, tensor in module.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and tensor.dtype != dtypes.get(name, tensor.dtype):
            tensor.data = tensor.data.to(dtypes[name])


def mixed(module: nn.Module) -> dict[torch.dtype, list[str]]:
    """Floating-point tensors of a module's state by dtype, where they may not compute together; else nothing."""
    found: dict[torch.dtype, list[str]] = {}
    for name, tensor in module.state_dict().items():
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            found.setdefault(tensor.dtype, []).append(name)
    return found if len(found) > 1 or any(dtype.itemsize == 1 for dtype in found) else {}


def widen(module: nn.Module, what: str) -> str:
    """Give all floating-point tensors of a module one dtype that holds their values exactly.

    Returns:
        one sentence that says so.
    """
    found = mixed(module)
    target = widest(found)
    assert target is not None
    names = {name: target for each in found.values() for name in each}
    narrow = [f"{_name(dtype)} ({shorten(found[dtype], 3)})" for dtype in found if dtype != target]
    put_dtypes(module, names)
    return (
        f"{what}: its class cannot compute with the dtypes of its file together, so tensors stored as "
        f"{' and '.join(narrow)} are held as {_name(target)}; every value is the file's"
    )


def refuse_other_kinds(what: str, wanted: Mapping[str, torch.dtype], own: Mapping[str, Tensor]) -> None:
    """Refuse integers for floating-point weights and complex values for real ones.

    Raises:
        LoadError: naming all of them; converting them would take codes for weights, or lose half of each value.
    """
    bad = [
        f"{name} ({_name(dtype)} for {_name(own[name].dtype)})"
        for name, dtype in wanted.items()
        if name in own
        and not own[name].is_complex()
        and (dtype.is_complex or (own[name].is_floating_point() and not dtype.is_floating_point))
    ]
    if bad:
        raise LoadError(
            f"{what}: a tensor must be of the kind that the model has, but {len(bad)} are not: {shorten(bad)}. "
            "Dequantise integer weights, and take complex ones apart, before they are loaded"
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
