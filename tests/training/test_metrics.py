"""Metrics by name: their values against scikit-learn's and slow formulas, batch by batch, whatever the shapes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from surgery.errors import PlanError
from surgery.training.tasks.metrics import SHORT, Meter, measure_of
from surgery.training.tasks.tasks import Batch


def value(wanted, outputs, target, batch=7):
    meter = Meter(wanted)
    for found, true in zip(outputs.split(batch), target.split(batch), strict=True):
        meter.update(found, Batch(target=true))
    return meter.value()


def data(seed, classes, count=40):
    generator = torch.Generator().manual_seed(seed)
    shape = (count, classes) if classes else (count,)
    target = torch.randint(max(classes, 2), (count,), generator=generator)
    target[: max(classes, 2)] = torch.arange(max(classes, 2))  # every class is there
    return torch.randn(shape, generator=generator), target


CLASSES = {
    "accuracy": lambda p, y: sk.accuracy_score(y, p.argmax(1)),
    "f1": lambda p, y: sk.f1_score(y, p.argmax(1), average="macro"),
    "precision": lambda p, y: sk.precision_score(y, p.argmax(1), average="macro", zero_division=0),
    "recall": lambda p, y: sk.recall_score(y, p.argmax(1), average="macro"),
    "average_precision": lambda p, y: sk.average_precision_score(np.eye(p.shape[1])[y], p, average="macro"),
    "auroc": lambda p, y: sk.roc_auc_score(y, p, multi_class="ovr"),
    "top2": lambda p, y: sk.top_k_accuracy_score(y, p, k=2),
    "matthews_corrcoef": lambda p, y: sk.matthews_corrcoef(y, p.argmax(1)),
}


@pytest.mark.parametrize("name", CLASSES)
@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 10**6), batch=st.integers(5, 40))
def test_several_classes_are_measured_as_scikit_learn_does(name, seed, batch):
    outputs, target = data(seed, 4)
    expected = CLASSES[name](outputs.softmax(1).numpy(), target.numpy())
    assert value(name, outputs, target, batch) == pytest.approx(expected, abs=1e-5)


BINARY = {
    "accuracy": lambda s, y: sk.accuracy_score(y, s > 0),
    "f1": lambda s, y: sk.f1_score(y, s > 0),
    "precision": lambda s, y: sk.precision_score(y, s > 0),
    "recall": lambda s, y: sk.recall_score(y, s > 0),
    "average_precision": lambda s, y: sk.average_precision_score(y, s),
    "auroc": lambda s, y: sk.roc_auc_score(y, s),
}


@pytest.mark.parametrize("name", BINARY)
@pytest.mark.parametrize("form", ["one score", "a column", "two scores", "floating targets", "a grid"])
@settings(max_examples=3, deadline=None)
@given(seed=st.integers(0, 10**6), batch=st.integers(1, 40))
def test_yes_or_no_is_measured_as_scikit_learn_does(name, form, seed, batch):
    """Small scores alone in a batch look like probabilities: they must count as the logits that they are."""
    scores, target = data(seed, 0)
    scores[:10] = scores[:10].abs() * 0.1
    outputs, shown = scores, target
    if form == "a column":
        outputs = scores[:, None]
    elif form == "two scores":
        outputs = torch.stack([torch.ones_like(scores), scores + 1], 1)
    elif form == "floating targets":
        outputs, shown = scores[:, None], target[:, None].float()
    elif form == "a grid":
        outputs, shown = scores.view(10, 4), target.view(10, 4)
    expected = BINARY[name](scores.numpy(), target.numpy())
    assert value(name, outputs, shown, batch) == pytest.approx(expected, abs=1e-5)


NUMBERS = {
    "r2": sk.r2_score,
    "mse": sk.mean_squared_error,
    "rmse": lambda y, p: sk.mean_squared_error(y, p) ** 0.5,
    "mae": sk.mean_absolute_error,
    "pearson": lambda y, p: np.corrcoef(y.ravel(), p.ravel())[0, 1],
    "MeanAbsolutePercentageError": sk.mean_absolute_percentage_error,
    "explained_variance": sk.explained_variance_score,
}


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("columns", [0, 1, 3])
@settings(max_examples=3, deadline=None)
@given(seed=st.integers(0, 10**6), batch=st.integers(1, 40))
def test_numbers_are_measured_as_scikit_learn_does(name, columns, seed, batch):
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn((40, columns) if columns else (40,), generator=generator)
    found = target + torch.randn(target.shape, generator=generator)
    expected = NUMBERS[name](target.numpy(), found.numpy())
    shown = found[:, None] if not columns else found
    assert value(name, shown, target, batch) == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_targets_that_do_not_count_are_left_out():
    outputs, target = data(0, 5)
    skipped = target.clone()
    skipped[::2] = -100
    for name in ("accuracy", "f1", "average_precision"):
        assert value(name, outputs, skipped) == pytest.approx(
            value(name, outputs[1::2], target[1::2]), abs=1e-6
        )
    tokens = outputs.view(8, 5, 5), skipped.view(8, 5)
    assert value("accuracy", *tokens, batch=3) == pytest.approx(value("accuracy", outputs, skipped))
    assert value("perplexity", *tokens, batch=3) > 1


def test_arguments_choose():
    outputs, target = data(1, 4)
    assert value({"f1": {"average": "micro"}}, outputs, target) == pytest.approx(
        value("accuracy", outputs, target)
    )
    two, yes = data(2, 2)
    averaged = {"f1": {"average": "macro"}}  # no argument of yes or no: two classes alike
    assert value(averaged, two, yes) == pytest.approx(
        sk.f1_score(yes, two.argmax(1), average="macro"), abs=1e-5
    )
    assert value({"f1": {"task": "multiclass"}}, two, yes) == pytest.approx(value(averaged, two, yes))
    labels = torch.randint(2, (40, 4), generator=torch.Generator().manual_seed(3))
    expected = sk.f1_score(labels, outputs > 0, average="macro")
    assert value({"f1": {"task": "multilabel"}}, outputs, labels) == pytest.approx(expected, abs=1e-5)
    assert value({"FBetaScore": {"beta": 2.0}}, outputs, target) == pytest.approx(
        sk.fbeta_score(target, outputs.argmax(1), beta=2, average="macro"), abs=1e-5
    )


def test_a_class_by_its_own_name_sees_outputs_as_they_are():
    outputs, target = data(4, 0)
    chances = outputs.sigmoid()
    assert value("BinaryF1Score", chances, target) == pytest.approx(value("f1", outputs, target))
    scores, classes = data(4, 4)
    assert value("MulticlassF1Score", scores, classes) == pytest.approx(value("f1", scores, classes))
    assert Meter("multiclass-f1-score").name == "multiclass-f1-score"


def test_a_metric_of_ones_own_is_measured_alone_and_left_as_it_was():
    from torchmetrics.regression import MeanSquaredError

    mine = MeanSquaredError()
    assert value(mine, torch.ones(4), torch.zeros(4)) == 1.0
    assert mine.update_count == 0 and mine.sync_on_compute


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ("acuracy", "no metric 'acuracy', did you mean 'accuracy'"),
        ("f1_scor", "did you mean 'F1Score'"),
        ("zzzz", "known are accuracy, f1.*top5, the classes of torchmetrics"),
        ("BERTScore", "There is no metric 'BERTScore'"),
        ("FrechetInceptionDistance", "There is no metric"),
        ("Metric", "There is no metric"),
        ({"f1": {"averag": "macro"}}, "takes no argument 'averag', did you mean 'average'"),
        ({"f1": {"dist_sync_fn": 1}}, "takes no argument 'dist_sync_fn'"),
        ({"f1": {"task": "both"}}, "must be binary or multiclass or multilabel, found 'both'"),
        ({"f1": {}, "r2": {}}, "one name with its arguments.*found f1, r2"),
        ({"f1": 3}, "must be a mapping, found 3"),
    ],
)
def test_names_and_arguments_that_are_not_known_are_refused(wanted, said):
    with pytest.raises(PlanError, match=said):
        measure_of(wanted)


def test_what_is_no_one_number_or_does_not_fit_is_refused():
    outputs, target = data(5, 4)
    with pytest.raises(PlanError, match=r"one number, but gives \[4\]: choose an average"):
        value({"f1": {"average": "none"}}, outputs, target)
    with pytest.raises(PlanError, match=r"score for each class.*\[7, 4\].*\[7, 2\]"):
        value("f1", outputs, torch.zeros(40, 2, dtype=torch.long))


def test_all_short_names_are_known():
    assert all(measure_of(name).title == name for name in SHORT)
