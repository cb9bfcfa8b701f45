"""Selectors that apply to every member in which they match a tensor."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping, Sequence

from surgery.errors import PlanError


def share_selectors(
    selectors: Sequence[str], names: Mapping[str, Sequence[str]], what: str = "selector"
) -> dict[str, list[str]]:
    """Give each member the selectors that mean a tensor of its own.

    Args:
        selectors: exact tensor names or `re:REGEX`; `MEMBER:` in front limits one to that member.
        names: the tensor names of each member.
        what: the setting's name, for errors.

    Returns:
        selectors without a member's name in front, by member.

    Raises:
        PlanError: naming all selectors that are no regular expression or match in no member.

    Example:
        >>> share_selectors(["fc.weight", "b:re:.*bias"], {"a": ["fc.weight", "fc.bias"], "b": ["fc.bias"]})
        {'a': ['fc.weight'], 'b': ['re:.*bias']}
    """
    shared: dict[str, list[str]] = {member: [] for member in names}
    bad: list[str] = []
    for selector in selectors:
        member, colon, rest = selector.partition(":")
        limited = bool(colon) and member in names
        own = rest if limited else selector
        where = [member] if limited else list(names)
        if wrong := miss(own, {name for each in where for name in names[each]}):
            bad.append(f"'{selector}' {wrong}")
            continue
        for each in where:
            shared[each] += [own] * any(matches(own, name) for name in names[each])
    refuse({what: bad})
    return shared


def miss(selector: str, names: Collection[str]) -> str:
    """Why a selector means no tensor of these names, in words; empty where it means one."""
    try:
        if any(matches(selector, name) for name in names):
            return ""
    except re.error as error:
        return f"is no regular expression ({error})"
    close = difflib.get_close_matches(selector.removeprefix("re:"), names, n=3)
    return "matches none" + (f" (close: {', '.join(close)})" if close else "")


def refuse(wrong: Mapping[str, Sequence[str]]) -> None:
    """Raise one error for all selectors with which something is wrong.

    Args:
        wrong: what is wrong with each, in words, by the setting that has it.
    """
    found = {what: each for what, each in wrong.items() if each}
    if found:
        raise PlanError(
            f"Every {' and '.join(f'`{what}`' for what in found)} must match a tensor of a member, but "
            f"{'; '.join(each for some in found.values() for each in some)}; correct or remove it."
        )


def matches(selector: str, name: str) -> bool:
    """Whether a selector means the tensor of this name; a regular expression must match all of it."""
    if selector.startswith("re:"):
        return re.fullmatch(selector[3:], name) is not None
    return selector == name
