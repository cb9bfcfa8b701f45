"""Heat of contests: what an opening does is measured, and alpha follows it."""

import pytest
import torch
import training_nets
from hypothesis import given
from hypothesis import strategies as st

from surgery.methods.hypermodules.heat import Opening, Thermostat, wrong_heat
from surgery.settings.training import Training
from surgery.training.report.runlog import read_log
from surgery.training.train import train


@given(st.floats(0.5, 4), st.integers(0, 60))
def test_the_rise_and_the_way_back_are_measured(level, high):
    steps = [[2 * level, 3.0]] * high + [[level, 3.0]] * (80 - high)
    found = Opening.of([level, 3.0], steps)
    assert found is not None and found.rise == pytest.approx(min(high, 5) / 5 * 0.5, abs=1e-6)
    assert found.back is not None and found.back == max(10, high + 10 if high else 10)


def test_a_loss_that_stays_high_is_not_back():
    found = Opening.of([1.0], [[1.2]] * 30)
    assert found is not None and found.back is None and found.document()["back"] is None
    assert Opening.of([], [[1.0]]) is None


def test_alpha_falls_where_openings_are_too_hot_and_rises_where_they_are_not():
    hot, cold, fixed = Thermostat(0.1), Thermostat(0.1), Thermostat(None)
    for each in (hot, cold, fixed):
        each.end([[1.0]] * 20, opened=False)
    for _ in range(4):
        for each, loss in ((hot, 2.0), (cold, 1.0), (fixed, 2.0)):
            each.begin(0.2)
            each.end([[loss]] * 5 + [[1.0]] * 30, opened=True)
    assert (
        hot.begin(0.2) == pytest.approx(0.02)
        and cold.begin(0.2) == pytest.approx(0.4)
        and fixed.begin(0.2) == 0.2
    )
    assert cold.begin(0.9) == 0.5


def test_short_generations_are_cooler_and_the_last_ones_coolest():
    long, short = Training(steps=1000), Training(steps=40)
    assert (long.fraction, long.alpha(0)) == (0.25, 0.5) and short.fraction == short.alpha(
        0
    ) == pytest.approx(0.1)
    assert long.alpha(long.generations - 1) == pytest.approx(0.125)
    given_one = Training.model_validate({"evolution": {"alpha": 0.7, "fraction": 0.3}})
    assert given_one.alpha(9) == 0.7 and given_one.fraction == 0.3


def test_a_run_logs_what_openings_did(tmp_path):
    config = {**training_nets.CONFIG, "steps": 12, "generations": 3}
    config["evolution"] = {"epsilon": 0.0}
    train(training_nets.build(), training_nets.tasks(), config, folder=tmp_path, cpu=True)
    lines = [line for line in read_log(tmp_path / "log.jsonl") if line["event"] == "generation"]
    openings = [line.get("opening") for line in lines]
    assert openings[0] is None and openings[-1] is None  # burn-in and the last phase
    assert all(each["rise"] > -1 and 0 < each["alpha"] <= 0.5 for each in openings[1:4])


@pytest.mark.parametrize(
    "document",
    [None, {}, {"factor": -1.0, "before": [], "alpha": None}, {"factor": 1.0, "before": [1.0], "alpha": 2.0},
     {"factor": 1.0, "before": [1.0, 2.0, 3.0], "alpha": 0.5}, {"factor": 1.0, "before": ["x"], "alpha": 0.5}],
)  # fmt: skip
def test_a_damaged_state_of_it_is_refused(document):
    assert "heat" in wrong_heat(document, 1)


def test_losses_of_steps_are_tensors_until_a_generation_ends():
    from accelerate import Accelerator

    from surgery.training.tasks.running_losses import RunningLosses

    running = RunningLosses(Accelerator(cpu=True))
    for value in (1.0, 2.0):
        running.add({"a": torch.tensor(value), "b": torch.tensor(3.0)})
    assert running.steps() == [[1.0, 3.0], [2.0, 3.0]]
