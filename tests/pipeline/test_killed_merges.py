"""A merge of large models that was killed goes on where it was, to the same bytes; what cannot is one sentence."""

from __future__ import annotations

import errno
import os
import shutil

import pytest
from artifacts import contents
from journals import kill

from benchmarks.scale import make_folder
from surgery.disk.journal import LINES, Journal
from surgery.errors import OutputError
from surgery.pipeline import going_on
from surgery.pipeline.merge import merge
from surgery.settings.recipe import Recipe


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A pair of models, and what a merge writes that nothing interrupts and that keeps no journal."""
    folder = tmp_path_factory.mktemp("whole")
    for seed, name in enumerate("ab"):
        make_folder(folder / name, "fast", seed)
    merge(recipe_for(folder / "joint", folder))
    return folder


@pytest.fixture
def recipe(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(going_on, "LARGE", 0)
    return recipe_for(tmp_path / "joint", whole)


def recipe_for(out, folder):
    models = [{"model": str(folder / name)} for name in "ab"]
    return Recipe.of({"models": models, "parameters": {"max_error": 0.1}, "device": "cpu", "out": str(out)})


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
def test_a_killed_merge_goes_on_to_the_same_bytes(recipe, whole, tmp_path, monkeypatch):
    kill(f"merge.merge(Recipe.of({recipe.model_dump(mode='json')!r}))", 80)
    assert not (tmp_path / "joint").exists()
    kept = []
    monkeypatch.setattr(
        Journal, "keep", lambda *given, keep=Journal.keep: kept.append(given[1]) or keep(*given)
    )
    merge(recipe)
    assert contents(tmp_path / "joint") == contents(whole / "joint")
    assert kept
    assert not any(key.startswith(("sensitivities", "precisions")) for key in kept)  # made before the kill
    assert not list(tmp_path.glob(".joint*"))


def test_what_cannot_go_on_is_one_sentence_and_the_journal_stays(recipe, whole, tmp_path, monkeypatch):
    shutil.copytree(whole / "joint", tmp_path / "joint")
    before = contents(tmp_path / "joint")
    left, write = [30], Journal._write

    def full(*given):
        left[0] -= 1
        if not left[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(*given)

    monkeypatch.setattr(Journal, "_write", full)
    with pytest.raises(OutputError, match="the disk is full"):
        merge(recipe, overwrite=True)
    assert contents(tmp_path / "joint") == before
    journal = tmp_path / ".joint.surgery" / going_on.JOURNAL
    with pytest.raises(OutputError, match="another recipe was asked for"):
        merge(recipe.model_copy(update={"seed": 1}), overwrite=True)
    file = next((whole / "b").glob("*.safetensors"))
    changed = file.stat().st_mtime_ns
    os.utime(file, ns=(changed, changed + 1))
    with pytest.raises(OutputError, match=rf"{file} was written to"):
        merge(recipe, overwrite=True)
    os.utime(file, ns=(changed, changed))
    (journal / "5.bin").write_bytes(b"")
    (journal / LINES).open("ab").write(b'{"key": "not who')
    merge(recipe, overwrite=True)
    assert contents(tmp_path / "joint") == before
    assert not journal.exists()
