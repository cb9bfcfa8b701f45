"""Evaluation from an artifact alone says what the run said; a dry run and trackers of training."""

import pytest
from command_line import surgery as command

import surgery
from surgery.core.registry import find_method
from surgery.errors import LoadError, PlanError
from surgery.pipeline.train import evaluate_artifact, train_recipe
from surgery.settings.recipe import Recipe
from surgery.settings.training import Training
from surgery.training.tasks.tasks import Task
from surgery.training.train import train

SOURCE = """
import torch
from torch import nn

def net():
    layers = [nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2)]
    return nn.Sequential(*layers), (torch.zeros(2, 4),)

def data(batch):
    x = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
    batches = list(zip(x.split(batch), (x[:, 0] > 0).long().split(batch)))
    return {"train": batches, "validation": batches[:2]}
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(SOURCE)
    loss = {"cross_entropy": 1.0, "distillation": 1.0}
    task = {"data": "mine.py:data", "batch": 8, "loss": loss, "metric": "accuracy"}
    return {
        "models": [{"name": "net", "model": "mine.py:net", "tasks": [task]}],
        "parameters": {"block": "8x8", "context": 1},
        "train": {"steps": 3, "generations": 1},
        "out": "out",
    }


def test_distillation_is_evaluated_against_the_member_as_it_was(recipe, tmp_path):
    report = train_recipe(Recipe.of(recipe), cpu=True)[1]
    found = evaluate_artifact("out", trust_remote_code=True, part="validation")["net"]
    assert found.loss == pytest.approx(report.scores["net"].loss, rel=1e-5)
    assert (found.metric, found.measure) == (report.scores["net"].metric, "accuracy")
    loaded = surgery.load("out", trust_remote_code=True)
    assert loaded.names == ("net",)


def test_a_folder_that_was_not_trained_has_nothing_to_evaluate(recipe, tmp_path):
    command("merge", "mine.py:net", "--max-error", "0", "--out", tmp_path / "merged", "--quiet")
    with pytest.raises(PlanError, match=r"merged was not trained and records none: give a folder"):
        evaluate_artifact(tmp_path / "merged", trust_remote_code=True)


def test_without_the_original_evaluation_says_what_is_missing(recipe, tmp_path, monkeypatch):
    recipe["models"][0]["tasks"][0]["loss"] = "distillation"
    train_recipe(Recipe.of(recipe), cpu=True)

    def gone(*arguments, **options):
        raise LoadError("there is nothing")

    monkeypatch.setattr("surgery.pipeline.train.load_origin", gone)
    with pytest.raises(LoadError, match=r"task 'net'.*'net' as it was before.*there is nothing"):
        evaluate_artifact("out", trust_remote_code=True)


def test_a_dry_run_of_training_tells_its_tasks_and_length(recipe, tmp_path):
    Recipe.of(recipe)
    (tmp_path / "r.yaml").write_text(Recipe.of(recipe).to_yaml())
    said = " ".join(command("train", "r.yaml", "--dry-run")[1].split())
    assert "1 cross_entropy + 1 distillation" in said and "accuracy" in said
    assert "Would be trained: 2 generations (0 burn-in, 1 evolution, 1 final) of 3 steps" in said
    assert "Would be fitted" not in said


def test_phases_are_those_of_the_methods_that_have_some():
    config = {"burn_in": 1, "generations": 2, "final": 3}
    for change, words in (("evolve", "evolution"), ("random", "random draws")):
        training = Training(**config, evolution={"change": change})
        assert find_method("hypermodules").phases(training) == f"1 burn-in, 2 {words}, 3 final"
    assert find_method("hypermodules").phases(Training(evolution={"change": "none"})) == ""
    hardened = Training(**config, templates={"harden": True})
    assert find_method("templates").phases(hardened) == "the last 3 with hardened templates"
    assert find_method("templates").phases(Training()) == ""


def test_trackers_that_are_not_there_are_refused(tmp_path):
    from training_nets import build

    with pytest.raises(PlanError, match=r"tensorbored cannot be imported: accelerate knows .*tensorboard"):
        train(build(), [Task("t", "a", [])], {"trackers": ["tensorbored"]}, folder=tmp_path, cpu=True)
