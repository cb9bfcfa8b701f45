"""Settings: strict documents, and what is said of those that do not hold."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from surgery.disk.untrusted import shown, shown_text

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


def problems_of(error: ValidationError, root: type[BaseModel], prefix: str = "") -> list[str]:
    """Everything that a validation found, each in words; unknown names with the nearest known one.

    Args:
        error: of pydantic.
        root: the document that was validated.
        prefix: in front of the keys' paths.
    """
    found: dict[str, str] = {}
    for each in error.errors(include_url=False):
        path = [str(part) for part in each["loc"]]
        inner = each.get("ctx", {}).get("error")
        if isinstance(inner, InnerError):
            words = problems_of(inner.error, inner.root, _dotted(prefix, path))
            found |= {f"{'.'.join(path)} {number}": problem for number, problem in enumerate(words)}
            continue
        branch = next((n for n, part in enumerate(path) if part == "str" or part.startswith("dict[")), None)
        if branch is None:
            found[".".join(path)] = _explain(each, root, prefix)
        elif branch == len(path) - 1:  # of text or a mapping, neither
            where = _dotted(prefix, path[:branch])
            words = f"{where}: must be a name, or a mapping of names, found {shown(each['input'])}"
            found.setdefault(".".join(path[:branch]), words)
        else:
            found[".".join(path[:branch])] = _explain(
                {**each, "loc": path[:branch] + path[branch + 1 :]}, root, prefix
            )
    return list(found.values())


def keys_of(root: type[BaseModel], path: Sequence[str] = ()) -> list[str]:
    """The keys that a document knows at a place.

    Args:
        root: of the document.
        path: of keys; numbers stand for items of lists.

    Example:
        >>> class Inner(Strict):
        ...     a: int = 0
        >>> class Outer(Strict):
        ...     items: tuple[Inner, ...] = ()
        >>> keys_of(Outer, ["items", "0"])
        ['a']
    """
    for key in path:
        if not key.isdecimal():
            field = root.model_fields.get(key)
            inner = None if field is None else next(documents_in(field.annotation), None)
            if inner is None:
                return []
            root = inner
    return list(root.model_fields)


def documents_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The documents that a key's annotation holds, within lists and alternatives."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from documents_in(inner)


def _explain(error: Any, root: type[BaseModel], prefix: str) -> str:
    path = [shown_text(str(part), 60) for part in error["loc"]]
    where = _dotted(prefix, path)
    if error["type"] == "extra_forbidden":
        return f"'{where}' is not a known key, {advice_on(path[-1], keys_of(root, path[:-1]))}"
    message = error["msg"].removeprefix("Value error, ")
    message = shown_text(message[:1].lower() + message[1:], 400)
    if error["type"] in _BOUNDS:
        message = f"must be {_BOUNDS[error['type']].format(**error.get('ctx', {}))}"
    found = "" if error["type"] in ("missing", "value_error") else f", found {shown(error['input'])}"
    near = ""
    if error["type"] == "literal_error":
        words = re.findall(r"'([^']*)'", error["ctx"]["expected"])
        advice = advice_on(shown_text(str(error["input"])), words)
        near = f", {advice}" if advice.startswith("did you") else ""
    return f"{where}: {message}{found}{near}" if where else message


def _dotted(prefix: str, path: Sequence[str]) -> str:
    return ".".join([prefix, *path] if prefix else path)
