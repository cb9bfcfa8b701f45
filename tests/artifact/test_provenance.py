"""Provenance: recipe and report are typed fields, in memory and after a load, and say nothing that no longer holds."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import pickle
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from artifacts import contents, member, modules, rewrite, seeded, stack
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

import surgery
from surgery.anatomy.plan import starting_block
from surgery.core.sizes import TensorReport
from surgery.errors import ArtifactError
from surgery.fitting.report import FitReport, Probes, StackReport
from surgery.members.member import Inputs
from surgery.pipeline.merge import merge
from surgery.pipeline.train import evaluate_artifact, train_recipe
from surgery.settings.names import without_target
from surgery.settings.recipe import Recipe
from surgery.training.report.report import TrainReport
from surgery.training.tasks.score import Score

SIZES = st.dictionaries(st.sampled_from("abc"), st.integers(0, 1 << 53), max_size=3)
REPORTS = st.builds(
    FitReport,
    target=st.sampled_from(["", "max-error 0.05", "lossless"]),
    met=st.booleans(),
    original_bytes=SIZES,
    stored_bytes=st.integers(0, 1 << 53),
    saved=st.dictionaries(st.sampled_from(["sharing", "precision"]), st.integers(-(1 << 53), 1 << 53)),
    errors=st.dictionaries(st.sampled_from("abc"), st.floats(0, 1) | st.just(math.nan), max_size=3),
    hashes=st.dictionaries(st.sampled_from("abc"), st.sampled_from(["0" * 64, "ab" * 32])),
    probes=st.builds(Probes, st.none() | st.integers(0, 9), st.just(("a",)) | st.just(())),
    stacks=st.dictionaries(st.just("stack0"), st.builds(StackReport, *[st.integers(0, 99)] * 4)),
    parameters=SIZES,
    changed=st.just(()) | st.just(("a", "b")),
)


@given(REPORTS)
def test_a_report_read_back_from_json_is_written_as_the_same_json(report: FitReport):
    text = json.dumps(report.to_json(), allow_nan=False)
    found = TypeAdapter(FitReport).validate_json(text)
    assert json.dumps(found.to_json()) == text
    assert found.stacks == report.stacks and found.probes == report.probes
    repr(found)


def fitted(**target) -> surgery.JointModel:
    members = [
        member(seeded(stack, number), name, torch.zeros(2, 8)) for number, name in enumerate(modules())
    ]
    return surgery.fit(surgery.join(members), **(target or {"max_error": 0.05}))


def test_a_report_is_the_same_value_after_a_load_and_in_copies(tmp_path):
    joint = fitted()
    made = joint.report
    assert made is not None and all(isinstance(row, TensorReport) for row in made.detail)
    surgery.save(joint, tmp_path / "joint")
    found = surgery.load(tmp_path / "joint", modules=modules())
    report = found.report
    assert report is not None and report.detail == () and report.errors == made.errors
    assert report.to_json() == made.to_json() and report.bound == 0.05
    for twin in (copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
        assert twin.report == report
    assert "0.0 B" not in repr(report) and "-" in repr(report)  # sizes after the fit are not known any more
    surgery.save(found, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "joint")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"target": 3}, "report: target"),
        ({"met": "yes"}, "report: met"),
        ({"errors": {"one": "large"}}, "errors"),
        ({"errors": [0.1]}, "errors"),
        ({"hashes": {"one": "short"}}, "hashes"),
        ({"probes": {"seed": -1}}, "probes"),
        ({"stacks": {"stack0": {"layers": -1}}}, "stacks"),
        ({"saved": {"sharing": 1.5}}, "saved"),
        ({"changed": "one"}, "changed"),
        ([1], "report"),
    ],
)  # fmt: skip
def test_a_report_that_is_none_is_an_error_of_the_artifact(change, said, tmp_path):
    surgery.save(fitted(), tmp_path / "joint")
    rewrite(
        tmp_path / "joint",
        lambda m: m.update(report=m["report"] | change if isinstance(change, dict) else change),
    )
    with pytest.raises(ArtifactError, match=said.partition(":")[0]):
        surgery.load(tmp_path / "joint", modules=modules())


# -- training ------------------------------------------------------------------------------------------------

COUNTS = st.dictionaries(st.sampled_from("abc"), st.integers(0, 1 << 53), max_size=2)
SCORES = st.dictionaries(
    st.sampled_from("abc"),
    st.builds(
        Score,
        st.none() | st.floats(-1e3, 1e3),
        st.none() | st.floats(0, 1) | st.just(math.nan),
        st.integers(0, 99),
    ),
    max_size=2,
)
TRAINED = st.builds(
    TrainReport,
    generations=st.integers(0, 99),
    best=st.integers(-1, 99),
    scores=SCORES,
    tests=SCORES,
    first=SCORES,
    hypermodules=COUNTS,
    templates=COUNTS,
    numbers=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    sizes=st.just({}) | st.just({"joint": {"net": {"parameters": 3, "bytes": 12}}}),
    methods=st.just({}) | st.just({"gates": {"open": [1, 2]}}),
    stopped=st.sampled_from(["done", "no better validation in 3"]),
    seconds=st.floats(0, 1e6),
)


@given(TRAINED)
def test_a_training_s_report_read_back_is_written_as_the_same_json(report: TrainReport):
    text = json.dumps(report.to_json(), allow_nan=False)
    found = TypeAdapter(TrainReport).validate_json(text)
    assert json.dumps(found.to_json()) == text and found.seconds == 0
    of_log = TrainReport.of(json.loads(json.dumps(report.document())))
    assert of_log.document().keys() == report.document().keys()
    assert json.dumps(of_log.document()) == json.dumps(report.document())
    repr(found)


def test_after_a_training_the_report_is_its_own_until_weights_change(mine):
    made = surgery.load_member("mine.py:make", name="net", trust_remote_code=True)
    joint = surgery.fit(surgery.join([made], block=(8, 8)), max_error=0.05)
    assert isinstance(joint.report, FitReport)
    task = surgery.Task("signs", "net", [(torch.ones(4, 4), torch.zeros(4, dtype=torch.long))])
    report = surgery.train(joint, [task], TRAIN, cpu=True)
    assert isinstance(report, TrainReport) and report.scores.keys() == set() and joint.report == report
    for twin in (copy.deepcopy(joint), pickle.loads(pickle.dumps(joint))):
        assert twin.report == report
    surgery.save(joint, "python")
    found = load("python")
    assert found.report == dataclasses.replace(report, seconds=0.0)
    surgery.save(found, "again")
    assert contents(Path("again")) == contents(Path("python"))
    for each in (joint, found):
        with torch.no_grad():
            each["net"][6].bias.add_(1)
        assert each.report is None
    surgery.save(joint, "changed")
    assert "training" not in json.loads(Path("changed/manifest.json").read_text())
    assert load("changed").report.target == ""  # of the fit, what holds of any weights
    fit = surgery.fit(load("python"), budget=0.5)
    assert isinstance(fit.report, FitReport) and fit.report.target == "budget 0.5"
    surgery.save(fit, "small")
    assert load("small").report == dataclasses.replace(fit.report, detail=())
    assert isinstance(surgery.fit(joint, max_error=0).report, FitReport)


def test_an_artifact_that_a_run_wrote_has_the_report_of_its_log(mine):
    joint = trained()
    assert isinstance(joint.report, TrainReport)
    assert "training" not in json.loads(Path("trained/manifest.json").read_text())
    found = load("trained")
    assert found.report == joint.report and found.report.scores.keys() == joint.report.scores.keys()
    surgery.save(found, "copy")  # without the log
    assert load("copy").report == dataclasses.replace(joint.report, seconds=0.0)
    log = Path("trained/training/log.jsonl")
    log.write_text(log.read_text().replace('"event": "end"', '"event": "dne"'))
    assert load("trained").report is None  # a log that does not end as one


def test_a_part_of_what_was_trained_has_no_report_of_all(tmp_path):
    made = [member(seeded(stack, n), name, torch.zeros(2, 8)) for n, name in enumerate(modules())]
    joint = surgery.join(made)
    tasks = [surgery.Task(name, name, [(torch.ones(2, 8), None)], loss="distillation") for name in joint]
    surgery.train(joint, tasks, TRAIN, cpu=True)
    surgery.save(joint, tmp_path / "joint")
    name = joint.names[0]
    part = surgery.load(tmp_path / "joint", members=[name], modules={name: modules()[name]})
    assert part.report is None
    assert isinstance(surgery.load(tmp_path / "joint", modules=modules()).report, TrainReport)


@pytest.mark.parametrize("change", [{"best": "x"}, {"scores": {"a": {"loss": 1}}}, {"numbers": [1]}, [1]])
def test_a_training_s_report_that_is_none_is_an_error_of_the_artifact(change, tmp_path):
    surgery.save(fitted(), tmp_path / "joint")
    rewrite(tmp_path / "joint", lambda m: m.update(training=change))
    with pytest.raises(ArtifactError, match="training"):
        surgery.load(tmp_path / "joint", modules=modules())


# -- recipes -----------------------------------------------------------------------------------------------

FACTORY = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    layers = [nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2)]
    return nn.Sequential(*layers), torch.zeros(2, 4)

def data():
    x = torch.randn(32, 4, generator=torch.Generator().manual_seed(1))
    return {"train": [(x, (x.sum(1) > 0).long())]}
"""
TASKS = [{"data": "mine.py:data"}]
TRAIN = {"generations": 1, "steps": 2, "burn_in": 0, "final": 1}


@pytest.fixture
def mine(tmp_path, monkeypatch) -> None:
    """A network and its data in a file of the working directory."""
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(FACTORY)


def merged(out: str | None = "small", **parameters) -> surgery.JointModel:
    document = {"models": [{"model": "mine.py:make", "name": "net"}], "parameters": parameters, "out": out}
    return merge(Recipe.of(document), trust_remote_code=True)


def trained(out: str = "trained") -> surgery.JointModel:
    model = {"model": "mine.py:make", "name": "net", "tasks": TASKS}
    recipe = Recipe.of({"models": [model], "train": TRAIN, "parameters": {"block": "8x8"}, "out": out})
    return train_recipe(recipe, trust_remote_code=True, cpu=True)[0]


def load(folder: str) -> surgery.JointModel:
    return surgery.load(folder, trust_remote_code=True)


RECIPES = st.builds(
    lambda parameters, names, seed, nonfinite, train: Recipe.of(
        {
            "models": [{"model": name, "name": name, "tasks": TASKS if train else []} for name in names],
            "parameters": parameters,
            "seed": seed,
            "allow_nonfinite": nonfinite,
            **({"train": train} if train else {}),
        }
    ),
    st.sampled_from(
        [{}, {"max_error": 0.1}, {"budget": 0.5, "block": "4x8"}, {"hypermodules": 7, "context": 2}]
    ),
    st.lists(st.sampled_from("abc"), max_size=3, unique=True),
    st.integers(0, 9),
    st.booleans(),
    st.sampled_from([None, TRAIN]),
)


@given(RECIPES)
def test_what_an_artifact_records_of_a_recipe_is_read_back_and_written_the_same(recipe: Recipe):
    document = recipe.resolved()
    found = Recipe.of(document)
    assert json.dumps(found.document()) == json.dumps(document) == json.dumps(recipe.recorded().document())
    assert found.document() == Recipe.of(found.document()).document()
    assert found.without_target().document() == without_target(document)


def test_a_recipe_is_a_field_after_a_merge_a_load_and_in_copies(mine):
    joint = merged(budget=0.5)
    found = load("small")
    for each in (joint, found, copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
        assert each.recipe is not None and each.recipe.target == ("budget", 0.5)
        assert [model.name for model in each.recipe.models] == ["net"]
    surgery.save(found, "again")
    assert contents(Path("again")) == contents(Path("small"))


def test_fitted_again_a_recipe_says_the_new_target_and_what_it_was_made_from(mine):
    merged(max_error=0.05)
    joint = surgery.fit(load("small"), budget=0.4)
    surgery.save(joint, "again")
    recipe = load("again").recipe
    assert recipe is not None and recipe.target == ("budget", 0.4) and recipe.parameters.max_error is None
    assert [model.model for model in recipe.models] == [
        "./small"
    ]  # whose weights are others than the origin's
    assert recipe.recorded() == recipe
    same = merge(recipe.model_copy(update={"out": "same"}), trust_remote_code=True)
    assert same.report is not None and same.report.met


def test_written_over_what_it_was_made_from_a_recipe_has_no_target(mine):
    merged(max_error=0.05)
    surgery.save(surgery.fit(load("small"), budget=0.4), "small", overwrite=True)
    assert load("small").recipe.parameters.given() == []


def test_drawn_by_another_seed_members_are_named_by_their_artifact(mine):
    merged(max_error=0)
    recipe = surgery.fit(load("small"), max_error=0.1, seed=1).recipe
    assert [model.model for model in recipe.models] == ["small"] and recipe.seed == 1


def test_without_loss_a_recipe_keeps_to_the_origin(mine):
    merged(max_error=0)
    surgery.save(surgery.fit(load("small"), max_error=0.1), "again")
    recipe = load("again").recipe
    assert recipe is not None and recipe.target == ("max_error", 0.1)
    assert [model.model for model in recipe.models] == ["mine.py:make"]


def test_a_recipe_of_joining_and_fitting_in_python_does_the_same_again(mine):
    made = surgery.load_member("mine.py:make", name="net", trust_remote_code=True)
    joint = surgery.join([made], block=starting_block([surgery.discover(made)]))
    assert joint.recipe is None
    surgery.fit(joint, max_error=0.02)
    surgery.save(joint, "python")
    recipe = load("python").recipe
    assert recipe is not None and recipe.target == ("max_error", 0.02)
    again = merge(recipe, trust_remote_code=True)
    for key, tensor in joint.collapse("net").items():
        assert torch.equal(tensor, again.collapse("net")[key])


@pytest.mark.parametrize("case", ["live", "plan", "block", "probes", "changed"])
def test_what_no_recipe_can_tell_has_none(case, mine):
    live = member(seeded(stack, 1), "net", torch.zeros(2, 8))
    made = live if case == "live" else surgery.load_member("mine.py:make", name="net", trust_remote_code=True)
    found = surgery.discover(made)
    plan = surgery.make_plan([found], (4, 4)) if case == "plan" else None
    joint = surgery.join([made], plan, block=(8, 8) if case == "block" else starting_block([found]))
    if case == "changed":
        with torch.no_grad():
            joint["net"][6].bias.add_(1)
    probes = {"net": [Inputs((torch.ones(3, 4),))]} if case == "probes" else None
    assert surgery.fit(joint, max_error=0.05, probes=probes).recipe is None


def test_changed_after_a_fit_a_recipe_has_no_target(mine):
    joint = merged(None, max_error=0.05)
    assert joint.recipe is not None and joint.recipe.parameters.max_error == 0.05
    with torch.no_grad():
        joint["net"][6].bias.add_(1)
    assert joint.report is None and joint.recipe.parameters.max_error is None
    surgery.save(joint, "changed")
    assert "max_error: null" in Path("changed/recipe.yaml").read_text()
    assert surgery.fit(joint, budget=0.5).recipe.parameters.given() == []  # from weights that no recipe names


def test_a_merge_of_what_was_trained_keeps_its_tasks(mine):
    assert trained().recipe.train is not None
    small = merge(Recipe.of({"models": [{"model": "trained"}], "out": "small"}), trust_remote_code=True)
    assert small.recipe.models[0].tasks and small.recipe.train is None
    scores = evaluate_artifact("small", trust_remote_code=True)
    assert scores.keys() == {"net"}
    fitted_again = surgery.fit(load("trained"), budget=0.5).recipe
    assert fitted_again.train is None and fitted_again.models[0].model == "trained"
    assert fitted_again.models[0].tasks and fitted_again.target == ("budget", 0.5)


@pytest.mark.parametrize(
    "text",
    [
        "models: 3",
        "nothing: 1",
        "parameters: {max_error: lots}",
        "method: unheard-of",
        "- 1",
        "train: {steps: -1}",
        "{",
    ],
)
def test_a_recipe_that_is_none_is_an_error_of_the_artifact(text, tmp_path):
    surgery.save(fitted(), tmp_path / "joint", recipe={"seed": 1})
    (tmp_path / "joint" / "recipe.yaml").write_text(text)
    entry = {"bytes": len(text), "sha256": sha256(text.encode()).hexdigest()}
    rewrite(tmp_path / "joint", lambda m: m["files"].update({"recipe.yaml": entry}))
    with pytest.raises(ArtifactError, match=r"recipe\.yaml"):
        surgery.load(tmp_path / "joint", modules=modules())
