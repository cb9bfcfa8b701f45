"""A merge of large models that was killed goes on where it was, to the same bytes; what cannot is one sentence."""

from __future__ import annotations

import errno
import os
import shutil
import sys

import pytest
from artifacts import contents
from command_line import surgery
from ended_runs import kill
from surgery_cli import console

from benchmarks.random_llamas import make_folder
from surgery.disk.journal import LINES, Journal
from surgery.errors import LoadError, OutputError
from surgery.pipeline import going_on
from surgery.pipeline.merge import merge
from surgery.settings.recipe import Recipe
from surgery.util import alignment


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


def test_an_interrupted_merge_says_how_to_go_on(recipe, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(console, "interrupted", console.interrupted)
    typed = [
        "merge",
        f"{whole / 'a'}",
        f"{whole / 'b'}",
        "--max-error",
        "0.1",
        "--out",
        str(tmp_path / "joint"),
    ]

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "keep", interrupt)
    code, _, said = surgery(*typed, "-q")
    kept = tmp_path / ".joint.surgery" / going_on.JOURNAL
    assert code == 130
    assert said.endswith(
        f"interrupted; what was made is in {kept}, go on with surgery {' '.join(typed)} -q.\n"
    )


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


@pytest.mark.skipif(sys.platform != "linux", reason="mappings are read from /proc")
def test_nothing_is_kept_that_was_made_while_a_file_was_another(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(alignment, "MUCH", 1)  # as of large models, weights stay where their files have them
    for name in "ab":
        shutil.copytree(whole / name, tmp_path / name)
    file = next((tmp_path / "b").glob("*.safetensors"))
    begin, content = aligned_weights(file.read_bytes())
    file.write_bytes(content)
    changed, recipe = file.stat().st_mtime_ns, recipe_for(tmp_path / "joint", tmp_path)
    merge(recipe)
    before = contents(tmp_path / "joint")
    shutil.rmtree(tmp_path / "joint")
    monkeypatch.setattr(going_on, "LARGE", 0)
    made, keep = [], Journal.keep

    def other(*given):
        made.append(given[1])
        if len(made) == 30:
            with file.open("r+b") as opened:  # in place, of the same size
                opened.seek(begin)
                opened.write(b"\x3c" * (len(content) - begin))
        return keep(*given)

    monkeypatch.setattr(Journal, "keep", other)
    with pytest.raises(LoadError, match="was written to"):
        merge(recipe)
    assert len(made) == 30  # it is said at once
    file.write_bytes(content)
    os.utime(file, ns=(changed, changed))
    merge(recipe)
    assert contents(tmp_path / "joint") == before
    assert len(set(made)) == len(made) - 1  # what was refused alone was made twice


def aligned_weights(content):
    """A safetensors file with a header that its data begin behind at a multiple of 64 bytes, and where they do."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = content[8:end] + b" " * (-end % 64)
    return 8 + len(header), len(header).to_bytes(8, "little") + header + content[end:]
