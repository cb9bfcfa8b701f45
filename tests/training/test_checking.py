"""One validator: what is wrong with a training run is named together, the same everywhere, before anything is slow."""

import pytest
import torch
import yaml
from command_line import surgery as command
from training_nets import build, tasks

from surgery.errors import PlanError, TrainingError
from surgery.members.origins.definitions import function_problem
from surgery.pipeline.train import prepare_training, train_recipe
from surgery.settings.recipe import Recipe
from surgery.training.checking import check_document
from surgery.training.tasks.tasks import Task
from surgery.training.train import train

SOURCE = """
import sys
sys.exit("this file must not run")

def net(width=4): ...
def data(batch, *, size): ...
"""
WRONG = {
    "models": [
        {"name": "a", "model": "mine.py:nett", "tasks": [
            {"data": "mine.py:data", "loss": {"mse": 1, "cros_entropy": 1}, "metric": "f1_scor", "bach": 2},
            {"name": "t", "data": "there.npz", "metric": {"f1": {"averag": "macro"}}},
            {"name": "t", "data": "data.txt", "labels": False, "loss": "mse"},
        ]},
        {"name": "b", "model": "timm:resnet18", "tasks": [
            {"data": "mine.npz", "options": {"validatoin": 0.1}, "loss": "moments"},
        ]},
    ],
    "train": {
        "optimizer": {"name": "adma", "lr": -1, "schedule": "cosin"},
        "evolutoin": {},
        "trackers": ["tensorbored"],
    },
    "parameters": {"budget": 0.5},
    "out": "out",
}  # fmt: skip
SAID = [
    "models.0.model: mine.py has no function 'nett', did you mean 'net'?",
    "no loss 'cros_entropy', did you mean 'cross_entropy'?",
    "no metric 'f1_scor', did you mean 'F1Score'?",
    "'models.0.tasks.0.bach' is not a known key, did you mean 'batch'?",
    "models.0.tasks.0.data: mine.py:data needs the argument size",
    "models.0.tasks.1.data: the data file there.npz does not exist",
    "takes no argument 'averag', did you mean 'average'?",
    "models.0.tasks.2.data: A task's data must be a function",
    "models.0.tasks.2.labels: mse compares with targets, which training does not see",
    "task 't' is given more than once",
    "'validatoin' is not a known option, did you mean 'validation'?",
    "models.1.tasks.0.adaptation: moments needs it",
    "found 'adma', did you mean 'adam'?",
    "train.optimizer.lr: must be above 0, found -1",
    "found 'cosin', did you mean 'cosine'?",
    "'train.evolutoin' is not a known key, did you mean 'evolution'?",
    "tensorbored cannot be imported",
    "parameters.budget: this is the target of a fit, and training has none",
]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(SOURCE)
    (tmp_path / "mine.npz").write_bytes(b"")
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(WRONG))
    return tmp_path


@pytest.mark.parametrize(
    "verb",
    [["recipes", "check", "wrong.yaml"], ["train", "wrong.yaml", "--dry-run"], ["train", "wrong.yaml"]],
    ids=["check", "dry-run", "train"],
)
def test_every_verb_names_all_that_is_wrong_in_one_error(here, verb):
    code, _, said = command(*verb)
    assert code == 2
    assert [each for each in SAID if each not in " ".join(said.split())] == []


def test_python_names_the_same_for_a_recipe_whose_keys_are_known(here):
    document = {**WRONG, "train": {"trackers": ["tensorbored"]}}
    document["models"] = [
        {**m, "tasks": [{k: v for k, v in t.items() if k != "bach"} for t in m["tasks"]]}
        for m in WRONG["models"]
    ]
    recipe = Recipe.of(document)
    for run in (prepare_training, train_recipe):
        with pytest.raises(PlanError) as caught:
            run(recipe)
        keys = ("bach", "adma", "optimizer", "cosin", "evolutoin")
        assert [s for s in SAID if s not in str(caught.value) and not any(k in s for k in keys)] == []


def test_settings_tasks_and_selectors_in_python_come_in_one_error():
    bad = [
        Task("t", "c", [1], "msee", "accurcy", weight=0),
        Task("u", "a", [1], {"mse": float("nan")}, metric=3),
    ]
    config = {"optimizer": {"name": "adma"}, "genrations": 2}
    with pytest.raises(PlanError) as caught:
        train(build(), bad, config)
    for said in (
        "trains member 'c', but the members are a, b", "no loss 'msee', did you mean 'mse'", "did you mean 'accuracy'",
        "weight 0", "weight of loss mse must be a finite number, found nan", "found a int",
        "found 'adma', did you mean 'adam'", "'train.genrations' is not a known key, did you mean 'generations'",
    ):  # fmt: skip
        assert said in str(caught.value)
    with pytest.raises(PlanError, match=r"train\.freeze.*0\.wieght"):
        train(build(), tasks(), {"freeze": ["0.wieght"]})
    with pytest.raises(PlanError, match=r"train\.freeze.*dictionary"):
        train(build(), tasks(), {"freeze": [r"re:dictionary\.banks.*"]})  # not a member's own


class Counting(list):
    """Data that count how often they are asked."""

    asked = 0

    def __iter__(self):
        type(self).asked += 1
        return super().__iter__()


X, Y = torch.randn(8, 4), torch.zeros(8, dtype=torch.long)


@pytest.mark.parametrize(
    ("task", "said"),
    [
        (Task("t", "a", [(X, Y)], test=[(X[:, :3], Y)]), r"test data.*\[8, 3\].*mat1 and mat2"),
        (Task("t", "a", [(X, Y)], validation=[(X, Y + 7)]), r"validation data.*Target 7 is out of bounds"),
        (
            Task("t", "a", [(X, Y)], metric="accuracy", validation=[X]),
            "'accuracy'.*its validation data give none",
        ),
        (Task("t", "a", [(X, Y)], metric={"f1": {"average": "none"}}, test=[(X, Y)]), r"one number|takes no"),
        (Task("t", "a", [(X, Y)], validation=[]), "validation data of task 't' are empty"),
        (Task("t", "a", [(X, Y)], validation=[(X, Y, Y)]), "'t', validation data: .*found a tuple of 3"),
    ],
)
def test_what_data_show_is_said_before_the_first_step(task, said, monkeypatch):
    from surgery.training.loop.trainer import Trainer

    monkeypatch.setattr(Trainer, "train_step", lambda self: pytest.fail("a step was made"))
    with pytest.raises((PlanError, TrainingError), match=said):
        train(build(), [task], {"steps": 1}, cpu=True)


def test_a_rehearsal_leaves_everything_as_it_was():
    """Data that can be read once, random numbers and running statistics are untouched: results stay what they were."""
    from surgery.training.tasks.rehearsal import rehearse

    once = iter([(X, Y)])
    net = torch.nn.Sequential(torch.nn.BatchNorm1d(4), torch.nn.Dropout(0.5), torch.nn.Linear(4, 2))
    before, mean = torch.get_rng_state(), net[0].running_mean.clone()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), 2, shuffle=True)
    rehearse({"a": net}, [Task("t", "a", once), Task("u", "a", loader, validation=Counting([(X, Y)]))], {})
    assert next(once)[0] is X and Counting.asked == 1
    assert (
        torch.equal(torch.get_rng_state(), before) and torch.equal(net[0].running_mean, mean) and net.training
    )


@pytest.mark.parametrize(
    ("text", "reference", "options", "said"),
    [
        ("def f(a, b=1): ...", "m.py:f", ["a"], None),
        ("def f(a, b=1): ...", "m.py:f", [], "needs the argument a"),
        ("def f(a, b=1): ...", "m.py:f", ["a", "bb"], "takes no argument bb, did you mean 'b'"),
        ("def f(**more): ...", "m.py:f", ["x"], None),
        ("@wrap\ndef f(): ...", "m.py:f", ["x"], None),
        ("from x import *", "m.py:f", [], None),
        ("try:\n    from x import f\nexcept ImportError:\n    f = None", "m.py:f", [], None),
        ("g = 1", "m.py:f", [], "it defines none"),
        ("def f(:", "m.py:f", [], "cannot be read as Python: SyntaxError"),
        ("", "n.py:f", [], "the file n.py of n.py:f does not exist"),
        ("", "m.py:", [], "names no function"),
        ("", "no_such_package.x:f", [], "the package no_such_package"),
        ("", "surgery_recipes.mnist:mnst", [], "did you mean 'mnist'"),
        ("", "torch.nn:Linear", ["anything"], None),
    ],
)
def test_functions_are_found_without_running_their_file(
    tmp_path, monkeypatch, text, reference, options, said
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.py").write_text(text)
    found = function_problem(reference, options)
    assert (found is None) if said is None else (found is not None and said in found)


def test_a_recipe_without_faults_passes(here):
    task = {"data": "mine.py:data", "options": {"size": 2}, "loss": {"mse": 1, "distillation": 1}}
    task["metric"] = {"top3": {}}
    document = {"models": [{"name": "a", "model": "mine.py:net?width=3", "tasks": [task]}], "train": {}}
    assert check_document(document).models[0].tasks[0].metric == {"top3": {}}
