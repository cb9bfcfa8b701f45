"""Translates names of settings in the library's messages into flags of the command line."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import typer
from typer.core import TyperOption

TRUE = {"resume": "auto"}
"""What a setting that is on or off in Python is called by a flag that takes a value."""

_SETTING = re.compile(r"`([a-z]\w*(?:\.\w+)*)(?:=([^`]*))?`")


def flags_of(app: typer.Typer) -> dict[str, TyperOption]:
    """The options of all verbs by the settings that they set."""
    found: dict[str, TyperOption] = {}
    for command in _commands(typer.main.get_command(app)):
        for option in command.params:
            if isinstance(option, TyperOption) and option.name:
                found.setdefault(option.name, option)
    return found


def in_flags(message: str, flags: Mapping[str, TyperOption]) -> str:
    """A message with flags in place of settings; what is no flag's setting stays.

    Args:
        message: with settings in backquotes, as `budget` or `budget=0.25`; one of a recipe, as `train.steps=9`.
        flags: options by setting.
    """

    def flag(match: re.Match[str]) -> str:
        name, value = match.groups()
        if "." in name:
            return f"--set {name}={value}" if value is not None and "changes" in flags else match[0]
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
