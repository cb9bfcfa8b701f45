"""Former names of settings: documents that older versions wrote, or that were written for them, keep their meaning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from surgery.disk.untrusted import shown
from surgery.settings.names import DEFAULT_METHOD


@dataclass(frozen=True)
class Former:
    """A setting that has another name today.

    Attributes:
        former: its path in a recipe of an older version.
        name: its path today.
        method: the method whose setting it is; of another method's recipe it is left out.
        default: its value where none was given, which artifacts of older versions record all the same. It gives way to
            what another former name of the setting says.
        ignored: whether any value was accepted, and had no effect, with another method than its own.
    """

    former: str
    name: str
    method: str = ""
    default: Any = None
    ignored: bool = False


FORMER = (
    Former("select.adapters", "select.private"),
    Former("train.precision", "train.mixed_precision"),
    Former("parameters.templates", "settings.templates", "templates"),
    Former("parameters.mixture", "settings.mixture", "templates", "linear", ignored=True),
    Former("parameters.mix_norms", "settings.mix_norms", "templates", False),
    Former("train.templates.count", "settings.templates", "templates", ignored=True),
    Former("train.templates.mixing", "settings.mixture", "templates", "softmax", ignored=True),
)
"""In the order in which they are read."""

TODAY = {each.former: each.name for each in FORMER}
"""Today's paths by former ones."""

DEFAULTS: dict[str, Any] = {
    "evolution.scale": "contexts",
    "evolution.fraction": 0.5,
    "evolution.alpha": 0.5,
    "evolution.heat": 0.1,
    "evolution.normalise": False,
    "evolution.narrow": False,
    "evolution.merges": 0.0,
    "evolution.splits": None,
    "evolution.price": 0.0,
    "evolution.judge": "gradients",
    "evolution.reward_rate": 1.0,
    "stopping.best": "all",
    "sync_norms": False,
    "alternate": False,
}
"""Defaults of former versions under `train`, by path: a run that began with them goes on with them."""


def renewed(document: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A recipe's document with today's names, and what is wrong with it: settings with two values, by two names.

    Args:
        document: of any version; it is left as it is.

    Example:
        >>> renewed({"method": "templates", "parameters": {"templates": 4, "budget": 0.5}})[0]
        {'method': 'templates', 'parameters': {'budget': 0.5}, 'settings': {'templates': 4}}
    """
    found, wrong = dict(document), list[str]()
    method = found.get("method", DEFAULT_METHOD)
    for each in FORMER:
        *path, key = each.former.split(".")
        place = _at(found, path)
        if place is None or key not in place:
            continue
        value = place[key]
        _put(found, path, {name: inner for name, inner in place.items() if name != key})
        plain = value == each.default and type(value) is type(each.default)
        if each.method not in ("", method) and (plain or each.ignored):
            continue
        *path, key = each.name.split(".")
        there = _at(found, path)
        if there is None and path[0] in found and found[path[0]] is not None:
            continue  # no mapping: its own validation says so
        if key not in (there or {}):
            _put(found, path, {**(there or {}), key: value})
        elif (there or {})[key] != value and not (plain and each.method):
            wrong.append(
                f"{each.name} has two values, {shown((there or {})[key])} and, by its former name {each.former}, "
                f"{shown(value)}: give {each.name} alone"
            )
    return found, wrong


def _at(document: Mapping[str, Any], path: list[str]) -> Mapping[str, Any] | None:
    """The mapping at a place of a document; None where there is none."""
    place: Any = document
    for key in path:
        place = place.get(key) if isinstance(place, Mapping) else None
    return place if isinstance(place, Mapping) else None


def _put(document: dict[str, Any], path: list[str], value: Mapping[str, Any]) -> None:
    """Put a mapping at a place of a document whose own level may be changed, and no other."""
    place = document
    for key in path[:-1]:
        place[key] = dict(place[key])
        place = place[key]
    place[path[-1]] = value
