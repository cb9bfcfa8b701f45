"""Calibration files: the user's own texts, pictures or arrays, prepared as the model expects, in batches."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surgery.disk.files import write_files
from surgery.disk.untrusted import (
    TEXT_BYTES,
    UnreadableError,
    open_regular,
    parse_json,
    read_regular,
)
from surgery.errors import LoadError
from surgery.inputs.candidates import floating_dtype
from surgery.inputs.reading import read_arrays, read_tokenizer
from surgery.inputs.sample import number
from surgery.members.member import Inputs, Member
from surgery.util.quiet import quiet
from surgery.util.text import one_line, shorten

_BATCH = 8
PICTURE_ELEMENTS = 1 << 26  # pixels: a picture of 8,192 x 8,192
_PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm")


def read_calibration(member: Member, path: Path) -> list[Inputs]:
    """All examples in a file or folder, in batches of 8.

    Args:
        member: loaded; its tokenizer or preprocessor files and its example inputs say how to prepare data.
        path: `.txt` (one text per line), a picture or a folder of pictures, `.npz` or `.safetensors`.

    Raises:
        LoadError: where the file does not exist, cannot be read, or does not suit the member.
    """
    if not os.path.lexists(path):
        raise LoadError(f"the file with inputs, {path}, does not exist: check the path")
    if path.is_dir() or path.suffix.lower() in _PICTURES:
        return _pictures(member, path)
    if path.suffix == ".txt":
        return _texts(member, path)
    if path.suffix in (".npz", ".safetensors"):
        return _arrays(member, path)
    raise LoadError(
        "calibration data is a .txt file, a picture, a folder of pictures, .npz or .safetensors, "
        f"not '{path.name}'"
    )


def picture_statistics(member: Member, channels: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation `[channels, 1, 1]` of the model's pictures; 0.5 where unknown."""
    config: Any = getattr(member.module, "pretrained_cfg", None) or {}
    if member.origin.kind == "transformers" and "preprocessor_config.json" in member.files:
        try:
            config = parse_json(member.files["preprocessor_config.json"], finite=False, unique=False)
        except UnreadableError as error:
            raise LoadError(f"preprocessor_config.json of '{member.name}' {error}: copy it again") from None
        config = config if isinstance(config, Mapping) else {}
    found = []
    for names in (("mean", "image_mean"), ("std", "image_std")):
        numbers = next((config[name] for name in names if config.get(name)), None)
        listed = numbers if isinstance(numbers, (list, tuple)) else ()
        usual = len(listed) == channels and all(isinstance(n, (int, float)) and abs(n) < 1e30 for n in listed)
        found.append(
            torch.tensor(numbers if usual else [0.5] * channels, dtype=torch.float32).reshape(-1, 1, 1)
        )
    return found[0], found[1]


def _texts(member: Member, path: Path) -> list[Inputs]:
    """Tokenised lines, padded to the longest of their batch."""
    try:
        text = read_regular(path, TEXT_BYTES).decode()
        lines = [line.strip() for line in text.splitlines() if line.strip()]
    except UnreadableError as error:
        raise LoadError(f"{path} {error}: give a text file") from None
    except UnicodeDecodeError as error:
        raise LoadError(f"{path} must be UTF-8 text, one text per line: {one_line(error)}") from error
    if not lines:
        raise LoadError(f"{path} must hold at least one line of text, but is empty")
    if not any(name.startswith(("tokenizer", "vocab", "spiece", "sentencepiece")) for name in member.files):
        raise LoadError(
            f"texts need a tokenizer, and '{member.name}' has none: give .npz arrays of token ids instead"
        )
    tokenizer = read_tokenizer(member.files, f"'{member.name}'")
    longest = min(512, number(getattr(member.module, "config", None) or object(), _POSITIONS, 512) - 2)
    batches = []
    for start in range(0, len(lines), _BATCH):
        chosen = lines[start : start + _BATCH]
        with quiet():
            made = dict(
                tokenizer(chosen, return_tensors="pt", padding=True, truncation=True, max_length=longest)
            )
        if "decoder_input_ids" in member.inputs.kwargs:
            made["decoder_input_ids"] = made["input_ids"]
        batches.append(_call(member, made, path))
    return batches


_POSITIONS = "max_position_embeddings n_positions n_ctx"


def _pictures(member: Member, path: Path) -> list[Inputs]:
    """Pictures, prepared by timm's own transform or by the transformers image processor."""
    from PIL import Image

    files = (
        [path] if not path.is_dir() else sorted(p for p in path.rglob("*") if p.suffix.lower() in _PICTURES)
    )
    if not files:
        raise LoadError(f"{path} must hold at least one picture ({', '.join(_PICTURES)}), but holds none")
    prepare = _picture_transform(member)
    prepared, bad = [], []
    for file in files:
        try:
            with open_regular(file) as stream, Image.open(stream) as picture:
                if picture.width * picture.height > PICTURE_ELEMENTS:
                    raise UnreadableError(
                        f"must have at most {PICTURE_ELEMENTS:,} pixels, has {picture.size}"
                    )
                prepared.append(prepare(picture.convert("RGB")))
        except Exception as error:  # of whatever decoder, or of the model's own preparation
            bad.append(f"{file.name} ({one_line(error, 80)})")
    if bad:
        raise LoadError(f"pictures in {path} that cannot be read: {shorten(bad)}; mend or remove them")
    batches = []
    for start in range(0, len(prepared), _BATCH):
        batch = torch.stack(prepared[start : start + _BATCH]).to(floating_dtype(member.module))
        named = member.origin.kind == "transformers"
        batches.append(
            _call(member, {"pixel_values": batch}, path) if named else Inputs((batch,), {}, path.name)
        )
    return batches


def _picture_transform(member: Member) -> Any:
    """A function from a PIL picture to `[channels, height, width]`."""
    if member.origin.kind == "timm":
        from timm.data.config import resolve_data_config
        from timm.data.transforms_factory import create_transform

        return create_transform(**resolve_data_config({}, model=member.module))
    if member.origin.kind == "transformers" and "preprocessor_config.json" in member.files:
        from transformers import AutoImageProcessor

        with tempfile.TemporaryDirectory() as folder, quiet():
            write_files(member.files, Path(folder))
            try:
                processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
            except Exception as error:
                raise LoadError(
                    f"the image processor of '{member.name}' cannot be read: {one_line(error)}"
                ) from error
        return lambda picture: processor(picture, return_tensors="pt")["pixel_values"][0]
    raise LoadError(
        f"pictures need a timm model or a preprocessor_config.json, and '{member.name}' has neither: give "
        ".npz or .safetensors arrays instead"
    )


def _arrays(member: Member, path: Path) -> list[Inputs]:
    """Arrays named by forward's arguments, or `arg0`, `arg1`, cut into batches along their first axis."""
    tensors = read_arrays(path)
    accepted = signature(member.module.forward).parameters
    free = any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values())
    positional = [f"arg{i}" for i in range(len(tensors)) if f"arg{i}" in tensors]
    unknown = [name for name in tensors if name not in positional and name not in accepted and not free]
    if unknown:
        raise LoadError(
            f"arrays in {path} must be named by arguments of forward ({shorten(accepted)}) or arg0, arg1, "
            f"...; these are not: {shorten(unknown)}"
        )
    lengths = {name: len(tensor) if tensor.dim() else 0 for name, tensor in tensors.items()}
    if not tensors or len(set(lengths.values())) != 1 or 0 in lengths.values():
        raise LoadError(
            f"arrays in {path} must share the length of their first axis, but have {lengths or 'none'}"
        )
    dtype = floating_dtype(member.module)
    tensors = {
        name: tensor.to(dtype)
        if tensor.is_floating_point()
        else tensor
        if tensor.dtype == torch.bool
        else tensor.long()
        for name, tensor in tensors.items()
    }
    batches = []
    for start in range(0, next(iter(lengths.values())), _BATCH):
        part = {name: tensor[start : start + _BATCH] for name, tensor in tensors.items()}
        args = tuple(part.pop(name) for name in positional)
        batches.append(Inputs(args, part, path.name))
    return batches


def _call(member: Member, made: Mapping[str, Tensor], path: Path) -> Inputs:
    """One call: what was read, and rows of the example inputs for arguments that the file cannot give."""
    accepted = signature(member.module.forward).parameters
    kwargs = {name: value for name, value in made.items() if name in accepted}
    if not kwargs:
        raise LoadError(f"'{member.name}' takes none of {shorten(made)}, which is what {path} gives")
    batch = len(next(iter(kwargs.values())))
    for name, value in member.inputs.kwargs.items():
        if name not in kwargs and not _describes_text(name, made):
            kwargs[name] = _rows(value, batch)
    return Inputs((), kwargs, path.name)


def _describes_text(name: str, made: Mapping[str, Tensor]) -> bool:
    """Whether an argument has the length of a text that the file replaced."""
    return "input_ids" in made and name in (
        "attention_mask",
        "token_type_ids",
        "position_ids",
        "inputs_embeds",
        "bbox",
    )


def _rows(value: Any, batch: int) -> Any:
    """`batch` rows of an example value, repeated in turn."""
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value
    return value[torch.arange(batch) % len(value)]
