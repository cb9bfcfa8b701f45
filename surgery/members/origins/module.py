"""A live `nn.Module` handed over in Python: it has no reference that anybody could read again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from torch import nn

from surgery.disk.files import write_files
from surgery.errors import LoadError
from surgery.members.member import Origin
from surgery.members.origins.base import Loaded, Request
from surgery.members.origins.weights import save_weights


def claims(reference: str) -> bool:
    """No text names a live module."""
    return False


def load(reference: str, request: Request) -> NoReturn:
    """No text names a live module.

    Raises:
        LoadError: always.
    """
    raise LoadError(f"'{reference}' is text; a live module is handed over in Python, not named")


def live_module(module: nn.Module) -> Loaded:
    """A live module as it is."""
    name = type(module).__name__
    return Loaded(module, Origin("module", name, f"{type(module).__module__}.{type(module).__qualname__}"))


def build(origin: Origin, files: Mapping[str, bytes], request: Request) -> NoReturn:
    """A live module cannot be built again from its name.

    Raises:
        LoadError: always.
    """
    raise LoadError(
        f"the architecture '{origin.architecture}' was a live module and no file tells how to build it: "
        "build the module yourself and pass it"
    )


def save_plain(module: nn.Module, origin: Origin, files: Mapping[str, bytes], directory: Path) -> None:
    """Write `model.safetensors`, for `module.load_state_dict(safetensors.torch.load_file(...))`."""
    save_weights(module, directory)
    write_files(files, directory)
