"""What every kind of origin shares: the request, the result, and small helpers for errors and silence."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from surgery.disk.untrusted import (
    DOCUMENT_BYTES,
    UnreadableError,
    as_mapping,
    is_regular,
    parse_json,
    read_regular,
    regular_size,
    shown,
)
from surgery.errors import LoadError
from surgery.members.member import Inputs, Origin
from surgery.permission import Permission

READ = 1 << 27  # parameters of a model whose weights are always read: half a GiB in float32
_NEVER = (".py", ".safetensors", ".bin", ".pt", ".pth", ".h5")  # code and weights are no small files


@dataclass(frozen=True)
class Request:
    """What the caller allows while a reference is loaded or an architecture is built.

    Attributes:
        permission: whose code may run.
        read: whether weights are read; without, a large model may come as an outline, on the meta device.
    """

    permission: Permission = Permission.NONE
    read: bool = True


@dataclass(frozen=True)
class Loaded:
    """What a reference turned into, before it has a name.

    Attributes:
        module: with its weights.
        origin: where it came from.
        files: small files.
        inputs: example inputs, where the reference brings some.
        stored: whether the weights are stored somewhere; otherwise they may have been drawn at random.
    """

    module: nn.Module
    origin: Origin
    files: Mapping[str, bytes] = field(default_factory=dict)
    inputs: Inputs | None = None
    stored: bool = True


def split_options(reference: str) -> tuple[str, dict[str, Any]]:
    """`REF?key=value&key=value` as the reference and its options, numbers and words read as values.

    Example:
        >>> split_options("resnet18?num_classes=10&features_only=false")
        ('resnet18', {'num_classes': 10, 'features_only': False})
    """
    head, mark, tail = reference.partition("?")
    options: dict[str, Any] = {}
    for item in tail.split("&") if mark else ():
        key, equals, value = item.partition("=")
        if not equals or not key.isidentifier():
            raise LoadError(
                f"options of a reference are written ?key=value&key=value; '{item}' in '{reference}' is not"
            )
        options[key] = _literal(value)
    return head, options


def _literal(text: str) -> Any:
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for number in (int, float):
        with contextlib.suppress(ValueError):
            return number(text)
    return text


def read_small_files(folder: Path, patterns: Iterable[str], largest: int = 1 << 26) -> dict[str, bytes]:
    """Files of `folder` that match one of `patterns`, by relative path; a larger one is not a small file.

    `largest` is in bytes.
    """
    paths = {path for pattern in patterns for path in folder.glob(pattern)}
    small = [path for path in sorted(paths) if path.suffix not in _NEVER and is_regular(path)]
    return {
        path.relative_to(folder).as_posix(): read_regular(path, largest)
        for path in small
        if regular_size(path) <= largest
    }


def read_config(path: Path) -> dict[str, Any]:
    """A library's configuration: whatever JSON object Python writes, repeated keys and infinities included.

    Raises:
        LoadError: where it is none, or says of which kind the model is in something else than text.
    """
    try:
        config = dict(as_mapping(parse_json(read_regular(path, DOCUMENT_BYTES), finite=False, unique=False)))
    except UnreadableError as error:
        raise LoadError(f"{path} {error}: copy or download it again") from None
    for key in ("model_type", "architecture"):
        if not isinstance(config.get(key, ""), str | None):
            raise LoadError(
                f"{path} must name its {key} in text, but says {shown(config[key])}: copy it again"
            )
    named = config.get("architectures") or []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise LoadError(
            f"{path} must list the names of its architectures, but says {shown(named)}: copy it again"
        )
    if not isinstance(config.get("auto_map") or {}, dict):
        raise LoadError(f"{path} must map names to classes in auto_map, but says {shown(config['auto_map'])}")
    return config


def check_files(paths: Iterable[Path]) -> None:
    """Whether a library that will open these files by itself finds regular ones, and documents of a sane size.

    Raises:
        LoadError: naming all that it would wait for or run out of memory with.
    """
    bad = []
    for path in paths:
        try:
            size = regular_size(path)
            if path.suffix == ".json" and size > DOCUMENT_BYTES:
                raise UnreadableError(f"must have at most {DOCUMENT_BYTES:,} bytes, but has {size:,}")
        except UnreadableError as error:
            bad.append(f"{path} {error}")
    if bad:
        raise LoadError(f"{'; '.join(bad[:5])}: put the file itself there, or take it away")


WEIGHT_FILES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar", ".h5", ".onnx", ".gguf")
"""What files of weights end in, which no reference is."""


def said_of_file(head: str) -> str:
    """What to do with a file that was given for a model; nothing where it is none."""
    path = Path(head).expanduser()
    if path.suffix not in WEIGHT_FILES and not path.is_file():
        return ""
    if not path.exists():
        return f"the file {head} does not exist, and would not be a model by itself: check the path"
    if path.name.startswith(("model", "pytorch_model")) and (path.parent / "config.json").is_file():
        return f"'{head}' is a file of weights, which its folder says how to use: give {path.parent}"
    return (
        f"'{head}' is a file, which does not say of what model its weights are: give timm:NAME={head} where timm has "
        "the model, else path/module.py:factory, a function that builds it and loads them"
    )
