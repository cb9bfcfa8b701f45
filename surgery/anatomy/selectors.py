"""Selectors that apply to every member in which they match a tensor."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence

from surgery.errors import PlanError


def share_selectors(
    selectors: Sequence[str], names: Mapping[str, Sequence[str]], what: str = "selector"
) -> dict[str, list[str]]:
    """Give each member the selectors that mean a tensor of its own.

    Args:
        selectors: exact tensor names or `re:REGEX`; `MEMBER:` in front limits one to that member.
        names: the tensor names of each member.
        what: the option's name, for errors.

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
        try:
            matching = [each for each in where if any(matches(own, name) for name in names[each])]
        except re.error as error:
            bad.append(f"'{selector}' is no regular expression ({error})")
            continue
        for each in matching:
            shared[each].append(own)
        if not matching:
            every = {name for each in where for name in names[each]}
            close = difflib.get_close_matches(own.removeprefix("re:"), every, n=3)
            bad.append(f"'{selector}' matches none" + (f" (close: {', '.join(close)})" if close else ""))
    if bad:
        raise PlanError(
            f"Every {what} must match a tensor of a member, but {'; '.join(bad)}; correct or remove it."
        )
    return shared


def matches(selector: str, name: str) -> bool:
    """Whether a selector means the tensor of this name; a regular expression must match all of it."""
    if selector.startswith("re:"):
        return re.fullmatch(selector[3:], name) is not None
    return selector == name
