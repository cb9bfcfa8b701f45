"""A merge reads files that others may touch, on machines that may have too little memory: one sentence each."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest
from artifacts import contents
from command_line import surgery

from benchmarks.random_llamas import make_folder
from surgery.errors import LoadError
from surgery.pipeline.merge import merge
from surgery.settings.recipe import Recipe
from surgery.util import alignment


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.setattr(alignment, "MUCH", 1)  # as of large models, weights stay where their files have them
    for seed, name in enumerate("ab"):
        make_folder(tmp_path / name, "fast", seed)
    models = [{"model": str(tmp_path / name)} for name in "ab"]
    return Recipe.of({"models": models, "parameters": {"max_error": 0}, "out": str(tmp_path / "joint")})


@pytest.mark.skipif(sys.platform != "linux", reason="mappings are read from /proc")
@pytest.mark.parametrize(("moment", "gone"), [("join", False), ("write_front", False), ("join", True)])
def test_a_file_that_changes_while_it_is_merged_is_named_and_the_target_stays(
    recipe, tmp_path, monkeypatch, moment, gone
):
    merge(recipe)
    before = contents(tmp_path / "joint")
    module = {"join": "surgery.core.joining", "write_front": "surgery.artifact.writing"}[moment]
    original = getattr(__import__(module, fromlist=[moment]), moment)

    def changed(*args, **kwargs):
        file = next((tmp_path / "b").glob("*.safetensors"))
        if gone:
            file.unlink()
        else:
            file.write_bytes(file.read_bytes())  # the same bytes, written anew
        return original(*args, **kwargs)

    monkeypatch.setattr(f"{module}.{moment}", changed)
    found = "is gone" if gone else "was written to"
    with pytest.raises(LoadError, match=rf"safetensors must stay as it is .*, but {found}"):
        merge(recipe, overwrite=True)
    assert contents(tmp_path / "joint") == before


CUT = """
import mmap, os, sys
from surgery_cli.endings import cut_off_files_are_said
with open(sys.argv[1], "r+b") as file, cut_off_files_are_said():
    held = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    os.truncate(sys.argv[1], 10)
    held[1 << 19]
"""


@pytest.mark.skipif(not hasattr(signal, "SIGBUS"), reason="no such signal")
def test_a_file_that_is_cut_off_while_it_is_mapped_ends_a_command_with_a_sentence(tmp_path):
    (tmp_path / "weights").write_bytes(bytes(1 << 20))
    command = [sys.executable, "-c", CUT, str(tmp_path / "weights")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 2, ended
    assert ended.stderr.startswith("surgery: A file was cut off while") and ended.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory")]
)
def test_too_little_memory_is_one_sentence_that_names_the_stage(recipe, tmp_path, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("surgery.core.joining.join", fail)
    code, _, said = surgery("merge", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "joint", "-q")
    assert code == 2 and said.startswith(
        "surgery: There was not enough memory (the last step was: Joining)."
    ), said
    assert not (tmp_path / "joint").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.parametrize(
    ("verb", "fails", "more"),
    [
        ("verify", "surgery.artifact.verify.wrong_hashes", ()),
        ("export", "surgery.artifact.export.dissolve", ("--member", "a", "--format", "plain", "--out")),
    ],
)
def test_too_little_memory_of_other_verbs_is_one_sentence(recipe, tmp_path, monkeypatch, verb, fails, more):
    merge(recipe)

    def fail(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(fails, fail)
    more = (*more, tmp_path / "plain") if more else ()
    code, _, said = surgery(verb, tmp_path / "joint", *more, "-q")
    assert code == 2 and said.startswith("surgery: There was not enough memory"), said
    assert "--max-error" not in said
    assert not (tmp_path / "plain").exists()


def test_too_little_memory_while_a_model_is_built_is_none_of_the_models(recipe, tmp_path, monkeypatch):
    from transformers import LlamaForCausalLM

    def fail(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(LlamaForCausalLM, "__init__", fail)
    code, _, said = surgery("merge", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "joint", "-q")
    assert code == 2 and said.startswith("surgery: There was not enough memory (the last step was: Loading")
    assert said.count("\n") == 1, said


def test_another_runtime_error_is_none_of_memory(recipe, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("a fault")

    monkeypatch.setattr("surgery.core.joining.join", fail)
    with pytest.raises(RuntimeError, match="a fault"):
        surgery("merge", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "joint", "-q")
