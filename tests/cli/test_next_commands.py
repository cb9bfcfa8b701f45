"""What the tool prints as the next command works as printed; what it wrote works from any working directory."""

import shlex

import numpy as np
import pytest
import torch
import yaml
from command_line import surgery as command
from ended_runs import stopped_at
from tiny_transformers import save_tiny

import surgery
from surgery.disk.places import into_artifact, of_recipe_file, out_of_artifact

SOURCE = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))

def data(batch):
    x = torch.randn(48, 6, generator=torch.Generator().manual_seed(0))
    batches = list(zip(x.split(batch), x[:, :3].argmax(1).split(batch)))
    return {"train": batches, "validation": batches[:2], "test": batches[2:3]}
"""
RECIPE = {
    "models": [
        {"name": "net", "model": "mine.py:net", "tasks": [
            {"data": "mine.py:data", "batch": 16, "loss": {"cross_entropy": 1, "distillation": 0.1}, "metric": "f1"}
        ]},
        {"name": "arrays", "model": "mine.py:net", "tasks": [
            {"data": "files/own.npz", "batch": 16, "options": {"validation": 8}, "metric": "top2"}
        ]},
    ],
    "parameters": {"block": "8x8", "context": 1},
    "train": {"steps": 2, "generations": 1, "final": 0, "save_seconds": 0},
}  # fmt: skip


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A recipe's folder with code and data, and the working directory beside it."""
    home = tmp_path / "my project"
    (home / "files").mkdir(parents=True)
    (home / "mine.py").write_text(SOURCE)
    x = np.random.default_rng(0).normal(size=(40, 6)).astype("f")
    np.savez(home / "files" / "own.npz", inputs=x, targets=x[:, :3].argmax(1))
    (home / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return home


def printed(shown):
    """The commands below the last `Next`."""
    lines = shown.rpartition("Next\n")[2].splitlines()
    found = [shlex.split(line) for line in lines if line.startswith("  surgery ")]
    assert found, shown
    return [words[1:] for words in found]


def run_all(shown):
    for words in printed(shown):
        code, shown, said = command(*words)
        assert (code, said) == (0, ""), (words, said)
    return shown


def test_every_next_command_of_a_training_runs_from_elsewhere_and_after_a_move(
    project, tmp_path, monkeypatch
):
    code, shown, said = command("recipes", "check", "../my project/recipe.yaml")
    assert (code, said) == (0, "")
    (train,) = printed(shown)
    code, shown, said = command(*train, "--cpu")
    assert (code, said) == (0, "")
    assert "--trust-remote-code" in printed(shown)[1]
    evaluated = run_all(shown)
    assert (tmp_path / "work" / "recipe").is_dir()
    facts = yaml.safe_load((tmp_path / "work" / "recipe" / "recipe.yaml").read_text())
    assert facts["models"][1]["tasks"][0]["data"] == "../../my project/files/own.npz"
    assert facts["models"][0]["model"] == "../../my project/mine.py:net"

    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("my project", "work"):
        (tmp_path / name).rename(moved / name)
    (tmp_path / "else").mkdir()
    monkeypatch.chdir(tmp_path / "else")
    folder = "../moved/work/recipe"
    code, shown, said = command("evaluate", folder, "--trust-remote-code")
    assert (code, said, shown) == (0, "", evaluated)
    assert command("verify", folder, "--origins", "--trust-remote-code")[::2] == (0, "")
    assert command("evaluate", folder)[0] == 2, "code out of an artifact runs with consent alone"
    code, shown, said = command("train", folder, "--out", "on", "--trust-remote-code", "--cpu")
    assert (code, said) == (0, "")
    run_all(shown)


def test_a_run_goes_on_from_another_working_directory(project, tmp_path, monkeypatch):
    with stopped_at(1):
        code, _, said = command(
            "train", "../my project/recipe.yaml", "--out", "m", "--cpu", "--resume", "never"
        )
    assert code == 130
    again = said.partition("go on with ")[2].rstrip(".\n")
    assert again == "surgery train '../my project/recipe.yaml' --out m --cpu --resume auto"
    monkeypatch.chdir(project)
    code, shown, said = command("train", "recipe.yaml", "--out", "../work/m", "--cpu", "--resume", "auto")
    assert (code, said) == (0, "")
    run_all(shown)


def test_next_commands_of_a_merge_and_paths_of_a_folder(project, tmp_path, monkeypatch):
    save_tiny("bert", tmp_path / "bert")
    code, shown, said = command(
        "merge", "text=../bert", "../my project/mine.py:with_inputs", "--out", "a joint"
    )
    assert code == 2 and "with_inputs" in said
    (project / "mine.py").write_text(SOURCE + "\ndef with_inputs():\n    return net(), torch.zeros(2, 6)\n")
    code, shown, said = command(
        "merge", "text=../bert", "../my project/mine.py:with_inputs", "--out", "a joint"
    )
    assert (code, said) == (0, "")
    run_all(shown)
    assert (tmp_path / "work" / "text-plain" / "config.json").is_file()
    (tmp_path / "else").mkdir()
    monkeypatch.chdir(tmp_path / "else")
    code, shown, _ = command("verify", "../work/a joint", "--origins", "--trust-remote-code", "--json")
    assert code == 0 and shown.count('"origin": "same"') == 2, shown


def test_saving_what_was_loaded_gives_the_same_bytes_from_anywhere(project, tmp_path, monkeypatch):
    (project / "mine.py").write_text(SOURCE + "\ndef with_inputs():\n    return net(), torch.zeros(2, 6)\n")
    monkeypatch.chdir(project)
    torch.manual_seed(0)
    joint = surgery.join([surgery.load_member("mine.py:with_inputs", name="n")])
    surgery.save(joint, "one", recipe={"models": [{"model": "mine.py:with_inputs", "name": "n"}]})
    assert surgery.load("one", trust_remote_code=True).members["n"].origin.reference == "mine.py:with_inputs"
    monkeypatch.chdir(tmp_path / "work")
    surgery.save(surgery.load(project / "one", trust_remote_code=True), project / "two")
    for name in ("manifest.json", "recipe.yaml", "README.md"):
        assert (project / "one" / name).read_bytes() == (project / "two" / name).read_bytes()


@pytest.mark.parametrize(
    ("typed", "from_file"),
    [
        ("mine.py:net?width=3", "sub/mine.py:net?width=3"),
        ("package.module:net", "package.module:net"),
        ("timm:resnet18", "timm:resnet18"),
        ("timm:resnet18?num_classes=3", "timm:resnet18?num_classes=3"),
        ("timm:resnet18=w.pth", "timm:resnet18=sub/w.pth"),
        ("timm:resnet18?in_chans=1&num_classes=3=w.pth", "timm:resnet18?in_chans=1&num_classes=3=sub/w.pth"),
        ("/there/mine.py:net", "/there/mine.py:net"),
        ("~/mine.py:net", "~/mine.py:net"),
        ("bert", "sub/bert"),
        ("org/name@rev", "org/name@rev"),
        ("../up.py:net", "up.py:net"),
    ],
)
def test_references_keep_their_meaning(typed, from_file, tmp_path, monkeypatch):
    """From a recipe's file, and through an artifact: out of what it was put into is what it was."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub" / "bert").mkdir(parents=True)
    assert of_recipe_file("sub/recipe.yaml").reference(typed) == from_file
    inside = into_artifact("deep/er/out").reference(from_file)
    outside = "./sub/bert" if from_file == "sub/bert" else from_file  # could be a name on the hub
    assert out_of_artifact("deep/er/out").reference(inside) == outside
    if inside != from_file:
        assert "../../../" in inside
    assert out_of_artifact("deep/er/out").reference(typed) in (typed, "deep/er/up.py:net")


def test_every_path_of_a_recipe_is_changed_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    document = {
        "models": [{
            "model": "n=m.py:f", "calibrate": "c.txt", "name": "x.py",
            "tasks": [{
                "data": "d.csv", "options": {"tokenizer": "t", "text": "t"},
                "adaptation": {"part": "a", "data": "m.py:g", "options": {"file": "f"}},
            }],
        }],
        "calibrate": ["x=s.txt", "p"],
        "train": {"templates": {"source": "src"}, "freeze": ["a"]},
        "out": "o",
    }  # fmt: skip
    found = of_recipe_file("r/recipe.yaml").recipe(document)
    task = found["models"][0]["tasks"][0]
    assert found["models"][0]["model"] == "n=r/m.py:f" and found["models"][0]["calibrate"] == "r/c.txt"
    assert found["models"][0]["name"] == "x.py"
    assert (task["data"], task["options"]) == ("r/d.csv", {"tokenizer": "r/t", "text": "t"})
    assert task["adaptation"] == {"part": "a", "data": "r/m.py:g", "options": {"file": "f"}}
    assert found["calibrate"] == ["x=r/s.txt", "r/p"] and found["out"] == "r/o"
    assert found["train"] == {"templates": {"source": "r/src"}, "freeze": ["a"]}
    assert of_recipe_file("r/x").recipe({"models": 3, "train": [1]}) == {"models": 3, "train": [1]}
