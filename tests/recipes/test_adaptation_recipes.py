"""The recipes digits and adaptation, on stand-in digits: from a source's artifact to one that is evaluated."""

import json

import numpy as np
import pytest
import torch
from surgery_cli.__main__ import app
from surgery_recipes.mnist import mnist
from test_recipes_training import archive
from typer.testing import CliRunner

import surgery
from surgery.errors import ConsentError, LoadError, PlanError
from surgery.permission import Permission
from surgery.pipeline.train import evaluate_artifact, rejoin, train_recipe
from surgery.settings.documents import override, read_document
from surgery.settings.recipe import Recipe
from surgery.training.tasks.parts import Unlabelled
from surgery.training.tasks.sources import check_sources, make_tasks
from surgery.training.tasks.tasks import as_batch

DATA, OPTIONS = "models.0.tasks.0.data", "models.0.tasks.0.options"
LOSS, ADAPTATION = "models.0.tasks.0.loss", "models.0.tasks.0.adaptation"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Digits drawn at random, in the form of the real ones."""
    place, draw = tmp_path_factory.mktemp("digits"), np.random.default_rng(0)
    archive(
        place / "mnist-1.1.0.tgz",
        {
            f"package/src/digits/{n}.json": json.dumps({"data": draw.random(20 * 784).round(2).tolist()})
            for n in range(10)
        },
    )
    return place


def recipe(name, folder, *changes):
    common = [f"{OPTIONS}.folder={folder}", f"{OPTIONS}.train=null", "models.0.tasks.0.batch=16"]
    if name == "adaptation":
        common += [f"{ADAPTATION}.options.folder={folder}", f"{ADAPTATION}.options.train=60"]
    return Recipe.of(override(read_document(name), [*common, *changes]))


def run(*given, **more):
    return train_recipe(recipe(*given), fast_run=True, cpu=True, **more)


@pytest.fixture(scope="module")
def digits(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("source") / "digits"
    run("digits", folder, f"out={out}")
    return out


@pytest.mark.parametrize(
    ("way", "view"),
    [
        pytest.param("{moments: 1.0}", "shear", marks=pytest.mark.slow),
        pytest.param("adversary", "shot", marks=pytest.mark.slow),
        ("statistics", "scale"),
        ("{adversary: 1, moments: 2}", "shot"),
    ],
)
def test_mixtures_alone_adapt_and_are_measured_with_labels(folder, digits, tmp_path, way, view):
    changes = [f"train.templates.source={digits}", f"{LOSS}={way}", f"{OPTIONS}.view={view}"]
    joint, report = run("adaptation", folder, *changes, f"out={tmp_path / 'adapted'}")
    assert (
        report.trained == 64 and report.best == report.generations - 1
    )  # the last state, whatever validation says
    before, after = surgery.load(digits).collapse("digits"), joint.collapse("digits")
    moved = {key for key, t in after.items() if not torch.allclose(t, before[key], rtol=1e-3, atol=1e-5)}
    statistics = {key for key in moved if "running" in key or "num_batches" in key}
    assert statistics and all(key.startswith("blocks.") and "norm" not in key for key in moved - statistics)
    assert bool(moved - statistics) == (way != "statistics")
    assert report.tests["digits"].metric is not None and report.scores["digits"].metric is not None
    facts = report.adapted.get("digits")
    assert (facts is None) == (way == "statistics")
    if facts is not None:
        assert (facts["part"], facts["examples"], facts["source"]) == ("head", 32, str(digits))
    score = evaluate_artifact(tmp_path / "adapted", trust_remote_code=True)["digits"]
    assert score.metric is not None and score.examples == 40  # a fifth of them, not the first batches alone
    assert score.loss == (
        0 if way == "statistics" else None
    )  # an artifact does not hold what it was adapted to


def test_the_verbs_say_what_was_adapted(folder, digits, tmp_path):
    document = recipe("adaptation", folder, f"train.templates.source={digits}")
    (tmp_path / "r.yaml").write_text(document.to_yaml())
    out, runner = str(tmp_path / "adapted"), CliRunner()
    did = runner.invoke(app, ["train", str(tmp_path / "r.yaml"), "--out", out, "--fast-dev-run", "--cpu"])
    assert did.exit_code == 0, did.output
    words = " ".join(did.output.split())
    assert "digits adapted by moments, without labels: the features that reach 'head'" in words
    assert "64 parameters were trained" in words
    facts = " ".join(runner.invoke(app, ["report", out]).output.split())
    assert "adapted by moments, without labels" in facts
    facts = json.loads(runner.invoke(app, ["evaluate", out, "--trust-remote-code", "--json"]).output)
    assert facts["digits"]["loss"] is None and 0 <= facts["digits"]["metric"] <= 1
    assert " - " in runner.invoke(app, ["evaluate", out, "--trust-remote-code"]).output


def test_an_adapted_artifact_goes_on_adapting(folder, digits, tmp_path):
    changes = [f"train.templates.source={digits}", f"{LOSS}=adversary"]
    run("adaptation", folder, *changes, f"out={tmp_path / 'one'}")
    again = recipe("adaptation", folder, *changes, f"out={tmp_path / 'two'}", f"{OPTIONS}.view=scale")
    joint = rejoin(tmp_path / "one", again, own=True)
    _, report = train_recipe(again, joint=joint, fast_run=True, cpu=True)
    assert report.trained == 64 and report.adapted["digits"]["source"] == str(digits)


def test_training_sees_no_labels_and_the_other_parts_do(folder):
    made = recipe("adaptation", folder)
    (task,) = make_tasks(made, {"digits": None}, Permission.OWN)
    assert all(batch.target is None and batch.size for batch in task.data)
    assert all(as_batch(raw).target is not None for raw in [*task.validation, *task.test])
    plain = mnist(batch=16, folder=str(folder), seed=3)["train"]
    hidden = Unlabelled(mnist(batch=16, folder=str(folder), seed=3)["train"])
    for epoch in (0, 1):
        plain.set_epoch(epoch), hidden.set_epoch(epoch)
        for raw, batch in zip(plain, hidden, strict=True):
            assert torch.equal(as_batch(raw).args[0], batch.args[0])


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        (["train.templates.source=null"], PlanError, r"task has none.*train\.templates\.source"),
        (
            ["train.templates.source=nowhere"],
            LoadError,
            r"source nowhere does not exist.*templates\.source=DIR",
        ),
        ([f"{ADAPTATION}=null"], PlanError, "adaptation: moments needs it"),
        ([f"{ADAPTATION}.part=neck"], PlanError, "no 'neck'; there are stem, blocks, head"),
        ([f"{ADAPTATION}.settings.width=8"], PlanError, "must be of orders, found width"),
        ([f"{ADAPTATION}.data=nothing"], PlanError, "data must be a function"),
        ([f"{LOSS}=cross_entropy"], Exception, "compares with targets, which training does not see"),
        (["train.templates.like=letters"], PlanError, "must be one of digits, found 'letters'"),
        (
            ["train.evolution.freeze=true", "train.evolution.change=evolve"],
            PlanError,
            "freeze need change none",
        ),
    ],
)
def test_what_cannot_be_adapted_is_refused(folder, digits, changes, error, said):
    with pytest.raises(error, match=said):
        run("adaptation", folder, f"train.templates.source={digits}", *changes)


def test_features_of_another_shape_are_refused(folder, digits):
    flat = [f"{ADAPTATION}.part=stem", f"{OPTIONS}.view=plain", f"{DATA}={__file__}:wide"]
    with pytest.raises(PlanError, match=r"'stem' has 784 numbers for an example of the source and 1024"):
        run("adaptation", folder, f"train.templates.source={digits}", *flat, f"{OPTIONS}={{}}")


def wide():
    """Larger digits than the source knows."""
    return [(torch.zeros(4, 1, 32, 32), torch.zeros(4))]


def test_functions_of_the_source_s_data_need_consent_too(folder):
    other = recipe("adaptation", folder, f"{ADAPTATION}.data=mine.py:digits")
    with pytest.raises(ConsentError, match=r"uses .*mine\.py:digits"):
        check_sources(other, Permission.NONE)
