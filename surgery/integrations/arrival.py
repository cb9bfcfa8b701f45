"""Registers with another library as soon as that is imported, so that `import surgery` imports neither of them.

A library may be there already, or come later: then a finder, which finds nothing itself, waits for one of its modules,
runs what there is to do after that module, and is gone.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from surgery.errors import SurgeryWarning


class _After:  # its base class in importlib.abc would take ten milliseconds
    """A module's own loader, and an import after it.

    Args:
        loader: of the module.
        then: name of the module that is imported when it is there.
    """

    def __init__(self, loader: Any, then: str):
        self.loader, self.then = loader, then

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """As the module's own loader does."""
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """As the module's own loader does; then the other import."""
        spec = module.__spec__
        if spec is not None:
            spec.loader = self.loader
        module.__loader__ = self.loader
        self.loader.exec_module(module)
        _import(self.then)


class _Waiting:
    """Waits for a module.

    Args:
        module: its full name.
        then: name of the module that is imported after it.
    """

    def __init__(self, module: str, then: str):
        self.module, self.then = module, then

    def find_spec(
        self, name: str, path: object = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Nothing of its own: the spec that others find for the module, with an import after it."""
        if name != self.module:
            return None
        from importlib.util import find_spec

        sys.meta_path.remove(self)  # pyright: ignore[reportArgumentType]
        spec = find_spec(name)
        if spec is not None and spec.loader is not None and hasattr(spec.loader, "exec_module"):
            spec.loader = _After(spec.loader, self.then)  # pyright: ignore[reportAttributeAccessIssue]
        return spec


def when_imported(module: str, then: str) -> None:
    """Import a module of ours after one of another library: at once where that is there, else when it comes.

    Args:
        module: full name of the other library's module.
        then: full name of ours.
    """
    if module in sys.modules:
        _import(then)
    elif not any(isinstance(each, _Waiting) and each.module == module for each in sys.meta_path):
        sys.meta_path.insert(0, _Waiting(module, then))  # pyright: ignore[reportArgumentType]


def _import(name: str) -> None:
    """Import a module of ours; the other library works without it, so what goes wrong is a warning."""
    try:
        importlib.import_module(name)
    except Exception as error:
        warnings.warn(
            f"{name} could not be registered with this version of its library: {type(error).__name__}: {error}",
            SurgeryWarning,
            stacklevel=2,
        )
