"""Screens: lines that fit, signs of life, silence where it is asked for, values to complete, objects in a few lines."""

import gzip
import importlib
import io
import json
import logging
import os
import shlex
import subprocess
import sys
import typing

import pytest
import torch
import training_nets
import typer
from command_line import surgery as command
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text
from surgery_cli import completion, console, screen
from surgery_cli.__main__ import app, with_values
from surgery_cli.hush import hush

import surgery
from surgery.settings.documents import recipe_names
from surgery.util.progress import reporting, task
from surgery.util.showing import MOST, as_text

VERBS = ("demo", "inspect", "merge", "train", "evaluate", "report", "verify", "export")
COMMAND = typer.main.get_command(app)
COMMANDS = COMMAND.commands


@settings(max_examples=200, deadline=None)
@given(
    st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), max_size=120),
    st.sampled_from([40, 60, 80, 100, 200]),
    st.one_of(st.none(), st.integers(1, 10**6)),
    st.integers(0, 10**6),
    st.floats(0, 10**6),
)
def test_a_line_fits_and_its_clock_is_whole(words, width, total, done, seconds):
    job = screen.Job(words, total, began=0.0)
    if done and total:
        job.advance(min(done, total), seconds / 2)
    found = screen.line(job, width, seconds).plain
    assert cell_len(found) <= width and "\n" not in found
    assert found.endswith(screen.clock(seconds)) and "-:--" not in found
    if not job.done:
        assert "%" not in found.replace(words, "") or "%" in words


def test_the_time_left_counts_from_where_a_resumed_run_began():
    job = screen.Job("Training", 1000, began=0.0)
    job.advance(900, 1.0)  # done before
    assert job.left(50.0) is None
    job.advance(10, 11.0)
    assert job.left(11.0) == pytest.approx(90.0)
    for width in (60, 80, 100):
        assert screen.line(job, width, 11.0).plain.endswith("0:11, 1:30 left")


def test_something_shows_soon_and_is_gone_at_the_end():
    file = io.StringIO()
    shown = screen.Screen(Console(file=file, force_terminal=True, width=60))
    shown._timer.join()
    with reporting(shown), task("Fitting", 10) as work:
        work.advance(2)
        lines = [line.plain for line in shown._lines(60)]
    assert [line.plain.split()[1] for line in shown._lines(60)] == ["Working"]
    shown.close()
    assert "Starting" in file.getvalue() and len(lines) == 1 and "Fitting" in lines[0] and "20%" in lines[0]
    assert screen.PATIENCE < 0.6


def test_progress_comes_back_after_something_was_printed():
    file = io.StringIO()
    shown = screen.Screen(Console(file=file, force_terminal=True, width=60))
    shown._timer.join()
    shown.pause()
    before = len(file.getvalue())
    shown._timer.join()
    assert "Starting" in file.getvalue()[before:]
    shown.close()
    end = file.getvalue()
    shown.close()
    assert file.getvalue() == end and shown._live is None


def test_a_path_longer_than_the_screen_stays_one_word(monkeypatch):
    path = "/" + "/".join(["a-folder-of-somebody"] * 9)
    shown = io.StringIO()
    monkeypatch.setattr(console, "out", Console(file=shown, width=40, highlight=False, markup=False))
    console.say(f"Drawn into {path}, and nothing else was written anywhere, as you asked for.")
    assert path in shown.getvalue()
    others = [line for line in shown.getvalue().splitlines() if path not in line]
    assert others and max(map(len, others)) <= 40


def test_a_pipe_gets_no_colours_and_no_progress():
    for arguments in (["recipes", "ls"], ["merge", "--help"], ["verify", "nowhere"]):
        _, out, err = command(*arguments)
        assert "\x1b" not in out + err and "Starting" not in out + err


WARNING = """
import logging
import warnings
import torch

def net():
    warnings.warn("not as it seems")
    logging.getLogger("mylib").warning("look here")
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 16)).eval(), torch.zeros(2, 8)
"""


def test_quiet_is_quiet(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loud.py").write_text(WARNING)
    done = subprocess.run(
        [sys.executable, "-m", "surgery_cli", "inspect", "loud.py:net", "--quiet"],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert command("merge", "a=loud.py:net", "--out", "j", "--quiet") == (0, "", "")
    assert command("verify", "j", "--quiet") == (0, "", "")
    assert command("report", "j", "--quiet", "--html") == (0, "", "")


def test_silence_ends_with_the_command():
    for quiet in (True, False):
        with hush(quiet=quiet):
            logging.getLogger("timm").warning("hidden")
        assert logging.root.manager.disable == 0


def examples():
    for verb in VERBS:
        yield from importlib.import_module(f"surgery_cli.{verb}").EXAMPLES.strip().splitlines()
    for one in COMMANDS["recipes"].commands.values():
        yield from (line.strip() for line in one.epilog.splitlines()[1:])


@pytest.mark.parametrize("line", examples())
def test_examples_in_help_are_commands_that_exist(line):
    words = shlex.split(line)
    name, *rest = with_values(words[words.index("surgery" if "surgery" in words else "surgery_cli") + 1 :])
    one = COMMANDS[name]
    if name == "recipes":
        one, rest = one.commands[rest[0]], rest[1:]
    context = one.make_context(name, rest)
    asked = context.params.get("source") if name == "train" else context.params.get("name")
    added = context.params.get("add")  # to a folder of the user's
    assert not asked or added or str(asked).endswith(".yaml") or asked in recipe_names()


def helps(command):
    for one in getattr(command, "commands", {}).values():
        yield from helps(one)
    yield from (command.help, command.epilog, *(getattr(each, "help", None) for each in command.params))


@pytest.mark.parametrize("text", sorted({text for text in helps(COMMAND) if text and "[" in text}))
def test_brackets_in_help_are_styles_or_shown(text):
    styles = {str(span.style) for span in Text.from_markup(text).spans}
    assert styles <= {"bold", "cyan", "dim"}, "a backslash goes before a bracket that is meant"


def test_values_are_completed():
    offered_methods = dict(completion.methods(""))
    assert [*offered_methods][:2] == ["hypermodules", "templates"] and all(offered_methods.values())
    assert [name for name, _ in completion.methods("temp")] == ["templates"]
    found = [name for name, _ in completion.recipes("synthetic_")]
    assert found == [name for name in recipe_names() if name.startswith("synthetic_")] and found
    offered = {}
    for verb in VERBS:
        hints = typing.get_type_hints(getattr(importlib.import_module(f"surgery_cli.{verb}"), verb))
        for name, kind in hints.items():
            for each in (kind, *typing.get_args(kind)):
                if typing.get_origin(each) is typing.Literal:
                    offered[verb, name] = set(typing.get_args(each))
    assert offered == {
        ("merge", "mixture"): {"linear", "softmax", "one-hot"},
        ("train", "bank"): {"frozen", "refined"},
        ("train", "resume"): {"auto", "never"},
        ("evaluate", "part"): {"test", "validation", "data"},
        ("export", "format"): {"plain", "compressed", "transformers", "compressed-tensors", "lora"},
        ("inspect", "only"): {"site", "private", "skipped"},
    }


def test_members_and_folders_are_completed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "joint").mkdir()
    (tmp_path / "joint" / "manifest.json").write_text(json.dumps({"members": {"text": {}, "image": {}}}))
    (tmp_path / "plain").mkdir()
    assert list(completion.artifacts("j")) == ["joint"] and list(completion.artifacts("p")) == ["plain/"]
    context = type("Context", (), {"params": {"folder": "joint"}})
    assert list(completion.members(context, "t")) == ["text"]
    (tmp_path / "joint" / "manifest.json").write_text("{}")
    (tmp_path / "joint" / "records.json.gz").write_bytes(gzip.compress(b'{"members": {"tiny": {}}}'))
    assert list(completion.members(context, "t")) == ["tiny"]
    context.params = {"folder": "plain"}
    assert not list(completion.members(context, ""))


def test_tab_in_a_shell_offers_recipes():
    words = {
        "COMP_WORDS": "surgery train synthetic_or",
        "COMP_CWORD": "2",
        "_SURGERY_COMPLETE": "complete_bash",
    }
    code = (
        "import sys; sys.argv = ['surgery']; from surgery_cli.__main__ import app; app(prog_name='surgery')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **words}, capture_output=True, text=True
    )
    assert done.stdout.split() == ["synthetic_oracle"], done.stderr


def test_a_wrong_choice_names_the_right_ones():
    code, _, err = command("merge", "timm:resnet18", "--out", "x", "--method", "magic")
    assert code == 2 and "hypermodules" in err and "templates" in err and "Traceback" not in err


def test_objects_are_a_few_lines_and_html_is_escaped(tmp_path):
    joint = training_nets.build()
    member = next(iter(joint.members.values()))
    single = surgery.load_member(training_nets.net(2), name="n", inputs=torch.randn(2, 4))
    anatomy = surgery.discover(single)
    fitted = surgery.fit(surgery.join([single], block=(8, 8)), max_error=0.2)
    report = surgery.TrainReport(3, 2, numbers=(5, 10))
    verified = surgery.verify(surgery.save(fitted, tmp_path / "j"))
    for each in (joint, joint.plan, member, anatomy, fitted, fitted.report, report, verified):
        text = repr(each)
        assert 10 < len(text) < 1200 and len(text.splitlines()) <= MOST + 2, text
    for each in (joint, fitted, fitted.report, verified):
        assert "<table" in each._repr_html_()
    assert "3 generations" in report._repr_html_()
    joint.members["<script>"] = member
    joint.owners["<script>"] = {}
    assert "&lt;script&gt;" in joint._repr_html_() and "<script>" not in joint._repr_html_()


def test_many_members_are_not_all_listed():
    text = as_text("Many", [str(k) for k in range(100)])
    assert len(text.splitlines()) == MOST + 2 and text.endswith("and 92 more")
