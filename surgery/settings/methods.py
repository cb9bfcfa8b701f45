"""Methods by name: of this package, registered ones, and of installed packages; naming them imports none of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from pydantic import ValidationError

from surgery.disk.untrusted import shown
from surgery.errors import MissingMethodError, PlanError
from surgery.settings.names import RELATED, SHIPPED_METHODS
from surgery.settings.problems import InnerError, Strict, advice_on
from surgery.util.text import one_line

ENTRY_POINTS = "surgery.methods"

REGISTERED: dict[str, Any] = {}
"""Methods whose modules were imported, by name."""


@cache
def installed() -> dict[str, EntryPoint]:
    """Methods that installed packages offer, by name."""
    return {point.name: point for point in entry_points(group=ENTRY_POINTS)}


def known_methods() -> list[str]:
    """All methods that banks can be of: those that can be asked for, and those that a fit takes by itself."""
    return [*dict.fromkeys((*SHIPPED_METHODS, *REGISTERED, *installed(), *RELATED))]


def method_names() -> list[str]:
    """All methods that can be asked for, those of this package first."""
    return [name for name in known_methods() if name not in RELATED]


def summary_of(name: str) -> str:
    """What a method does in one line; of one that is installed and not imported, what its package says of itself."""
    if name in SHIPPED_METHODS:
        return SHIPPED_METHODS[name]
    if name in REGISTERED:
        return REGISTERED[name].summary
    point = installed().get(name)
    if point is None or point.dist is None:
        return ""
    return (point.dist.metadata.get_all("Summary") or [""])[0]


def settings_class(name: str) -> type[Strict]:
    """The class of a method's settings; of a method of this package, nothing else is imported for it.

    Raises:
        PlanError: where there is no such method, or its package cannot be imported.
    """
    if name in SHIPPED_METHODS:
        return import_module(f"surgery.methods.{name}.settings").Settings
    return load_method(name).settings


def validate_settings(method: str, given: Mapping[str, Any]) -> Strict:
    """The settings of a method; the package of a method that is not ours is imported.

    Args:
        method: its name.
        given: what a recipe says under `settings`.

    Raises:
        ValueError: for a setting of another method; an `InnerError` for all else that is wrong.
        PlanError: where there is no such method, or its package cannot be imported.
    """
    kind = settings_class(method)
    for name in given:
        known = dict.fromkeys((*SHIPPED_METHODS, *REGISTERED))
        others = [each for each in known if name in settings_class(each).model_fields]
        if others and name not in kind.model_fields:
            raise ValueError(of_another_method(f"settings.{name}", others, method))
    try:
        return kind.model_validate(dict(given))
    except ValidationError as error:
        raise InnerError(error, kind) from None


def of_another_method(name: str, methods: Sequence[str], found: str) -> str:
    """What is wrong with a setting that only other methods than the one that was asked for have, in words."""
    return f"`{name}` needs {' or '.join(f'`method={each}`' for each in methods)}, found method {found}"


def unknown_method(name: object) -> str:
    """What is wrong with the name of a method that is not known, in words."""
    advice = advice_on(str(name), method_names())
    near = f", {advice}" if advice.startswith("did you") else ""
    return f"must be one of {', '.join(method_names())}, found {shown(name)}{near}"


def package_of(method: str) -> str:
    """The package that a method comes from, for whoever does not have it; empty for one of this package.

    Example:
        >>> package_of("templates")
        ''
    """
    package = type(load_method(method)).__module__.partition(".")[0]
    return "" if package == __name__.partition(".")[0] or not package.isascii() else package


def missing_method(needs: str, method: str, package: str, what: str) -> MissingMethodError:
    """The error for an artifact's method that is not here.

    Args:
        needs: what needs it, such as `Member 'net'`.
        method: its name.
        package: where it comes from, as the artifact says; empty where it says nothing.
        what: the method does there, as words after "which".
    """
    named = (
        f"{needs} needs method {shown(method)}{f' of package {package!r}' if package else ''}, which {what}"
    )
    if method in known_methods():
        try:
            load_method(method)
        except PlanError as error:
            return MissingMethodError(f"{named}: {error}")
    get = (
        "that package"
        if package
        else f"the package that offers it (an entry point of that name in the group {ENTRY_POINTS})"
    )
    return MissingMethodError(
        f"{named} and is not installed here: install {get}, or import it before loading."
    )


def load_method(name: str) -> Any:
    """The method of this name, its module imported.

    Raises:
        PlanError: where there is none, naming those that there are, or its package cannot be imported.
    """
    if name not in REGISTERED and name in (*SHIPPED_METHODS, *RELATED):
        import_module(f"surgery.methods.{name}.method")
    if name not in REGISTERED and name in installed():
        point = installed()[name]
        try:
            point.load()
        except Exception as error:  # of somebody else's package
            raise PlanError(
                f"Method '{name}' needs {point.value}, which cannot be imported: {one_line(error)}; mend or reinstall "
                "the package that offers it."
            ) from error
    if name not in REGISTERED:
        raise PlanError(f"`method` {unknown_method(name)}; install or import the package that registers it.")
    return REGISTERED[name]
