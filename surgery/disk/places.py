"""Resolves the paths that recipes and references name.

What is typed is relative to the working directory, and so is everything in memory. A recipe's file names what it needs
relative to itself. An artifact names what lies outside of it relative to its own folder, with `./` or `../` in front:
it can be used from anywhere, and moves together with what it needs.

Texts alone are changed here: nothing is opened, and no text from an artifact is looked up on the disk.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from surgery.permission import PLACES

FACTORY = re.compile(r"(?P<where>[^?]*):(?P<name>[A-Za-z_]\w*)")
TIMM, DATASETS = "timm:", "datasets:"
OURS = "surgery_recipes."
_NAMED = re.compile(r"([A-Za-z0-9_.-]+)=(.+)", re.DOTALL)
# Behind a name or an option.
_TIMM_WEIGHTS = re.compile(r"(timm:[^?=]*(?:\?(?:.*&)?[^=&]*=[^=&]*)?)=(.+)", re.DOTALL)
# On the hub: asked for, where no such folder is there.
_LIKE_A_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_MARKED = ("./", "../")

Change = Callable[[str], str]
"""What becomes of a relative path."""


class Places:
    """Changes every relative path in references and recipes.

    Args:
        change: of a relative path.
        is_place: whether a text is a path, which may also be a name on the hub.
        marked: whether a path that could be a name on the hub gets `./` in front.

    Example:
        >>> Places(lambda path: f"sub/{path}", lambda text: False).reference("mine.py:net?width=3")
        'sub/mine.py:net?width=3'
    """

    def __init__(self, change: Change, is_place: Callable[[str], bool], *, marked: bool = False):
        self.change, self.is_place, self.marked = change, is_place, marked

    def path(self, text: str) -> str:
        """A file or folder."""
        return text if not text or os.path.isabs(text) or text.startswith("~") else self.change(text)

    def reference(self, text: str) -> str:
        """A model's reference, without a name in front."""
        head, mark, options = text.partition("?")
        if text.startswith(TIMM):
            found = _TIMM_WEIGHTS.fullmatch(text)
            return f"{found[1]}={self.path(found[2])}" if found else text
        if (function := self._function(head)) is not None:
            head = function
        elif self.is_place(head):
            head = self._no_name(self.path(head))
        return f"{head}{mark}{options}"

    def data(self, text: str) -> str:
        """Where a task's examples come from."""
        if text.startswith(DATASETS):
            name = text.removeprefix(DATASETS)
            return f"{DATASETS}{self._no_name(self.path(name))}" if self.is_place(name) else text
        return found if (found := self._function(text)) is not None else self.path(text)

    def _no_name(self, path: str) -> str:
        return f"./{path}" if self.marked and _LIKE_A_NAME.fullmatch(path) else path

    def recipe(self, document: Mapping[str, Any]) -> dict[str, Any]:
        """A recipe's document; what is of another form than a recipe's is left as it is."""
        found = dict(document)
        if isinstance(found.get("models"), list | tuple):
            found["models"] = [self._model(each) for each in found["models"]]
        if isinstance(found.get("calibrate"), list | tuple):
            found["calibrate"] = [self._calibration(each) for each in found["calibrate"]]
        if isinstance(found.get("train"), Mapping):
            found["train"] = self.training(found["train"])
        return self._at(found, {"out": self.path})

    def training(self, document: Mapping[str, Any]) -> dict[str, Any]:
        """Settings of a run; what is of another form is left as it is."""
        inner = document.get("templates")
        moved = {"templates": self._at(inner, {"source": self.path})} if isinstance(inner, Mapping) else {}
        return {**document, **moved}

    def _model(self, model: Any) -> Any:
        if not isinstance(model, Mapping):
            return model
        found = self._at(model, {"model": self._named, "calibrate": self.path})
        if isinstance(found.get("tasks"), list | tuple):
            found["tasks"] = [self._task(each) for each in found["tasks"]]
        return found

    def _task(self, task: Any) -> Any:
        if not isinstance(task, Mapping):
            return task
        found = self._at(task, {"data": self.data})
        data, options = str(task.get("data", "")), task.get("options")
        names = PLACES if data.startswith(OURS) else {"tokenizer"} if FACTORY.fullmatch(data) is None else ()
        if isinstance(options, Mapping):
            found["options"] = self._at(options, dict.fromkeys(names, self.path))
        if isinstance(task.get("adaptation"), Mapping):
            found["adaptation"] = self._task(task["adaptation"])
        return found

    def _named(self, text: str) -> str:
        named = None if self.is_place(text) else _NAMED.fullmatch(text)
        return f"{named[1]}={self.reference(named[2])}" if named else self.reference(text)

    def _calibration(self, text: Any) -> Any:
        if not isinstance(text, str):
            return text
        name, equals, file = text.partition("=")
        return f"{name}={self.path(file)}" if equals and "/" not in name else self.path(text)

    def _function(self, text: str) -> str | None:
        """`file.py:function` with its file changed; a dotted path as it is; None for anything else."""
        found = FACTORY.fullmatch(text)
        if found is None:
            return self.path(text) if text.endswith(".py") else None
        where = found["where"]
        return f"{self.path(where)}:{found['name']}" if where.endswith(".py") or "/" in where else text

    @staticmethod
    def _at(document: Mapping[str, Any], changes: Mapping[str, Change]) -> dict[str, Any]:
        return {
            key: changes[key](value) if key in changes and isinstance(value, str) else value
            for key, value in document.items()
        }


def of_recipe_file(file: str | Path) -> Places:
    """From a recipe's file: its relative paths start in its folder."""
    folder = os.path.dirname(os.path.expanduser(file))
    return Places(
        lambda path: os.path.normpath(os.path.join(folder, path)), lambda text: Path(folder, text).exists()
    )


def into_artifact(out: str | Path) -> Places:
    """From the working directory to an artifact that is written.

    Args:
        out: its folder, which need not exist yet.
    """
    home = os.path.realpath(os.path.expanduser(out))

    def change(path: str) -> str:
        real = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
        try:
            found = Path(os.path.relpath(real, home)).as_posix()
        except ValueError:  # on another drive
            return real
        return found if found.startswith("../") else f"./{found}"

    return Places(change, lambda text: Path(text).is_dir())


def out_of_artifact(folder: str | Path) -> Places:
    """From an artifact that is read to the working directory; what has no `./` or `../` in front is as it was typed.

    A folder keeps a `./` where without it a name on the hub would be asked for if the folder is not there.
    """
    home = os.path.realpath(os.path.expanduser(folder))

    def change(path: str) -> str:
        if not path.startswith(_MARKED):
            return path
        try:
            return os.path.relpath(os.path.join(home, path))
        except ValueError:
            return os.path.normpath(os.path.join(home, path))

    return Places(change, lambda text: text.startswith(_MARKED), marked=True)
