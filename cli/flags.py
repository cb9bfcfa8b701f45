"""Translates names of settings in the library's messages into flags of the command line."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import typer
from typer.core import TyperOption

TRUE = {"resume": "auto"}
"""What a setting that is on or off in Python is called by a flag that takes a value."""

_SETTING = re.compile(r"`([a-z]\w*(?:\.\w+)*)(?:=([^`]*))?`")


def flags_of(app: typer.Typer, verb: str | None = None) -> dict[str, TyperOption]:
    """The options of a verb, or of all, by the settings that they set."""
    found: dict[str, TyperOption] = {}
    for command in _commands(typer.main.get_command(app)):
        for option in command.params:
            if isinstance(option, TyperOption) and option.name and verb in (None, command.name):
                found.setdefault(option.name, option)
    return found


def typed_in(arguments: Sequence[str], flags: Mapping[str, TyperOption]) -> set[str]:
    """The settings whose flags a command line has."""
    words = {each.partition("=")[0] for each in arguments}
    return {name for name, option in flags.items() if words & {*option.opts, *option.secondary_opts}}


def called_by_flags(given: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """What errors call the keys of a recipe that flags gave: their flags, by path.

    Args:
        given: as a document; None and empty lists stand for what was not given.
        prefix: of the paths.

    Example:
        >>> called_by_flags({"seed": 3, "parameters": {"max_error": 0.1, "budget": None}})
        {'seed': '--seed', 'parameters.max_error': '--max-error'}
    """
    found: dict[str, str] = {}
    for key, value in given.items():
        if isinstance(value, Mapping):
            found |= called_by_flags(value, f"{prefix}{key}.")
        elif value not in (None, []):
            found[f"{prefix}{key}"] = f"--{key.replace('_', '-')}"
    return found


def in_flags(message: str, flags: Mapping[str, TyperOption], typed: Collection[str] = ()) -> str:
    """A message with flags in place of settings; what is no flag's setting stays.

    Args:
        message: with settings in backquotes, as `budget` or `budget=0.25`; one of a recipe, as `train.steps=9`.
        flags: options by setting.
        typed: settings whose flags were typed, in place of their keys in a recipe.
    """

    def flag(match: re.Match[str]) -> str:
        name, value = match.groups()
        if "." in name:
            last = name.rpartition(".")[2]
            if value is not None:
                return f"--set {name}={value}" if "changes" in flags else match[0]
            return max(flags[last].opts, key=len) if last in typed and last in flags else match[0]
        if name not in flags:
            return match[0]
        option = flags[name]
        words = max(option.opts, key=len)
        if value is None or (option.is_flag and value == "True"):
            return words
        return (
            match[0] if option.is_flag else f"{words} {TRUE.get(name, value) if value == 'True' else value}"
        )

    return _SETTING.sub(flag, message)


def _commands(command: Any) -> Iterator[Any]:
    yield command
    for each in getattr(command, "commands", {}).values():
        yield from _commands(each)
