"""A custom model: `path/module.py:factory`, the user's own file and a function in it."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from surgery.errors import LoadError
from surgery.inputs import as_inputs
from surgery.member import Inputs, Origin
from surgery.origins.base import Loaded, Request, one_line, shorten, write_files
from surgery.origins.empty import drop_weights
from surgery.origins.weights import save_weights


def claims(reference: str) -> bool:
    """Whether `reference` is a Python file, with or without the function behind a colon."""
    return reference.endswith(".py") or ".py:" in reference


def load(reference: str, request: Request) -> Loaded:
    """Run the file and call its factory, which returns a module or `(module, example inputs)`.

    Raises:
        LoadError: where the file or the factory is missing, fails, or returns something else.
    """
    path, factory = _split(reference)
    module, inputs = _run(path, factory)
    return Loaded(module, Origin("factory", reference, f"{path.name}:{factory}"), inputs=inputs)


def build(origin: Origin, files: Mapping[str, bytes], request: Request) -> nn.Module:
    """Run the factory again and drop the weights that it made.

    Raises:
        LoadError: unless `request.run_factory`, and where the file no longer gives the module.
    """
    if not request.run_factory:
        raise LoadError(
            f"building '{origin.reference}' again runs that Python file: pass run_factory=True if you "
            "trust it"
        )
    return drop_weights(_run(*_split(origin.reference))[0])


def save_plain(module: nn.Module, origin: Origin, files: Mapping[str, bytes], directory: Path) -> None:
    """Write `model.safetensors`, for `factory().load_state_dict(safetensors.torch.load_file(...))`."""
    save_weights(module, directory)
    write_files(files, directory)


def _split(reference: str) -> tuple[Path, str]:
    file, colon, factory = reference.rpartition(":")
    if not colon or not factory.isidentifier():
        raise LoadError(f"a custom model is written path/module.py:factory; '{reference}' names no function")
    path = Path(file).expanduser()
    if not path.is_file():
        raise LoadError(
            f"the file {file} of '{reference}' does not exist: check the path and the working folder"
        )
    return path, factory


def _run(path: Path, factory: str) -> tuple[nn.Module, Inputs | None]:
    """The factory's module and example inputs."""
    namespace = _import(path)
    make = getattr(namespace, factory, None)
    if not callable(make):
        public = [
            name for name, value in vars(namespace).items() if callable(value) and not name.startswith("_")
        ]
        raise LoadError(f"{path} must define a function '{factory}'; it defines {shorten(public) or 'none'}")
    try:
        made = make()
    except Exception as error:
        raise LoadError(
            f"{path}:{factory} must return a module when called without arguments, but raised "
            f"{one_line(error)}"
        ) from error
    module, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(module, nn.Module):
        raise LoadError(
            f"{path}:{factory} must return an nn.Module or (nn.Module, example inputs), "
            f"not {type(made).__name__}"
        )
    return module.eval(), None if inputs is None else as_inputs(inputs, source=f"{path.name}:{factory}")


def _import(path: Path) -> Any:
    """The user's file as a module of its own, importable siblings included."""
    full = path.resolve()
    name = f"surgery_factory_{full.stem}_{hashlib.sha256(str(full).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, full)
    if spec is None or spec.loader is None:
        raise LoadError(f"{path} cannot be imported as Python: give it the ending .py")
    namespace = importlib.util.module_from_spec(spec)
    sys.modules[name] = namespace  # dataclasses and pickles look their module up by name
    sys.path.insert(0, str(full.parent))
    try:
        spec.loader.exec_module(namespace)
    except Exception as error:
        del sys.modules[name]
        raise LoadError(f"{path} must run without errors, but raised {one_line(error)}") from error
    finally:
        sys.path.remove(str(full.parent))
    return namespace
