"""Private that three members of a recipe share: from the run to its artifact and on, in one process or two."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from command_line import surgery as command
from safetensors import safe_open

import surgery
from surgery.pipeline.train import rejoin, train_recipe
from surgery.settings.recipe import Recipe
from surgery.training.loop.interruptions import Interrupted
from surgery.training.loop.run import STATE
from surgery.training.loop.trainer import Trainer

NAMES, KEYS = ("one", "two", "three"), ("blocks.0.norm1.weight", "blocks.1.norm2.bias", "pos_embed")


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    """Three small vision transformers, the last with another head, on pictures drawn at random."""
    folder, draw = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    models = []
    for number, name in enumerate(NAMES):
        inputs, targets = draw.random((60, 1, 28, 28), dtype=np.float32), draw.integers(10, size=60)
        np.savez(folder / f"{name}.npz", inputs=inputs, targets=targets)
        net = f"surgery_recipes.isometric:vit?layers=2&width=16&heads=2&classes={10 + number // 2}"
        data = {"data": str(folder / f"{name}.npz"), "options": {"validation": 12}, "batch": 15}
        models.append({"name": name, "model": net, "tasks": [data]})
    train = {
        "steps": 5, "generations": 2, "final": 0, "save_seconds": 0, "stopping": {"keep": "last"},
        "evolution": {"change": "none", "codes": "ones"}, "templates": {"start": "uniform"},
        "share": ["re:.*norm.*", "pos_embed", "head.bias"],
    }  # fmt: skip
    parameters = {"templates": 2, "mixture": "softmax"}
    return {"models": models, "method": "templates", "parameters": parameters, "train": train}


@pytest.fixture(scope="module")
def whole(document, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "joint"
    return (*train_recipe(Recipe.of({**document, "out": str(out)}), cpu=True), out)


def assert_shared(states):
    for key in KEYS:
        assert all(torch.equal(states["one"][key], states[name][key]) for name in NAMES), key
    assert torch.equal(states["one"]["head.bias"], states["two"]["head.bias"])
    assert len(states["three"]["head.bias"]) == 11  # of another shape: its own
    assert not torch.equal(states["one"]["patch_embed.proj.bias"], states["two"]["patch_embed.proj.bias"])


def test_an_artifact_gives_every_member_what_was_shared(whole):
    joint, report, out = whole
    states = joint.collapse()
    assert_shared(states)
    loaded = surgery.load(out)
    for name, state in loaded.collapse().items():
        for key, tensor in state.items():
            torch.testing.assert_close(tensor, states[name][key], rtol=1e-5, atol=1e-6)
        assert all(torch.equal(state[key], states[name][key]) for key in KEYS)
    private = sum(p.numel() for name in NAMES for p in joint.extract(name).parameters())
    assert report.trained < private
    code, said, error = command("verify", out)
    assert code == 0 and "everything matches" in said, error


def test_a_large_shared_private_tensor_is_stored_once(document, tmp_path):
    wide = [{**m, "model": m["model"].replace("width=16", "width=64")} for m in document["models"]]
    recipe = Recipe.of({**document, "models": wide, "out": str(tmp_path / "joint")})
    train_recipe(recipe, fast_run=True, cpu=True)
    kept = 0
    for path in (tmp_path / "joint" / "members").glob("*/*.safetensors"):
        with safe_open(path, "pt") as file:
            kept += "pos_embed" in set(file.keys())
    assert kept == 1


def test_it_goes_on_from_the_artifact_with_the_same_private_tensors_shared(whole, document, tmp_path):
    _, before, out = whole
    recipe = Recipe.of({**document, "out": str(tmp_path / "more")})
    joint, report = train_recipe(recipe, joint=rejoin(out, recipe, own=True), cpu=True)
    assert report.trained == before.trained
    assert_shared(joint.collapse())
    assert not torch.equal(joint.collapse("one")[KEYS[0]], surgery.load(out).collapse("one")[KEYS[0]])


def test_cut_off_and_resumed_it_is_the_same(whole, document, tmp_path, monkeypatch):
    plain, count = Trainer.train_step, [0]

    def step(self):
        count[0] += 1
        if count[0] == 8:
            raise Interrupted
        plain(self)

    recipe = Recipe.of({**document, "out": str(tmp_path / "joint")})
    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        patched.setattr(Trainer, "train_step", step)
        train_recipe(recipe, cpu=True)
    assert (tmp_path / "joint.training" / STATE).exists()
    joint, _ = train_recipe(recipe, resume=True, cpu=True)
    for name, state in joint.collapse().items():
        assert all(torch.equal(tensor, whole[0].collapse(name)[key]) for key, tensor in state.items())


@pytest.mark.slow
def test_two_processes_share_them_too(whole, document, tmp_path):
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(document))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0"]
    launch += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "-m", "surgery_cli", "train"]
    done = subprocess.run(
        [*launch, str(tmp_path / "r.yaml"), "--out", str(tmp_path / "joint"), "--cpu"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    found = surgery.load(tmp_path / "joint").collapse()
    assert_shared(found)
    for name, state in whole[0].collapse().items():
        for key, tensor in state.items():
            torch.testing.assert_close(
                found[name][key], tensor, rtol=1e-2, atol=1e-4
            )  # sums in another order
