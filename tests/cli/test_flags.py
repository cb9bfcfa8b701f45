"""The library's messages name settings, the command line's name flags."""

from __future__ import annotations

import ast
import re
import warnings
from functools import cache
from pathlib import Path

import pytest
from command_line import surgery as command
from surgery_cli.__main__ import _say, app
from surgery_cli.flags import flags_of, in_flags
from surgery_cli.hush import hush

import surgery
from surgery.errors import SurgeryWarning

COMMAND = re.compile(r"^surgery (verify|export) .*$", re.MULTILINE)  # a line of its own, for a shell
FLAGS = flags_of(app)


@cache
def literals(path: Path) -> list[tuple[int, str]]:
    """Strings of a file that are no docstrings."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    return [
        (node.lineno, node.value)
        for node in nodes
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings
    ]


def test_no_string_of_the_library_names_a_flag():
    root = Path(surgery.__file__).parent
    found = [
        f"{path.relative_to(root)}:{line} {text}"
        for path in root.rglob("*.py")
        for line, text in literals(path)
        if re.search(r"(?<![\w-])--[a-z]", COMMAND.sub("", text))
    ]
    assert found == []


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("lower `max_error`.", "lower --max-error."),
        ("use `budget=0.25` or more", "use --budget 0.25 or more"),
        ("pass `overwrite=True`", "pass --overwrite"),
        ("go on with `resume=True`", "go on with --resume auto"),
        ("choose `method=templates`", "choose --method templates"),
        ("consent with `trust_remote_code`", "consent with --trust-remote-code"),
        ("name it with `train.templates.source=DIR`", "name it with --set train.templates.source=DIR"),
        ("launch it with `fsdp_version: 2`", "launch it with `fsdp_version: 2`"),
        ("member `a.b` and `unheard_of=3`", "member `a.b` and `unheard_of=3`"),
    ],
)
def test_settings_become_flags(message, expected):
    assert in_flags(message, FLAGS) == expected


def test_flags_that_messages_ask_for_are_there():
    """Every setting that a message asks for by a value is a flag of the command line, or one of a launcher."""
    root = Path(surgery.__file__).parent
    asked = {
        name
        for path in root.rglob("*.py")
        for _, text in literals(path)
        for name in re.findall(r"`([a-z_]+)=", text)
    }
    assert asked and asked <= set(FLAGS), sorted(asked - set(FLAGS))


def test_the_command_line_names_the_flag(tmp_path):
    (tmp_path / "mine.txt").write_text("")
    code, _, said = command("merge", "timm:resnet18", "--out", tmp_path)
    assert code == 2 and "or pass --overwrite." in said


def test_warnings_of_the_library_are_said_in_flags(capsys):
    with hush(say=_say):
        warnings.warn("take `budget=0.5`, or `modules={'net': module}`", SurgeryWarning, stacklevel=1)
    assert capsys.readouterr().err == "surgery: take --budget 0.5, or `modules={'net': module}`\n"
    with pytest.warns(UserWarning, match="other"), hush(say=_say):
        warnings.warn("other `budget`", UserWarning, stacklevel=1)
