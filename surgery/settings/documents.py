"""Documents: recipes as they are read from YAML and changed key by key, before they are validated."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from copy import deepcopy
from importlib.resources import files
from pathlib import Path
from typing import Any

from surgery.disk.places import of_recipe_file
from surgery.disk.untrusted import RECIPE_BYTES, UnreadableError, parse_yaml, read_regular, shown
from surgery.errors import PlanError
from surgery.permission import SHIPPED, Permission
from surgery.settings.former import TODAY, renewed
from surgery.settings.problems import advice_on
from surgery.util.wording import sentence

_CODE = re.compile(r"^(?!timm:|datasets:|hf-hub:|re:).*:[A-Za-z_]\w*$", re.DOTALL)
"""Texts that name a function: `file.py:function` and `package.module:function`."""


def read_text(source: str | Path) -> str:
    """The text of a YAML file, or of the recipe of that name that is installed with this package.

    Raises:
        PlanError: where there is no such file, or it cannot be read.
    """
    path = Path(source).expanduser()
    if not os.path.lexists(path) or (path.is_dir() and str(source) in recipe_names()):
        if str(source) not in recipe_names():
            missing = path.suffix in (".yaml", ".yml")
            said = (
                f"The recipe {source} does not exist; give a file, or the name of a recipe"
                if missing
                else f"A recipe is a YAML file or the name of one, but '{source}' is neither"
            )
            raise PlanError(sentence(f"{said}: {advice_on(path.stem, recipe_names())}"))
        return files("surgery_recipes").joinpath(f"{source}.yaml").read_text(encoding="utf-8")
    try:
        return read_regular(path, RECIPE_BYTES).decode()
    except UnreadableError as error:
        raise PlanError(f"The recipe {source} {error}.") from None
    except UnicodeDecodeError as error:
        raise PlanError(f"The recipe {source} must be UTF-8, but is not at byte {error.start:,}.") from None


def read_document(source: str | Path) -> dict[str, Any]:
    """The document in a YAML file, or in the recipe of that name that is installed with this package.

    Keys of earlier versions have the names of today.

    Raises:
        PlanError: where there is no such file, it is no YAML mapping, or a setting has two values by two names.
    """
    try:
        document = parse_yaml(read_text(source))
    except UnreadableError as error:
        raise PlanError(f"The recipe {source} {error}.") from None
    if not isinstance(document, dict):
        raise PlanError(
            f"The recipe {source} must be a YAML mapping with 'models', found {type(document).__name__}."
        )
    today, wrong = renewed(document)
    if wrong:
        raise PlanError(sentence(f"The recipe {source} is not valid: {'; '.join(wrong)}"))
    return today


def check_code(document: Mapping[str, Any], source: str | Path, trust_remote_code: bool) -> None:
    """Refuse a recipe that lies in an artifact and names Python code, unless the user consented.

    A recipe elsewhere is the user's own, like a script. One in an artifact may be anybody's.

    Args:
        document: the recipe, not yet validated.
        source: where it was read.
        trust_remote_code: the user's consent.

    Raises:
        ConsentError: naming the functions.
    """
    path = Path(source).expanduser()
    if not (path.parent / "manifest.json").is_file():
        return
    found = sorted({text for text in _texts(document) if _CODE.search(text)} - SHIPPED)
    if found:
        what = f"the recipe that came with the artifact {path.parent} names code that would run: {', '.join(found)}"
        Permission.of_artifact(trust_remote_code).require(Permission.OWN, what)


def _texts(value: Any, key: str = "") -> Iterable[str]:
    """All models and data that a document names, options of references cut off."""
    if isinstance(value, str) and key in ("model", "data"):
        yield value.partition("?")[0]
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _texts(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner, key)


def read_recipe(source: str | Path) -> dict[str, Any]:
    """The document of a recipe, every relative path in it from the working directory.

    Args:
        source: a YAML file, whose paths are relative to its folder, or the name of an installed recipe.

    Raises:
        PlanError: where there is no such recipe, or it is no YAML mapping.
    """
    path = Path(source).expanduser()
    document = read_document(source)
    return of_recipe_file(path).recipe(document) if path.is_file() else document


def recipe_names() -> list[str]:
    """The recipes installed with this package."""
    return sorted(
        entry.name.removesuffix(".yaml")
        for entry in files("surgery_recipes").iterdir()
        if entry.name.endswith(".yaml")
    )


def override(document: Mapping[str, Any], changes: Iterable[str]) -> dict[str, Any]:
    """Apply `path.to.key=value` changes to a document; values are YAML, list items are numbered from 0.

    Raises:
        PlanError: where a change is not of that form or its path leads nowhere.

    Example:
        >>> override({"parameters": {"budget": 0.5}}, ["parameters.budget=0.25", "seed=7"])
        {'parameters': {'budget': 0.25}, 'seed': 7}
    """
    result = deepcopy(dict(document))
    for change in changes:
        path, equals, text = change.partition("=")
        keys = TODAY.get(path, path).split(".")
        if not equals or not all(keys):
            raise PlanError(
                f"Each of `changes` is written KEY=VALUE, for example parameters.budget=0.5, found '{change}'."
            )
        try:
            value = parse_yaml(text)
        except UnreadableError:
            value = text
        place = result
        for key in keys[:-1]:
            place = _step(place, key, change)
        if isinstance(place, list):
            _step(place, keys[-1], change)
            place[int(keys[-1])] = value
        else:
            place[keys[-1]] = value
    return result


def _step(place: Any, key: str, change: str) -> Any:
    """One step down a document's path; mappings grow, lists do not."""
    if isinstance(place, list):
        if not key.isdecimal() or int(key) >= len(place):
            raise PlanError(
                f"`changes`: '{change}' needs an item of a list of {len(place)}, found '{key}': "
                "items are numbered from 0."
            )
        return place[int(key)]
    inner = place.setdefault(key, {})
    if not isinstance(inner, dict | list):
        raise PlanError(
            f"`changes`: '{change}' leads through '{key}', which is {shown(inner)} and holds no keys."
        )
    return inner
