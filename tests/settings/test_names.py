"""Each choice has one name: in Python, in recipes and on the command line."""

from __future__ import annotations

import inspect
from collections import defaultdict

import pytest
from surgery_cli.__main__ import app
from surgery_cli.flags import flags_of

import surgery
from surgery.settings.former import FORMER, TODAY
from surgery.settings.methods import settings_class
from surgery.settings.names import SHIPPED_METHODS
from surgery.settings.problems import paths_in
from surgery.settings.recipe import Recipe

PATHS = [*paths_in(Recipe), *(p for m in SHIPPED_METHODS for p in paths_in(settings_class(m), "settings"))]
BY_NAME: dict[str, list[str]] = defaultdict(list)
for path in PATHS:
    BY_NAME[path.rpartition(".")[2]].append(path)

SEVERAL = {
    "name": "of a member, of a task, of an optimizer",
    "calibrate": "files of one member, and files for all that they suit",
    "data": "of a task, and of what it adapts to",
    "options": "of a task's data, and of those that it adapts to",
    "batch": "of a task, and of what it adapts to",
    "settings": "of a method of sharing, and of a way of adaptation",
    "hypermodules": "how many a fit makes, and of how many training draws a random start",
    "lr": "of all, of a member or a task of it, and of mixtures alone",
    "start": "of the alignment, and of templates",
    "keep": "members that stay as they are, and which state of a run is kept",
    "freeze": "tensors that stay, and whether hypermodules or templates do",
    "templates": "how many there are, and how they are trained",
    "tasks": "of a member, and those of a member that have routes of their own",
    "sure": "the share of a layer's own template, and of a task's own layer",
    "harden": "templates, and routes",
    "seed": "of a run, and of orders by chance",
}
"""Names that are several choices, with what each is."""

OTHERWISE = {
    "out", "config", "changes", "resume", "fast_dev_run", "dry_run", "cpu", "overwrite", "trust_remote_code", "json",
    "quiet", "verbose", "debug", "version", "html", "member", "members", "part", "format", "only", "inputs", "origins",
    "data", "force", "show_completion", "install_completion", "base", "tie_widths", "memory", "add", "bank",
    "revision",
}  # fmt: skip
"""Flags that set no key of a recipe: what to do with it, where, and what is shown."""


def test_a_name_is_one_choice_or_says_which_ones():
    assert {name for name, paths in BY_NAME.items() if len(paths) > 1} == set(SEVERAL)


def test_a_flag_has_the_name_of_the_key_that_it_sets():
    for name, option in flags_of(app, "merge").items():
        if name not in OTHERWISE:
            assert name in BY_NAME, name
            assert max(option.opts, key=len) == f"--{name.replace('_', '-')}"


def test_every_flag_sets_a_key_or_none():
    unknown = {name for name in flags_of(app) if name not in BY_NAME and name not in OTHERWISE}
    assert unknown == set()


@pytest.mark.parametrize(
    "function",
    [
        surgery.fit, surgery.train, surgery.join, surgery.make_plan, surgery.plan_with, surgery.plan_templates,
        surgery.plan_modules, surgery.load_member, surgery.discover, surgery.save, surgery.JointModel.open,
    ],
)  # fmt: skip
def test_arguments_have_the_names_of_keys(function):
    """No argument has a name that a key had, or is another word for one."""
    python = {
        "self", "joint", "member", "members", "anatomies", "plan", "tasks", "reference", "config", "folder", "probes",
        "inputs", "resume", "cpu", "trust_remote_code", "overwrite", "recipe", "extras", "max_shard_size", "out",
        "bounds", "read", "memory",
    }  # fmt: skip
    assert {*inspect.signature(function).parameters} - python <= set(BY_NAME)


def test_former_names_are_none_of_today():
    assert not set(TODAY) & set(PATHS) and set(TODAY.values()) <= set(PATHS)
    assert len(TODAY) == len(FORMER)


def test_what_one_method_reads_has_no_second_name_among_the_parameters():
    own = {path.rpartition(".")[2] for path in PATHS if path.startswith("settings.")}
    of_templates = {path.rpartition(".")[2] for path in paths_in(settings_class("templates"), "settings")}
    assert of_templates == {"templates", "mixture", "mix_norms"} <= set(flags_of(app, "merge"))
    assert not own & {path.rpartition(".")[2] for path in PATHS if path.startswith("parameters.")}
