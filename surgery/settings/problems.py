"""Settings: strict documents, and what is said of those that do not hold."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from surgery.disk.untrusted import shown, shown_text
from surgery.errors import PlanError
from surgery.util.wording import sentence

Model = TypeVar("Model", bound=BaseModel)

_QUOTED = re.compile(r"`([a-z_]+(?:\.\w+)*)`")

_BOUNDS = {
    "greater_than": "above {gt:.16g}",
    "greater_than_equal": "{ge:.16g} or more",
    "less_than": "below {lt:.16g}",
    "less_than_equal": "at most {le:.16g}",
    "finite_number": "a finite number",
}
"""Requirements of quantities in the words of all our messages."""


class Strict(BaseModel):
    """A part of a recipe: unknown keys are errors, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class InnerError(ValueError):
    """What is wrong with a part of a document whose class depends on another key.

    Attributes:
        error: of pydantic.
        root: the class of that part.
    """

    def __init__(self, error: ValidationError, root: type[BaseModel]):
        super().__init__("; ".join(problems_of(error, root)))
        self.error, self.root = error, root


def advice_on(name: str, known: Iterable[str], show: Sequence[str] | None = None) -> str:
    """What to say to an unknown name: the nearest known one, or which ones there are.

    Args:
        name: that is not known.
        known: all that are.
        show: those that are listed where none is near; all by default.

    Example:
        >>> advice_on("acuracy", ["accuracy", "mse"]), advice_on("x", ["accuracy", "mse"])
        ("did you mean 'accuracy'?", 'known are accuracy, mse')
    """
    names = list(known)
    small = {each.lower(): each for each in reversed(names)}
    near = difflib.get_close_matches(str(name).lower(), small, n=1)
    if near:
        return f"did you mean '{small[near[0]]}'?"
    return f"known are {', '.join(show or names)}" if names else "there are none"


def problems_of(
    error: ValidationError,
    root: type[BaseModel],
    prefix: str = "",
    called: Mapping[str, str] = MappingProxyType({}),
) -> list[str]:
    """Everything that a validation found, each in words; unknown names with the nearest known one.

    Args:
        error: of pydantic.
        root: the document that was validated.
        prefix: in front of the keys' paths.
        called: what keys are called where they were given in another way, by path.
    """
    found: dict[str, str] = {}
    for each in error.errors(include_url=False):
        path = [str(part) for part in each["loc"]]
        inner = each.get("ctx", {}).get("error")
        if isinstance(inner, InnerError):
            words = problems_of(inner.error, inner.root, _dotted(prefix, path), called)
            found |= {f"{'.'.join(path)} {number}": problem for number, problem in enumerate(words)}
            continue
        branch = next((n for n, part in enumerate(path) if part == "str" or part.startswith("dict[")), None)
        if branch is None:
            found[".".join(path)] = _explain(each, root, prefix, called)
        elif branch == len(path) - 1:  # of text or a mapping, neither
            where = _dotted(prefix, path[:branch])
            words = f"{_called(where, called)}: must be a name, or a mapping of names, found {shown(each['input'])}"
            found.setdefault(".".join(path[:branch]), words)
        else:
            found[".".join(path[:branch])] = _explain(
                {**each, "loc": path[:branch] + path[branch + 1 :]}, root, prefix, called
            )
    return list(found.values())


def validated(kind: type[Model], values: Mapping[str, Any], said: str = "") -> Model:
    """Settings that were given in Python; None stands for what was not.

    Args:
        kind: of settings.
        values: by key.
        said: in front of what is wrong.

    Raises:
        PlanError: naming every value that is wrong.
    """
    try:
        return kind.model_validate({name: value for name, value in values.items() if value is not None})
    except ValidationError as error:
        quoted = {name: f"`{name}`" for name in kind.model_fields}
        wrong = "; ".join(problems_of(error, kind, called=quoted))
        raise PlanError(sentence(f"{said}{wrong}")) from None


def keys_of(root: type[BaseModel], path: Sequence[str] = ()) -> list[str]:
    """The keys that a document knows at a place.

    Args:
        root: of the document.
        path: of keys; numbers stand for items of lists.

    Example:
        >>> from surgery.settings.recipe import Recipe
        >>> keys_of(Recipe, ["models", "0"])[:2]
        ['model', 'name']
    """
    for key in path:
        if not key.isdecimal():
            field = root.model_fields.get(key)
            inner = None if field is None else next(documents_in(field.annotation), None)
            if inner is None:
                return []
            root = inner
    return list(root.model_fields)


def paths_in(root: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """The paths of all keys of a document; `N` stands for the numbers of items of lists.

    Args:
        root: of the document.
        prefix: in front of all paths.

    Example:
        >>> from surgery.settings.recipe import Recipe
        >>> list(paths_in(Recipe))[:2]
        ['models', 'models.N.model']
    """
    for name, field in root.model_fields.items():
        path = _dotted(prefix, [name])
        yield path
        for inner in documents_in(field.annotation):
            yield from paths_in(inner, f"{path}.N" if "tuple" in str(field.annotation) else path)


def documents_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The documents that a key's annotation holds, within lists and alternatives."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from documents_in(inner)


def _explain(error: Any, root: type[BaseModel], prefix: str, called: Mapping[str, str]) -> str:
    path = [shown_text(str(part), 60) for part in error["loc"]]
    where = _dotted(prefix, path)
    where = _called(where, called)
    if error["type"] == "extra_forbidden":
        advice = advice_on(path[-1], keys_of(root, path[:-1]))
        if not advice.startswith("did you"):  # the key of another place
            known = {each.rpartition(".")[2]: each for each in reversed([*paths_in(root, prefix)])}
            near = difflib.get_close_matches(path[-1].lower(), known, n=1, cutoff=0.8)
            advice = f"did you mean '{known[near[0]]}'?" if near else advice
        return f"'{where}' is not a known key, {advice}"
    message = error["msg"].removeprefix("Value error, ")
    message = shown_text(message[:1].lower() + message[1:], 400)
    if error["type"] == "value_error":  # of ours: settings stand in backquotes
        where = "" if message.startswith("`") else where
        message = _QUOTED.sub(lambda key: _key_called(key[1], root, path, prefix, called), message)
    if error["type"] in _BOUNDS:
        message = f"must be {_BOUNDS[error['type']].format(**error.get('ctx', {}))}"
    found = "" if error["type"] in ("missing", "value_error") else f", found {shown(error['input'])}"
    near = ""
    if error["type"] == "literal_error":
        words = re.findall(r"'([^']*)'", error["ctx"]["expected"])
        advice = advice_on(shown_text(str(error["input"])), words)
        near = f", {advice}" if advice.startswith("did you") else ""
    return f"{where}: {message}{found}{near}" if where else message


def _key_called(
    key: str, root: type[BaseModel], path: Sequence[str], prefix: str, called: Mapping[str, str]
) -> str:
    """How a message calls a setting that stands in backquotes: by its path in the document, or as it was given."""
    place = list(path)
    while place and key.partition(".")[0] not in keys_of(
        root, place
    ):  # a key of this part, or of one around it
        place = place[:-1]
    whole = _dotted(prefix, [*place, key])
    return f"`{key}`" if whole == key and key not in called else _called(whole, called)


def _called(where: str, called: Mapping[str, str]) -> str:
    """What a key is called: as it was given, also where something within its value is meant; else its path."""
    return next((name for path, name in called.items() if f"{where}.".startswith(f"{path}.")), where)


def _dotted(prefix: str, path: Sequence[str]) -> str:
    return ".".join([prefix, *path] if prefix else path)
