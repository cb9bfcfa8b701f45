"""NaN rows of unused tokens: refused by default, accepted under one name in Python, recipes and commands."""

import json

import pytest
import torch
import yaml
from command_line import surgery as run
from safetensors.torch import load_file, save_file
from tiny_transformers import tiny

import surgery
from surgery.settings.recipe import Recipe


@pytest.fixture
def folder(tmp_path):
    tiny("bert").save_pretrained(tmp_path / "bert")
    file = tmp_path / "bert" / "model.safetensors"
    state = load_file(file)
    state["embeddings.word_embeddings.weight"][90:] = float("nan")
    save_file(state, file, metadata={"format": "pt"})
    return tmp_path / "bert"


def test_unused_rows_are_accepted_on_the_command_line_and_in_a_recipe(folder, tmp_path):
    code, _, said = run("merge", folder, "--out", tmp_path / "no", "--max-error", "0", "--quiet")
    assert (
        code == 2
        and "word_embeddings" in said
        and "--allow-nonfinite" in said
        and not (tmp_path / "no").exists()
    )
    code, _, said = run(
        "merge", folder, "--out", tmp_path / "a", "--max-error", "0", "--allow-nonfinite", "--quiet"
    )
    assert code == 0, said
    recipe = yaml.safe_load((tmp_path / "a" / "recipe.yaml").read_text())
    assert recipe["allow_nonfinite"] is True
    (tmp_path / "again.yaml").write_text(yaml.safe_dump({**recipe, "out": str(tmp_path / "b")}))
    code, _, said = run("merge", "--config", tmp_path / "again.yaml", "--quiet")
    assert code == 0, said
    wanted = load_file(folder / "model.safetensors")
    for name in ("a", "b"):
        state = surgery.load(tmp_path / name).collapse("bert")
        for key, tensor in wanted.items():
            torch.testing.assert_close(state[key], tensor, rtol=0, atol=0, equal_nan=True)


def test_inspect_shows_it_too(folder):
    assert run("inspect", folder, "--json")[0] == 2
    code, out, said = run("inspect", folder, "--json", "--allow-nonfinite")
    assert code == 0 and json.loads(out), said


def test_recipes_that_do_not_ask_say_nothing():
    assert "allow_nonfinite" not in Recipe.of({"models": [{"model": "a"}]}).resolved()
