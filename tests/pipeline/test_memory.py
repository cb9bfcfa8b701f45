"""What a merge holds in memory: of models that lie in files, next to nothing."""

from __future__ import annotations

import sys

import pytest

from benchmarks.random_llamas import make_folder
from benchmarks.scale import MIB, Sampler, memory
from surgery.artifact.verify import verify
from surgery.disk import aside
from surgery.pipeline import going_on
from surgery.pipeline.merge import merge
from surgery.settings.recipe import Recipe
from surgery.util import alignment
from surgery.util.memory import give_back


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("size", ["0.03", pytest.param("0.1", marks=pytest.mark.slow)])
def test_a_lossless_merge_holds_a_fraction_of_its_models(tmp_path, monkeypatch, size):
    monkeypatch.setattr(
        alignment, "MUCH", 2**20
    )  # the pair is small for a model, and not aligned in its files
    merge(recipe_of(tmp_path / "small", "fast"))  # imports whatever a merge imports on its way
    recipe = recipe_of(tmp_path / "large", size)
    total = sum(file.stat().st_size for file in tmp_path.glob("large/*/*.safetensors"))
    give_back()
    before = memory()["anonymous"]
    with Sampler() as merging:
        merge(recipe)
    peaks = {stage: each["anonymous"] - before for stage, each in merging.peaks.items()}
    assert max(peaks.values()) < 0.5 * total / MIB, peaks  # it once was 4 times the files
    assert verify(tmp_path / "large" / "joint", origins=True).ok


def recipe_of(folder, size):
    for seed, name in enumerate("ab"):
        make_folder(folder / name, size, seed)
    models = [{"model": str(folder / name)} for name in "ab"]
    return Recipe.of({"models": models, "parameters": {"max_error": 0}, "out": str(folder / "joint")})


@pytest.mark.skipif(sys.platform != "linux", reason="large tensors are put into files on Linux alone")
@pytest.mark.parametrize("asked", [{"max_error": 0.1}, pytest.param({"budget": 0.4}, marks=pytest.mark.slow)])
def test_what_lies_in_files_meanwhile_changes_no_byte(tmp_path, monkeypatch, asked):
    base = tmp_path / "a"
    make_folder(base, "fast", 0)
    make_folder(tmp_path / "b", "fast", 1, base if "budget" in asked else None)
    models = [{"model": str(tmp_path / name)} for name in "ab"]
    recipe = {"models": models, "parameters": asked, "device": "cpu"}
    merge(Recipe.of({**recipe, "out": str(tmp_path / "plain")}))
    monkeypatch.setattr(going_on, "LARGE", 0)
    monkeypatch.setattr(aside, "FEWEST", 1)
    put = []
    monkeypatch.setattr(aside, "_room", lambda *given, room=aside._room: put.append(given) or room(*given))
    merge(Recipe.of({**recipe, "out": str(tmp_path / "aside")}))
    assert len(put) > 100  # codes, gradients, trial weights
    assert files_of(tmp_path / "plain") == files_of(tmp_path / "aside")
    assert not list(tmp_path.glob(".aside*"))


def files_of(folder):
    return {
        path.name: path.read_bytes() for path in folder.rglob("*") if path.suffix in (".safetensors", ".json")
    }
