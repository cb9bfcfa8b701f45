"""Growing: a member more for a joint model; those that were there stay bit for bit, or are trained on."""

import hashlib
import json

import pytest
import torch
import yaml
from command_line import surgery as command
from training_nets import build, tasks

import surgery
from surgery.methods.hypermodules.bank import HypermoduleBank
from surgery.settings.training import Training
from surgery.training.train import train

OWN = """
import torch
from torch import nn

def net(seed=0):
    torch.manual_seed(int(seed))
    parts = [nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)]
    return nn.Sequential(*parts, nn.Linear(16, 2)), torch.zeros(2, 4)

def data(batch=8, seed=0):
    x = torch.randn(32, 4, generator=torch.Generator().manual_seed(1))
    y = (x.sum(1) > 0).long()
    return {"train": [(x[:16], y[:16])] * 2, "validation": [(x[16:], y[16:])]}
"""
RECIPE = {
    "models": [
        {"name": name, "model": f"own.py:net?seed={seed}", "tasks": [{"data": "own.py:data"}]}
        for seed, name in enumerate("ab")
    ],
    "parameters": {"block": "4x4", "context": 2},
    "train": {
        "steps": 3, "generations": 4, "final": 1, "optimizer": {"lr": 0.01, "soft_lr": 0.5},
        "evolution": {"fraction": 0.5, "challengers": 2, "alpha": 0.5, "price": 20.0},
    },
}  # fmt: skip
NEW = ("--add", "new=own.py:net?seed=7", "--set", "models.2.tasks.0.data=own.py:data")


def hashes(folder):
    joint = surgery.load(folder, trust_remote_code=True)
    return {
        f"{name}.{key}": hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()
        for name in ("a", "b")
        for key, tensor in joint.collapse(name).items()
    }


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    place = tmp_path_factory.mktemp("growing")
    (place / "own.py").write_text(OWN)
    (place / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        code, _, error = command("train", "recipe.yaml", "--out", "one", "--cpu", "--json")
    assert code == 0, error
    return place


def grown(first, monkeypatch, out, *more):
    monkeypatch.chdir(first)
    code, text, error = command(
        "train", "one", "--out", out, "--cpu", "--json", "--trust-remote-code", *NEW, *more
    )
    assert code == 0, error
    return json.loads(text)


def test_members_of_a_frozen_bank_stay_bit_for_bit(first, monkeypatch):
    one = surgery.load(first / "one", trust_remote_code=True).dictionary["4x4-float32"]
    assert bool((one.uses > 1).any())  # its members share, or this test shows less
    report = grown(first, monkeypatch, "frozen")
    assert hashes("frozen") == hashes("one")
    joint = surgery.load("frozen", trust_remote_code=True)
    assert list(joint.names) == ["a", "b", "new"]
    assert list(report["scores"]) == ["new"]  # the others were not run
    fresh = {}
    exec(OWN, fresh)
    before = fresh["net"](7)[0].state_dict()
    assert any(not torch.equal(t, before[name]) for name, t in joint.collapse("new").items())
    recorded = {model.name: model for model in joint.recipe.models}
    assert recorded["a"].tasks and recorded["new"].tasks  # what they do is known of all
    code, text, error = command("evaluate", "frozen", "--part", "validation", "--trust-remote-code", "--json")
    assert code == 0 and len(json.loads(text)) >= 1, error
    # Going on trains all of them again.
    code, _, error = command("train", "frozen", "--out", "on", "--cpu", "--json", "--trust-remote-code")
    assert code == 0, error
    assert hashes("on") != hashes("one")


@pytest.mark.slow
def test_a_refined_bank_is_trained_on(first, monkeypatch):
    report = grown(first, monkeypatch, "refined", "--bank", "refined")
    assert sorted(report["scores"]) == ["a", "b", "new"]
    assert hashes("refined") != hashes("one")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("one", "--add", "a=own.py:net"), "names that are not taken, found a"),
        (("one", "--add", "own.py:net"), "NAME=REF"),
        (("recipe.yaml", "--add", "new=own.py:net"), "in place of RECIPE"),
        (("one", "--add", "new=own.py:net"), "models.2.tasks.0.data"),
        (("one", "--add", "new=none.py:net", *NEW[2:]), "none.py"),
        (("one", *NEW, "--set", "train.optimizer.weight_decay=0.1"), "weight_decay 0"),
    ],
)
def test_bad_input_is_answered_in_a_sentence(first, monkeypatch, arguments, words):
    monkeypatch.chdir(first)
    code, _, error = command("train", *arguments, "--out", "x", "--cpu", "--trust-remote-code")
    assert code != 0 and "Traceback" not in error
    assert words in " ".join(error.replace("│", " ").split())


def test_kept_members_in_python():
    joint = build(dropout=0.0, block=(4, 4), context=2)
    first, second = joint.names
    before = {key: tensor.clone() for key, tensor in joint.collapse(first).items()}
    own = [task for task in tasks() if task.member == second]
    config = {
        "steps": 3, "generations": 4, "final": 1, "keep": [first], "optimizer": {"lr": 0.01, "soft_lr": 0.5},
        "evolution": {"fraction": 1.0, "challengers": 2, "alpha": 0.5, "draw": "uniform"},
    }  # fmt: skip
    train(joint, own, config, cpu=True)
    after = joint.collapse(first)
    assert all(torch.equal(tensor, before[key]) for key, tensor in after.items())
    bank = joint.dictionary["4x4-float32"]
    assert isinstance(bank, HypermoduleBank) and bank.kept is not None
    assert bool(bank.kept_hypermodules[bank.psi[~bank.kept]].any())  # what it has is used by the other


def test_what_cannot_be_kept_is_said():
    joint = build(dropout=0.0, block=(4, 4), context=2)
    with pytest.raises(surgery.PlanError, match="found nobody") as error:
        train(joint, tasks(), {"keep": ["nobody", joint.names[0]]}, cpu=True)
    assert "which train.keep says stays as it is" in str(error.value)
    for wrong in ({"evolution": {"start": "order"}}, {"optimizer": {"weight_decay": 0.1}}):
        with pytest.raises(ValueError, match="'keep' need"):
            Training(keep=("a",), **wrong)
