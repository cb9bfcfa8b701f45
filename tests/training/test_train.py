"""Joint training: the loop, its log, its refusals, and that a killed run ends as an unbroken one does."""

import json
import random
import signal
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import training_nets
import yaml
from ended_runs import stopped_at
from processes import SECONDS, Started, forks
from safetensors.torch import load_file
from torch import nn
from training_nets import CONFIG, build, tasks

from surgery.errors import PlanError, TrainingError
from surgery.settings.training import Training
from surgery.storage.keys import StateKey
from surgery.training.loop.interruptions import Interrupted
from surgery.training.loop.run import BEST, STATE
from surgery.training.loop.state import read_state, write_state
from surgery.training.loop.state_document import BestDocument
from surgery.training.report.runlog import read_log
from surgery.training.tasks.streams import Batches, Stream, share
from surgery.training.tasks.tasks import Task, as_batch
from surgery.training.train import train


def same(one, other):
    assert list(one) == list(other)
    return all(torch.equal(one[m][k], other[m][k]) for m in one for k in one[m])


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    joint = build()
    report = train(joint, tasks(), CONFIG, folder=folder, cpu=True)
    return joint, report, folder


def test_a_run_learns_shares_and_logs(unbroken):
    joint, report, folder = unbroken
    lines = read_log(folder / "log.jsonl")
    assert [line["event"] for line in lines] == ["start", *["generation"] * 6, "end"]
    generations = lines[1:-1]
    assert [g["phase"] for g in generations] == ["burn-in", *["evolution"] * 4, "final"]
    assert generations[-1]["losses"]["classes"] < generations[0]["losses"]["classes"]
    for line in generations:
        assert set(line["validation"]) == {"classes", "product"}
        assert sum(line["subsets"].values()) == sum(line["hypermodules"].values())
    assert lines[0]["banks"]["8x8-float32"]["hypermodules"] == 16
    assert generations[-1]["hypermodules"]["8x8-float32"] < 16 and report.generations == 6
    losses = {t: [line["validation"][t]["loss"] for line in generations] for t in ("classes", "product")}
    best = {task: own.index(min(own)) for task, own in losses.items()}
    members = {"a": best["classes"], "b": best["product"]}
    assert report.best == max(best.values())
    assert report.kept == (members if len(set(best.values())) > 1 else {})
    for task, own in losses.items():
        assert report.scores[task].loss == pytest.approx(min(own), rel=1e-6)
    bank = joint.dictionary["8x8-float32"]
    assert bank.contest is None and set(bank.psi.tolist()) == set(range(bank.hypermodules))


def test_the_same_seed_gives_the_same_result_and_another_one_another(unbroken):
    again = build()
    train(again, tasks(), CONFIG, cpu=True)
    assert same(unbroken[0].collapse(), again.collapse())
    other = build()
    train(other, tasks(), CONFIG, cpu=True, seed=1)
    assert not same(unbroken[0].collapse(), other.collapse())


@pytest.mark.parametrize("step", [1, 12, 14, 30, 41])
def test_interrupted_at_any_step_and_resumed_it_ends_as_an_unbroken_run(unbroken, tmp_path, step):
    with stopped_at(step), pytest.raises(Interrupted):
        train(build(), tasks(), CONFIG, folder=tmp_path, cpu=True)
    joint = build()
    report = train(joint, tasks(), CONFIG, folder=tmp_path, resume=True, cpu=True)
    assert same(unbroken[0].collapse(), joint.collapse())
    assert report.best == unbroken[1].best and report.scores == unbroken[1].scores

    def facts(folder):
        return [{k: v for k, v in line.items() if k != "seconds"} for line in read_log(folder / "log.jsonl")]

    assert facts(tmp_path) == facts(unbroken[2])


def weights(out, rank=0):
    return load_file(Path(out) / f"{rank}.safetensors")


def started(folder, out, *, slow=False, dropout=0.1, ranks=1):
    return Started(training_nets.main, str(folder), str(out), slow, dropout, ranks=ranks)


def killed(run, folder, generations=0):
    """Let a run be killed somewhere within a generation, after a state is written and some generations are logged."""
    deadline = time.monotonic() + SECONDS
    while not (folder / STATE).exists() or len(read_log(folder / "log.jsonl")) < generations + 1:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.12)
    run.kill()
    assert run.wait()[0] == [-signal.SIGKILL] * len(run.processes)


@forks
def test_killed_without_warning_and_resumed_it_ends_as_an_unbroken_run(unbroken, tmp_path):
    run = started(tmp_path / "run", tmp_path / "out", slow=True)
    killed(run, tmp_path / "run", generations=3)
    assert not (tmp_path / "out").exists()
    started(tmp_path / "run", tmp_path / "out").succeed()
    expected = {f"{m}/{k}": t for m, s in unbroken[0].collapse().items() for k, t in s.items()}
    got = weights(tmp_path / "out")
    assert all(torch.equal(got[key], tensor) for key, tensor in expected.items())


@forks
def test_two_processes_give_the_result_of_one_also_when_killed(tmp_path):
    one = started(tmp_path / "one", tmp_path / "o1", dropout=0.0)
    one.succeed()
    two = started(tmp_path / "two", tmp_path / "o2", dropout=0.0, ranks=2, slow=True)
    killed(two, tmp_path / "two")
    assert not (tmp_path / "o2").exists()
    started(tmp_path / "two", tmp_path / "o2", dropout=0.0, ranks=2).succeed()
    first, second = weights(tmp_path / "o2"), weights(tmp_path / "o2", rank=1)
    assert all(torch.equal(first[key], second[key]) for key in first)
    expected = weights(tmp_path / "o1")
    facts = [json.loads((tmp_path / out / "0.json").read_text()) for out in ("o1", "o2")]
    assert facts[0] == facts[1]  # every decision was the same
    for key, tensor in expected.items():
        torch.testing.assert_close(
            first[key], tensor, rtol=1e-3, atol=1e-5
        )  # sums in another order, 42 steps of Adam


def test_an_alignment_by_chance_is_drawn_anew_in_each_generation(tmp_path):
    config = {**CONFIG, "evolution": {"change": "random"}}
    train(build(), tasks(), config, folder=tmp_path, cpu=True)
    generations = [line for line in read_log(tmp_path / "log.jsonl") if line["event"] == "generation"]
    drawn = [line["alignment"]["8x8-float32"] for line in generations]
    assert [one != other for one, other in pairwise(drawn)] == [True] * 4 + [False]


class Shuffled:
    """Data that draw their order from Python's and NumPy's global generators."""

    def __iter__(self):
        order = np.random.permutation(4).tolist()
        random.shuffle(order)
        yield from (torch.full((2, 4), float(place)) for place in order)


def test_data_with_an_order_of_their_own_go_on_where_they_were():
    stream = Stream("t", Shuffled(), seed=3)
    order = [next(stream)[0].args[0][0, 0].item() for _ in range(24)]
    random.seed(99)
    again = Stream("t", Shuffled(), seed=3)
    again.seek(epoch=2, position=1)
    assert [next(again)[0].args[0][0, 0].item() for _ in range(15)] == order[9:]


# What is refused ------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_names_the_task_and_keeps_the_last_good_state(tmp_path):
    x = torch.randn(32, 4)

    class Poisoned:
        epoch = 0

        def set_epoch(self, epoch):
            self.epoch = epoch

        def __iter__(self):
            value = float("nan") if self.epoch > 9 else 0.0
            yield x, torch.full((32, 1), value)

    bad = [Task("poisoned", "b", Poisoned(), "mse")]
    with pytest.raises(TrainingError, match=r"task poisoned must be finite, found nan in generation 2"):
        train(build(), bad, CONFIG, folder=tmp_path, cpu=True)
    tensors, document = read_state(tmp_path / STATE)
    assert document["generation"] == 1
    assert all(t.isfinite().all() for key, t in tensors.items() if key.model)


def test_what_does_not_fit_is_named_with_its_shapes():
    wrong = [Task("wide", "a", [(torch.zeros(3, 5), torch.zeros(3, dtype=torch.long))])]
    with pytest.raises(TrainingError, match=r"'a'.*'wide'.*\[3, 5\].*mat1 and mat2"):
        train(build(), wrong, CONFIG, cpu=True)


@pytest.mark.parametrize(
    ("target", "said"),
    [
        (torch.tensor([9, 1, 70]), r"target int64 \[3\] from 1 to 70"),
        (torch.zeros(3), r"target float32 \[3\]"),
    ],
)
def test_classes_that_do_not_fit_are_named_with_their_range_and_dtype(target, said):
    with pytest.raises(TrainingError, match=said):
        train(build(), [Task("t", "a", [(torch.zeros(3, 4), target)])], CONFIG, cpu=True)


def test_data_that_hold_nan_are_named_before_the_first_step(tmp_path):
    bad = [Task("t", "a", [(torch.full((3, 4), torch.nan), torch.zeros(3, dtype=torch.long))])]
    with pytest.raises(
        TrainingError, match="first batch of its data it is nan, and the inputs of that batch hold NaN"
    ):
        train(build(), bad, CONFIG, folder=tmp_path / "run", cpu=True)
    assert not (tmp_path / "run" / STATE).exists()


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ([], "there is no task"),
        ([Task("t", "c", [1])], "trains member 'c', but the members are a, b"),
        ([Task("t", "a", [1]), Task("t", "b", [1])], "'t' is given more than once"),
        ([Task("t", "a", None)], "'t' has no data"),
        ([Task("t", "a", [1], weight=0)], "weight 0"),
        ([Task("t", "a", [], "mse")], "must yield batches in every epoch"),
        ([Task("t", "a", [torch.zeros(2, 4)], "msee")], "no loss 'msee', did you mean 'mse'"),
        ([Task("t", "a", [3])], "must yield .inputs, target. pairs"),
    ],
)
def test_tasks_that_cannot_be_trained_are_refused(broken, said):
    with pytest.raises(PlanError, match=said):
        train(build(), broken, CONFIG, cpu=True)


def test_data_that_end_early_are_named():
    once = iter([(torch.zeros(2, 4), torch.zeros(2, dtype=torch.long))] * 3)
    with pytest.raises(PlanError, match=r"'t' must yield batches in every epoch, but epoch 2 had none"):
        train(build(), [Task("t", "a", once)], CONFIG, cpu=True)


def test_a_state_of_another_plan_or_a_damaged_one_is_refused(unbroken, tmp_path):
    for name in (STATE, BEST):
        (tmp_path / name).write_bytes((unbroken[2] / name).read_bytes())
    with pytest.raises(TrainingError, match="belongs to another plan"):
        train(build(block=(4, 4)), tasks(), CONFIG, folder=tmp_path, resume=True, cpu=True)
    with pytest.raises(TrainingError, match="belongs to another plan"):
        train(build(), tasks(), {**CONFIG, "steps": 8}, folder=tmp_path, resume=True, cpu=True)
    with pytest.raises(PlanError, match="holds the state of a training run"):
        train(build(), tasks(), CONFIG, folder=tmp_path, cpu=True)
    (tmp_path / STATE).write_bytes((tmp_path / STATE).read_bytes()[:100])
    with pytest.raises(TrainingError, match="cannot be read"):
        train(build(), tasks(), CONFIG, folder=tmp_path, resume=True, cpu=True)


def test_a_state_is_whole_or_not_there(tmp_path, monkeypatch):
    write_state(tmp_path / "s", {StateKey("a"): torch.zeros(2)}, {"generation": 1})

    def fails(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("surgery.training.loop.state.save_file", fails)
    with pytest.raises(OSError, match="disk full"):
        write_state(tmp_path / "s", {StateKey("a"): torch.ones(2)}, {"generation": 2})
    tensors, document = read_state(tmp_path / "s", BestDocument)
    assert tensors[StateKey("a")].eq(0).all() and document["generation"] == 1


# Settings ---------------------------------------------------------------------------------------------------


def test_early_stopping_ends_a_run_that_gets_no_better():
    fixed = [Task("classes", "a", tasks()[0].data, "cross_entropy", validation=tasks()[0].validation)]
    config = {**CONFIG, "generations": 40, "optimizer": {"lr": 1e-9}, "stopping": {"patience": 2}}
    report = train(build(dropout=0.0), fixed, config, cpu=True)
    assert report.generations < 20 and report.stopped.startswith("no better validation")


@pytest.mark.parametrize("change", ["random", "none"])
def test_without_evolution_nothing_competes(change):
    joint = build()
    train(joint, tasks(), {**CONFIG, "evolution": {"change": "none", "start": "order"}}, cpu=True)
    bank = joint.dictionary["8x8-float32"]
    assert bank.hypermodules == 8 and bank.psi.tolist() == [*range(8), *range(8)]


def test_accumulating_micro_batches_is_one_large_batch():
    x, y = torch.randn(32, 4), torch.randn(32, 1)
    config = {"steps": 5, "generations": 0, "final": 1, "optimizer": {"name": "sgd", "lr": 0.05}}
    joints = []
    for data, accumulate in (([(x, y)], 1), ([(x[:16], y[:16]), (x[16:], y[16:])], 2)):
        joint = build(dropout=0.0)
        train(joint, [Task("t", "b", data, "mse")], {**config, "accumulate": accumulate}, cpu=True)
        joints.append(joint.collapse())
    for key, tensor in joints[0]["b"].items():
        torch.testing.assert_close(joints[1]["b"][key], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "more", [{"mixed_precision": "bf16"}, {"checkpointing": True}, {"trackers": ["tensorboard"]}]
)
def test_options_run_to_the_end(more, tmp_path):
    if "trackers" in more:
        pytest.importorskip("tensorboard")
    report = train(build(), tasks(), {**CONFIG, **more}, folder=tmp_path, cpu=True)
    assert report.generations == 6


def test_training_a_member_moves_it_towards_its_original_by_distillation():
    torch.manual_seed(0)
    joint = build(dropout=0.0)
    x = torch.randn(64, 4)
    wanted = joint["a"](x).detach()
    report = train(
        joint,
        [Task("copy", "a", Batches(x, None, 16), "distillation")],
        {"steps": 30, "generations": 6, "final": 6, "evolution": {"alpha": 0.9}, "optimizer": {"lr": 0.005}},
        cpu=True,
    )
    assert report.hypermodules["8x8-float32"] < 16
    with torch.no_grad():
        assert float((joint["a"](x) - wanted).norm() / wanted.norm()) < 0.3


# Streams ----------------------------------------------------------------------------------------------------


def test_a_stream_goes_on_where_it_was():
    data = Batches(torch.arange(10.0), None, 3, seed=5)
    stream = Stream("t", data, seed=1)
    taken = [next(stream)[0].args[0] for _ in range(11)]
    for place in range(11):
        other = Stream("t", Batches(torch.arange(10.0), None, 3, seed=5), seed=1)
        for _ in range(place):
            next(other)
        resumed = Stream("t", Batches(torch.arange(10.0), None, 3, seed=5), seed=1)
        resumed.seek(**other.state())
        assert torch.equal(next(resumed)[0].args[0], taken[place])
    assert sorted(torch.cat(taken[:4]).tolist()) == list(range(10))
    assert not torch.equal(torch.cat(taken[:4]), torch.cat(taken[4:8]))


@pytest.mark.parametrize(("size", "world"), [(10, 3), (4, 4), (7, 2)])
def test_processes_share_a_batch_and_their_weighted_means_are_its_mean(size, world):
    batch = as_batch((torch.randn(size, 3), torch.randn(size)))
    parts = [share(batch, rank, world) for rank in range(world)]
    assert torch.equal(torch.cat([part.target for part, _ in parts]), batch.target)
    mean = sum(weight * part.target.mean() for part, weight in parts) / world
    torch.testing.assert_close(mean, batch.target.mean())


def test_members_stay_what_they_are():
    joint = build()
    train(joint, tasks(), CONFIG, cpu=True)
    assert isinstance(joint["a"], nn.Sequential) and not joint["a"].training


def test_an_unquoted_no_is_a_precision():
    assert Training.model_validate(yaml.safe_load("mixed_precision: no")).mixed_precision == "no"
