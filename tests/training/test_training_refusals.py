"""What a run refuses while it trains: data, losses and settings that do not fit, each said with what to do."""

from types import SimpleNamespace

import pytest
import torch
from ended_runs import stopped_at
from torch.utils.data import TensorDataset
from training_nets import CONFIG, build, tasks

from surgery.errors import PlanError, TrainingError
from surgery.training.loop.interruptions import Interrupted
from surgery.training.loop.run import STATE
from surgery.training.report.runlog import read_log
from surgery.training.tasks.running_losses import RunningLosses
from surgery.training.tasks.tasks import Task
from surgery.training.train import train

SHORT = {"steps": 2, "generations": 2, "save_seconds": 0}
X, LABEL = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), torch.zeros(8, dtype=torch.long)
GOOD = [(X, LABEL)]
EXAMPLES = TensorDataset(X, LABEL)


class Raising:
    """Data whose second batch cannot be read."""

    def __iter__(self):
        yield X, LABEL
        raise OSError("the disk is gone")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (Raising(), r"data of task 'classes'.*batch 2 of epoch 1 raised OSError: the disk is gone"),
        ([X], r"task 'classes'.*\[8, 4\], without a target,.*this loss compares with targets"),
        ([(X, LABEL, 3)], r"Task 'classes'.*found a tuple of 3"),
        (
            [(x, 0) for x in X],
            r"data of task 'classes' must yield batches, but yield single examples.*DataLoader",
        ),
        (EXAMPLES, r"data of task 'classes' must yield batches, but yield single examples.*DataLoader"),
    ],
)
def test_data_that_cannot_be_used_are_an_error_that_names_their_task(data, said):
    with pytest.raises((TrainingError, PlanError), match=said):
        train(build(), [Task("classes", "a", data)], SHORT, cpu=True)


@pytest.mark.parametrize(
    ("held", "said"),
    [
        ([(torch.zeros(3, 5), LABEL[:3])], r"'classes'.*validation data.*\[3, 5\].*mat1 and mat2"),
        (
            [(X * float("nan"), LABEL)],
            r"'classes' must be finite.*first batch of its validation data.*hold NaN",
        ),
        (
            [(X, LABEL), (X * float("nan"), LABEL)],  # the first batch is tried before the run
            r"'classes' on held-out data must be finite, found nan after generation 1",
        ),
    ],
)
def test_held_out_data_that_do_not_fit_are_named(held, said):
    with pytest.raises(TrainingError, match=said):
        train(build(), [Task("classes", "a", GOOD, validation=held)], SHORT, cpu=True)


def test_of_several_tasks_the_first_whose_loss_is_not_finite_is_named():
    """Where a loss is not looked at in each step, the others' are not finite soon either."""
    running = RunningLosses(SimpleNamespace(device=torch.device("cpu"), num_processes=2))
    good, bad = torch.tensor(1.0), torch.tensor(float("nan"))
    for one, other in ((good, good), (good, bad), (bad, bad)):
        running.add({"one": one, "other": other})
    assert running.sums["one"] == 2 and running.sums["other"].isnan()


def interrupted(folder, config):
    """The state of a run that was stopped in its first step."""
    with stopped_at(1), pytest.raises(Interrupted):
        train(build(), tasks(), config, folder=folder, cpu=True)


def test_a_state_of_other_settings_is_refused_with_what_differs(tmp_path, monkeypatch):
    interrupted(tmp_path, CONFIG)
    with pytest.raises(
        TrainingError, match=r"\(train\.steps was 7 and is 9; train\.generations was 4 and is 2\)"
    ):
        other = {**CONFIG, "steps": 9, "generations": 2}
        train(build(), tasks(), other, folder=tmp_path, resume=True, cpu=True)


def test_learning_rates_may_change_where_a_run_goes_on(tmp_path, monkeypatch):
    interrupted(tmp_path, CONFIG)
    slower = {**CONFIG, "optimizer": {**CONFIG["optimizer"], "lr": 1e-30, "soft_lr": 1e-30}}
    joint = build()
    before = joint.collapse()["a"]["3.weight"].clone()
    assert train(joint, tasks(), slower, folder=tmp_path, resume=True, cpu=True).generations == 6
    torch.testing.assert_close(joint.collapse()["a"]["3.weight"], before, rtol=0.1, atol=0.05)


def test_a_run_that_failed_before_its_first_state_leaves_nothing_in_the_next_ones_log(tmp_path):
    with pytest.raises(TrainingError):
        train(build(), [Task("classes", "a", Raising())], SHORT, folder=tmp_path, cpu=True)
    assert not (tmp_path / STATE).exists()
    train(build(), [Task("classes", "a", GOOD)], SHORT, folder=tmp_path, cpu=True)
    assert [line["event"] for line in read_log(tmp_path / "log.jsonl")].count("start") == 1


def test_memory_that_runs_out_outside_members_is_explained(monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.optim.Adam, "step", full)
    with pytest.raises(TrainingError, match=r"dictionary or the optimizer.*parameters\.context"):
        train(build(), [Task("classes", "a", GOOD)], SHORT, cpu=True)
