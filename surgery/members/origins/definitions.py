"""Checks, from its text alone, that a file defines the function that a reference names."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterable, Iterator
from pathlib import Path

from surgery.settings.problems import advice_on
from surgery.util.text import one_line, shorten


def function_problem(reference: str, options: Iterable[str] = (), offered: Iterable[str] = ()) -> str | None:
    """What keeps `file.py:function` or `package.module:function` from being called; None where nothing is seen.

    A function may be made in ways that the text does not show: then nothing is said.

    Args:
        reference: without options.
        options: names of the arguments that it will get.
        offered: names of arguments that it gets where it takes them.

    Example:
        >>> function_problem("nothere.py:net")
        'the file nothere.py of nothere.py:net does not exist'
    """
    where, colon, name = reference.rpartition(":")
    if not colon or not name.isidentifier():
        return f"'{reference}' names no function: write path/module.py:function or package.module:function"
    path = _file_of(where)
    if isinstance(path, str):
        return f"{path} of {reference} does not exist"
    if path is None:
        return None
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError) as error:
        return f"the file {where} of {reference} cannot be read as Python: {one_line(error)}"
    found = dict(_defined(tree.body))
    if name not in found:
        if "*" in found or "__getattr__" in found:
            return None
        public = [each for each, node in found.items() if node is not None and not each.startswith("_")]
        near = advice_on(name, public) if public else "it defines none"
        return f"{where} has no function '{name}', {near.replace('known are', 'it defines')}"
    return _argument_problem(reference, found[name], list(options), set(offered))


def _file_of(where: str) -> Path | str | None:
    """The file behind a reference; what does not exist in words; None where only an import tells."""
    if where.endswith(".py") or "/" in where:
        path = Path(where).expanduser()
        return path if path.is_file() else f"the file {where}"
    package, *rest = where.split(".")
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        return f"the package {package}"
    for root in spec.submodule_search_locations or ():
        path = Path(root, *rest).with_suffix(".py") if rest else Path(root, "__init__.py")
        if path.is_file():
            return path
    return None


def _defined(body: Iterable[ast.stmt]) -> Iterator[tuple[str, ast.stmt | None]]:
    """Names that statements define, functions and classes with their nodes; `*` for names that only running shows."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name, node
        elif isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                yield (alias.asname or alias.name), None
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (
                (each.id, None)
                for target in targets
                for each in ast.walk(target)
                if isinstance(each, ast.Name)
            )
        else:
            for inner in ("body", "orelse", "finalbody", "handlers"):
                for part in getattr(node, inner, ()):
                    yield from _defined([part] if isinstance(part, ast.stmt) else getattr(part, "body", ()))


def _argument_problem(
    reference: str, node: ast.stmt | None, options: list[str], offered: set[str]
) -> str | None:
    if not isinstance(node, ast.FunctionDef) or node.decorator_list or node.args.kwarg:
        return None
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    known = [each.arg for each in arguments]
    if strange := [name for name in options if name not in known]:
        others = [name for name in known if name not in offered]
        advice = advice_on(strange[0], others) if others else "it takes none"
        return f"{reference} takes no argument {shorten(strange)}, {advice}"
    positional = [each.arg for each in (*node.args.posonlyargs, *node.args.args)]
    needed = positional[: len(positional) - len(node.args.defaults)]
    needed += [
        each.arg
        for each, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
        if default is None
    ]
    if lacking := [name for name in needed if name not in offered and name not in options]:
        return f"{reference} needs the argument {shorten(lacking)}: give it among the options"
    return None
