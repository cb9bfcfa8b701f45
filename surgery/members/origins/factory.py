"""A custom model: `path/module.py:factory`, the user's own file and a function in it, or a function of an
installed package as `package.module:factory`; `?argument=value` passes arguments."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from surgery.disk.files import write_files
from surgery.errors import LoadError
from surgery.inputs import as_inputs
from surgery.members.member import Inputs, Origin
from surgery.members.origins.base import Loaded, Request, split_options
from surgery.members.origins.empty import drop_weights
from surgery.members.origins.weights import save_weights
from surgery.permission import SHIPPED, Permission
from surgery.util.text import one_line, shorten

_DOTTED = re.compile(r"[A-Za-z_]\w*(\.(?!py:)[A-Za-z_]\w*)+:[A-Za-z_]\w*")


def claims(reference: str) -> bool:
    """Whether `reference` is a Python file, with or without the function behind a colon, or a dotted path."""
    head = reference.partition("?")[0]
    return head.endswith(".py") or ".py:" in head or bool(_DOTTED.fullmatch(head))


def check(reference: str) -> None:
    """Whether the file is there; nothing is run.

    Raises:
        LoadError: where it is not.
    """
    where = reference.partition("?")[0].rpartition(":")[0]
    if where.endswith(".py") and not Path(where).expanduser().is_file():
        raise LoadError(
            f"the file {where} of '{reference}' does not exist: check the path and the working folder"
        )


def load(reference: str, request: Request) -> Loaded:
    """Run the file and call its factory, which returns a module or `(module, example inputs)`.

    Raises:
        LoadError: where the file or the factory is missing, fails, or returns something else.
    """
    head, options = split_options(reference)
    module, inputs = _make(head, options, request.permission)
    where, _, factory = head.rpartition(":")
    name = f"{where if _DOTTED.fullmatch(head) else Path(where).name}:{factory}"
    return Loaded(module, Origin("factory", reference, name), inputs=inputs, stored=False)


def build(origin: Origin, files: Mapping[str, bytes], request: Request) -> nn.Module:
    """Run the factory again and drop the weights that it made.

    Raises:
        ConsentError: where the permission does not cover the factory.
        LoadError: where the file no longer gives the module.
    """
    return drop_weights(_make(*split_options(origin.reference), request.permission)[0])


def save_plain(module: nn.Module, origin: Origin, files: Mapping[str, bytes], directory: Path) -> None:
    """Write `model.safetensors`, for `factory().load_state_dict(safetensors.torch.load_file(...))`."""
    save_weights(module, directory)
    write_files(files, directory)


def find_function(reference: str, permission: Permission) -> Callable[..., Any]:
    """The function that `file.py:function` or `package.module:function` names, imported.

    Args:
        reference: without options.
        permission: of the text that names it; functions that ship with this package need none.

    Raises:
        ConsentError: where the permission does not cover the function; nothing was imported.
        LoadError: where the file, the module or the function does not exist, or importing it fails.

    Example:
        >>> find_function("surgery_recipes.nets:lenet", Permission.NONE).__name__
        'lenet'
    """
    if reference not in SHIPPED:
        permission.require(Permission.OWN, f"'{reference}' is Python code that would run")
    where, colon, name = reference.rpartition(":")
    if not colon or not name.isidentifier():
        raise LoadError(
            f"a function is written path/module.py:function or package.module:function; '{reference}' "
            "names no function"
        )
    if _DOTTED.fullmatch(reference):
        try:
            namespace: Any = importlib.import_module(where)
        except Exception as error:
            raise LoadError(
                f"the module {where} of '{reference}' cannot be imported: {one_line(error)}"
            ) from error
    else:
        path = Path(where).expanduser()
        if not path.is_file():
            raise LoadError(
                f"the file {where} of '{reference}' does not exist: check the path and the working folder"
            )
        namespace = _import(path)
    found = getattr(namespace, name, None)
    if not callable(found):
        public = [
            key for key, value in vars(namespace).items() if callable(value) and not key.startswith("_")
        ]
        raise LoadError(f"{where} must define a function '{name}'; it defines {shorten(public) or 'none'}")
    return found


def _make(
    reference: str, options: Mapping[str, Any], permission: Permission
) -> tuple[nn.Module, Inputs | None]:
    """The factory's module and example inputs."""
    make = find_function(reference, permission)
    try:
        made = make(**options)
    except Exception as error:
        arguments = f"with {', '.join(options)}" if options else "without arguments"
        raise LoadError(
            f"{reference} must return a module when called {arguments}, but raised {one_line(error)}"
        ) from error
    module, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(module, nn.Module):
        raise LoadError(
            f"{reference} must return an nn.Module or (nn.Module, example inputs), not {type(made).__name__}"
        )
    return module.eval(), None if inputs is None else as_inputs(inputs, source=reference)


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
