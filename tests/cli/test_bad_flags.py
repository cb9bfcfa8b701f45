"""A bad value of a flag is an error that names the flag as it was typed; one of a recipe names the recipe's key."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from command_line import surgery as command
from surgery_cli.__main__ import app
from typer.core import TyperOption

NETS = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    layers = (nn.Linear(8, 8) for _ in range(3))
    return nn.Sequential(nn.Linear(3, 8), *layers, nn.Linear(8, 2)), torch.zeros(2, 3)

def data(batch=4):
    return [(torch.zeros(4, 3), torch.zeros(4, dtype=torch.long))]
"""
RECIPE = {
    "models": [{"model": "nets.py:net", "name": "net", "tasks": [{"data": "nets.py:data"}]}],
    "train": {"steps": 1, "generations": 1, "final": 0, "burn_in": 0},
}
MERGE, TRUST = ("merge", "nets.py:net", "--out", "new"), ("--trust-remote-code",)
STACKS = (*MERGE, "--method", "templates")
TRAIN = ("train", "recipe.yaml", "--cpu", "--out", "new")
EXPORT = ("export", "joint", *TRUST)
BAD: dict[tuple[tuple[str, ...], str], tuple[str, ...]] = {
    (("push", "joint", "me/joint", "--dry-run"), "--revision"): ("a b", "../x", "a..b"),
    (("push", "joint", "me/joint", "--dry-run"), "--base"): ("a b", "../x", "me/base"),
    (MERGE, "--max-error"): ("-1", "nan", "inf", "much"),
    (MERGE, "--budget"): ("0", "1.5", "nan", "half"),
    (MERGE, "--hypermodules"): ("0", "1e3", str(10**30)),
    (STACKS, "--templates"): ("0", "x", str(10**9)),
    (MERGE, "--templates"): ("4",),  # of another method
    (STACKS, "--hypermodules"): ("4",),
    (MERGE, "--mixture"): ("softmax",),
    (STACKS, "--mixture"): ("hard",),
    (MERGE, "--stacks"): ("*",),
    (STACKS, "--stacks"): ("encoder.*", "re:("),
    (MERGE, "--block"): ("16", "0x4", "999x999", "4x4x4"),
    (MERGE, "--context"): ("0", str(10**9)),
    (MERGE, "--private"): ("9.weight", "re:("),
    (MERGE, "--sites"): ("9.weight", "1.bias"),
    (MERGE, "--skip"): ("9.weight", "re:("),
    (MERGE, "--calibrate"): ("nowhere.txt", "other=nets.py"),
    (MERGE, "--method"): ("magic", "template"),
    (MERGE, "--config"): ("nowhere.yaml", "nets.py"),
    (MERGE, "--set"): ("x", "models.7.name=x"),
    (MERGE, "--seed"): ("-1", str(2**32), "x"),
    (MERGE, "--device"): ("abacus",),
    (MERGE, "--memory"): ("much", "-1GB", "0", "8XiB", "1MB"),
    (MERGE[:2], "--out"): ("nets.py", "joint"),
    (TRAIN, "--set"): ("x",),
    (TRAIN, "--resume"): ("always",),
    (TRAIN, "--add"): ("new=nets.py:net",),  # to a recipe, which names its members
    (("train", "trained", "--cpu", "--out", "new", *TRUST), "--add"): ("new", "net=nets.py:net", "=nets.py:net"),
    (TRAIN, "--bank"): ("melted",),
    (TRAIN, "--seed"): ("-1", "x"),
    (TRAIN[:3], "--out"): ("nets.py", "joint"),
    (("inspect", "nets.py:net"), "--private"): ("9.weight",),
    (("inspect", "nets.py:net"), "--sites"): ("9.weight", "re:(", "1.bias"),
    (("inspect", "nets.py:net"), "--skip"): ("9.weight",),
    (("inspect", "nets.py:net"), "--seed"): ("-1",),
    (("inspect", "nets.py:net"), "--only"): ("all",),
    (("inspect", "nets.py:net"), "--inputs"): ("nowhere.npz", "nets.py"),
    (("evaluate", "trained", *TRUST), "--member"): ("other",),
    (("evaluate", "trained", *TRUST), "--part"): ("all",),
    (("evaluate", "trained", *TRUST), "--data"): ("nowhere", "nowhere.npz"),
    (("report", "joint"), "--html"): ("nets.py",),
    (("report", "joint"), "--out"): ("pictures",),  # of no run
    ((*EXPORT, "--out", "new"), "--member"): ("other",),
    ((*EXPORT, "--out", "new", "--member", "net", "--format", "lora"), "--base"): ("./nowhere",),
    ((*EXPORT, "--out", "new", "--member", "net", "--format", "lora", "--base", "nets.py:net"), "--max-error"): (
        "-1", "0", "x",
    ),
    ((*EXPORT, "--out", "new", "--member", "net", "--format", "lora", "--base", "nets.py:net"), "--calibrate"): (
        "nowhere.txt", "other=nets.py",
    ),
    ((*EXPORT, "--member", "net"), "--out"): ("nets.py", "joint"),
    ((*EXPORT, "--member", "net", "--out", "new"), "--format"): ("zip",),
    **{
        (words, flag): values
        for words in (("add", "joint", "new=nets.py:net", *TRUST), ("refit", "joint", *TRUST))
        for flag, values in {
            "--max-error": ("-1", "nan", "much"), "--budget": ("0", "1.5"), "--device": ("abacus",),
            "--calibrate": ("nowhere.txt", "other=nets.py"),
        }.items()
    },
    (("demo",), "--out"): ("nets.py",),
    (("demo",), "--max-error"): ("x",),
    (("demo",), "--seed"): ("x",),
}  # fmt: skip


def verbs(command: Any = None) -> Iterator[Any]:
    inner = getattr(command or typer.main.get_command(app), "commands", {})
    for each in inner.values():
        yield from verbs(each)
    if command is not None and not inner:
        yield command


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flags")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        (folder / "nets.py").write_text(NETS)
        (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
        assert command("merge", "nets.py:net", "--out", "joint", "--max-error", "0", "-q")[0] == 0
        assert command("train", "recipe.yaml", "--cpu", "--out", "trained", "-q")[0] == 0
    return folder


def test_every_flag_with_a_value_has_bad_ones():
    known = {
        (verb.name, max(option.opts, key=len))
        for verb in verbs()
        for option in verb.params
        if isinstance(option, TyperOption) and not option.is_flag
    }
    assert known == {(words[0], flag) for words, flag in BAD}


@pytest.mark.parametrize(
    ("words", "flag", "value"),
    [(words, flag, value) for (words, flag), values in BAD.items() for value in values],
    ids=lambda each: each if isinstance(each, str) else each[0],
)
def test_a_bad_value_is_an_error_that_names_its_flag(place, monkeypatch, words, flag, value):
    monkeypatch.chdir(place)
    before = sorted(place.rglob("*"))
    code, _, said = command(*words, flag, value)
    said = " ".join(re.sub(r"[│╭╮╰╯─]", " ", said).split())
    assert code == 2 and flag in said and "Traceback" not in said, said
    keys = r"\b(parameters|select|settings)\.|`|\b(?<!--)(templates|hypermodules|seed|budget|mixture): (must|input)"
    assert not re.search(keys, said.replace("for example parameters.budget=0.5", "")), said
    left = [each for each in place.rglob("*") if "__pycache__" not in each.parts]
    assert sorted(left) == [each for each in before if "__pycache__" not in each.parts]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"parameters": {"budget": 0}}, "parameters.budget: must be above 0, found 0"),
        ({"settings": {"templates": 4}}, "`settings.templates` needs --method templates"),
        ({"parameters": {"budget": 0.5, "max_error": 0.1}}, "found parameters.max_error and parameters.budget"),
        ({"select": {"skip": ["9.weight"]}}, "Every `select.skip` must match"),
        ({"seed": -1}, "is not valid: seed: must be 0 or more"),
    ],
)  # fmt: skip
def test_a_bad_value_in_a_recipe_is_an_error_that_names_its_key(place, monkeypatch, tmp_path, changes, said):
    monkeypatch.chdir(place)
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(changes))
    code, _, err = command(*MERGE, "--config", tmp_path / "bad.yaml", "--device", "cpu")
    assert code == 2 and said in err, err


def test_what_is_set_last_is_named_by_its_key(place, monkeypatch):
    monkeypatch.chdir(place)
    code, _, err = command(*MERGE, "--budget", "0.5", "--set", "parameters.budget=0")
    assert code == 2 and "parameters.budget: must be above 0" in err


@pytest.mark.parametrize("flag", ["--budget", "--max-error"])
def test_a_percentage_is_answered_with_its_fraction(place, flag):
    code, _, err = command(*MERGE, flag, "10%")
    words = " ".join(err.replace("│", " ").split())
    assert code == 2 and flag in words and "write 0.1 for 10%" in words
    code, _, err = command("export", "joint", "--member", "net", "--out", "x", "--max-error", "10%")
    assert code == 2 and "write 0.1 for 10%" in " ".join(err.replace("│", " ").split())
    code, _, err = command(*MERGE, "--set", f"parameters.{flag[2:].replace('-', '_')}=10%")
    assert code == 2 and "write 0.1 for 10%" in err


def test_who_gives_options_alone_hears_of_no_recipe(place):
    code, _, err = command(*MERGE, "--block", "16")
    assert code == 2 and err.startswith("surgery: --block: ")
    code, _, err = command(*MERGE, "--set", "parameters.block=16")
    assert code == 2 and err.startswith("surgery: The recipe is not valid: ")
