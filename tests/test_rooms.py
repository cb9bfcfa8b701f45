"""The house: every module lies in a room, no import runs upwards, and no modules import one another in a circle.

Imports within functions count as any others. Those for types alone do not: an interface may name what lies above it.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import surgery

ROOT = Path(surgery.__file__).parent

ROOMS = (
    "errors", "integrations.arrival", "permission", "version",
    "disk", "util", "handles", "safetensors",
    "settings.problems", "settings.quantities", "settings.names",
    "methods.hypermodules.settings", "methods.templates.settings",
    "geometry", "members.extra_state", "members.replacement", "members.member", "tracing", "inputs", "settings",
    "members",
    "storage.codecs", "storage.keys", "anatomy", "core.bank", "core.dictionary", "core.kernel", "core.foreign_parts",
    "core.moves", "core.method", "core.tensor_method", "core.registry", "methods.rows", "core.generation", "slots",
    "core", "storage",
    "fitting", "training.tasks.score", "training.report.report", "training.report.log_lines", "training.report.runlog",
    "artifact", "integrations",
    "training.tasks", "training.report", "training.loop", "training.distributed", "training",
    "methods", "page", "pipeline",
)  # fmt: skip
"""From the bottom to the top: a room imports from itself and from those before it."""


def modules() -> dict[str, Path]:
    """Every module of the package by its name below `surgery`."""
    found = {}
    for path in ROOT.rglob("*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix("__init__").rstrip(".")
        if name:
            found[name] = path
    return found


def room(module: str) -> int | None:
    """The place of a module's room, by the longest name that it begins with."""
    fitting = [each for each in ROOMS if module == each or module.startswith(f"{each}.")]
    return ROOMS.index(max(fitting, key=len)) if fitting else None


def runs(node: ast.AST) -> Iterator[ast.AST]:
    """A node and all below it, without those that only a type checker reads."""
    yield node
    for below in ast.iter_child_nodes(node):
        if not (isinstance(below, ast.If) and ast.unparse(below.test) == "TYPE_CHECKING"):
            yield from runs(below)


def imports(path: Path, known: dict[str, Path]) -> set[str]:
    """Modules that a file imports, when it is imported itself or within functions, but not for types alone.

    A module that is imported from its package is looked up in the front of it, so the front is imported too.
    """
    found = set()
    for node in runs(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("surgery."):
            base = (node.module or "").removeprefix("surgery.")
            found |= {
                base,
                *(inner for a in node.names if (inner := f"{base}.{a.name}") in known),
            } & known.keys()
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix("surgery.") for a in node.names if a.name.startswith("surgery.")}
    return found


def test_every_module_lies_in_a_room():
    assert [module for module in modules() if room(module) is None] == []
    assert {"errors.py", "permission.py", "version.py", "__init__.py"} == {p.name for p in ROOT.glob("*.py")}


def test_no_import_runs_upwards():
    known = modules()
    upwards = [
        f"{module} imports {other}"
        for module, path in known.items()
        for other in imports(path, known)
        if (there := room(other)) is None or there > (room(module) or 0)
    ]
    assert upwards == []


def test_no_circles():
    known = modules()
    edges = {module: imports(path, known) - {module} for module, path in known.items()}

    def reach(start: str) -> set[str]:
        seen: set[str] = set()
        left = list(edges[start])
        while left:
            each = left.pop()
            if each not in seen:
                seen.add(each)
                left += edges.get(each, ())
        return seen

    assert [module for module in known if module in reach(module)] == []


def test_the_architecture_names_every_room():
    page = (ROOT.parent / "docs" / "architecture.md").read_text()
    folders = {path.parent.relative_to(ROOT).as_posix() for path in ROOT.rglob("__init__.py")} - {"."}
    assert [folder for folder in sorted(folders) if f"`surgery/{folder}/`" not in page] == []


def test_no_two_test_files_have_one_name():
    """Tests lie in folders that are no packages, where pytest imports a file by its name alone."""
    seen = Counter(path.name for path in Path(__file__).parent.rglob("test_*.py"))
    assert [name for name, times in seen.items() if times > 1] == []
