"""What a merge holds in memory: of models that lie in files, next to nothing."""

from __future__ import annotations

import sys

import pytest

from benchmarks.scale import MIB, Sampler, make_folder, memory
from surgery.artifact.verify import verify
from surgery.disk import aligned
from surgery.pipeline.merge import merge
from surgery.settings.recipe import Recipe
from surgery.util.memory import give_back


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_lossless_merge_holds_a_fraction_of_its_models(tmp_path, monkeypatch):
    monkeypatch.setattr(aligned, "MUCH", 2**20)  # the pair is small for a model, and not aligned in its files
    merge(recipe_of(tmp_path / "small", "fast"))  # imports whatever a merge imports on its way
    recipe = recipe_of(tmp_path / "large", "0.03")
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
