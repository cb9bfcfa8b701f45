"""Members added to an artifact, and refits: killed, they go on to the same bytes, directions of relatives too."""

from __future__ import annotations

import os
import shutil

import pytest
import torch
from artifacts import contents
from ended_runs import kill

import surgery
from benchmarks.random_llamas import make_folder
from surgery.disk.aside import is_aside
from surgery.disk.journal import Journal
from surgery.errors import OutputError
from surgery.members.member import Inputs
from surgery.pipeline import going_on
from surgery.pipeline.merge import merge
from surgery.settings.recipe import Recipe


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """A base and two fine-tunes, and an artifact of the first two."""
    folder = tmp_path_factory.mktemp("family")
    for seed, name in enumerate("abc"):
        make_folder(folder / name, "fast", seed, None if name == "a" else folder / "a")
    models = [{"model": str(folder / name)} for name in "ab"]
    recipe = {"models": models, "parameters": {"budget": 0.5}, "device": "cpu", "out": str(folder / "joint")}
    merge(Recipe.of(recipe))
    return folder


def changed(way, place, family):
    if way == "add":
        surgery.add(place, {"c": str(family / "c")}, max_error=0.2, device="cpu")
    else:
        surgery.refit(place, budget=0.4, device="cpu")


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
@pytest.mark.slow  # merges, which go on by the same mechanism, are killed by default
@pytest.mark.parametrize(("way", "parts"), [("add", 45), ("refit", 120)])
def test_what_was_killed_goes_on_to_the_same_bytes(family, tmp_path, monkeypatch, way, parts):
    whole, place = tmp_path / "whole" / "joint", tmp_path / "joint"
    shutil.copytree(family / "joint", whole)
    shutil.copytree(family / "joint", place)
    changed(way, whole, family)
    call = {
        "add": f"add({str(place)!r}, {{'c': {str(family / 'c')!r}}}, max_error=0.2, device='cpu')",
        "refit": f"refit({str(place)!r}, budget=0.4, device='cpu')",
    }[way]
    kill(f"surgery.{call}", parts)
    assert contents(place) == contents(family / "joint")
    monkeypatch.setattr(going_on, "LARGE", 0)
    with pytest.raises(OutputError, match="another recipe"):
        surgery.refit(place, budget=0.3, device="cpu")
    kept, keep = [], Journal.keep

    def noted(*given):
        assert is_aside()
        kept.append(given[1])
        return keep(*given)

    monkeypatch.setattr(Journal, "keep", noted)
    changed(way, place, family)
    assert contents(place) == contents(whole)
    assert kept and not any(key.startswith(("sensitivities", "precisions", "directions")) for key in kept)
    assert not list(tmp_path.glob(".joint*"))


def test_what_is_small_or_written_nowhere_keeps_no_journal(tmp_path, monkeypatch):
    monkeypatch.setattr(Journal, "keep", lambda *_: pytest.fail("kept"))
    tensor = torch.zeros(2, 3)
    with going_on.going_on(tmp_path / "joint", [tensor], dict) as run:
        assert not is_aside() and run.fitting == "Fitting"
    with going_on.going_on(None, [tensor], dict, large=True):
        assert not is_aside()
    assert not list(tmp_path.iterdir())


def test_inputs_that_were_given_are_told_apart():
    one = {"a": [Inputs((torch.zeros(2, 3),), {"mask": None})]}
    assert going_on.digest_of(one) == going_on.digest_of(
        {"a": [Inputs((torch.zeros(2, 3),), {"mask": None})]}
    )
    others = [
        {}, {"b": one["a"]}, {"a": one["a"] * 2}, {"a": [Inputs((torch.zeros(3, 2),), {"mask": None})]},
        {"a": [Inputs((torch.ones(2, 3),), {"mask": None})]}, {"a": [Inputs((torch.zeros(2, 3),), {"mask": 1})]},
        {"a": [Inputs((torch.zeros(2, 3).double(),), {"mask": None})]},
    ]  # fmt: skip
    assert len({going_on.digest_of(each) for each in (one, *others)}) == 8
