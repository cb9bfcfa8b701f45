"""Runs that adapt: the discriminator belongs to the run's state, and several processes have one discriminator."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import adaptation_nets
import pytest
import torch
from adaptation_nets import CONFIG, task, twins
from processes import Started, forks
from safetensors.torch import load_file
from torch import nn

from surgery.errors import PlanError, TrainingError
from surgery.training.loop.interruptions import Interrupted
from surgery.training.loop.run import STATE
from surgery.training.loop.state import read_state
from surgery.training.loop.trainer import Trainer
from surgery.training.report.runlog import read_log
from surgery.training.tasks.adaptation import Adversary
from surgery.training.tasks.stateful import Sum, pack_loss, unpack_loss
from surgery.training.tasks.tasks import Task
from surgery.training.train import train

PROGRAM = Path(adaptation_nets.__file__)
BOTH = {"moments": 1.0, "adversary": 0.5}


def run(folder, loss, monkeypatch=None, stop=None, norm="batch", **more):
    """A run, interrupted at a step where one is given; the target's weights and what the loss has learned."""
    joint, kept, count, plain = twins(norm), {}, [0], Trainer.train_step

    def step(self):
        count[0] += 1
        if count[0] == stop:
            signal.raise_signal(signal.SIGINT)
        plain(self)
        kept.update(pack_loss(self.losses["adapt"]))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Trainer, "train_step", step)
        report = train(joint, [task(joint, loss)], CONFIG, folder=folder, cpu=True, **more)
    return {**joint.collapse("target"), **{f"loss/{k}": t for k, t in kept.items()}}, report


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return (*run(folder, BOTH), folder)


@pytest.mark.parametrize("step", [1, 2, 6, 7, 11, 17])
def test_interrupted_at_any_step_an_adversary_goes_on_bit_for_bit(unbroken, tmp_path, step):
    with pytest.raises(Interrupted):
        run(tmp_path, BOTH, stop=step)
    tensors, _ = read_state(tmp_path / STATE)
    assert {"loss/0/adversary.generator", "loss/0/adversary.optimizer.0.step"} <= {*map(str, tensors)}
    found, _ = run(tmp_path, BOTH, resume=True)
    assert len(found) > 30 and found.keys() == unbroken[0].keys()
    for key, tensor in unbroken[0].items():
        assert torch.equal(found[key], tensor), key


def test_the_log_says_what_was_adapted_and_the_members_are_let_go(unbroken):
    _, report, folder = unbroken
    facts = {"by": BOTH, "part": "5", "examples": 90, "settings": {}}
    first, *_, last = read_log(folder / "log.jsonl")
    assert first["tasks"]["adapt"]["adapted"] == last["adapted"]["adapt"] == facts == report.adapted["adapt"]
    joint = twins()
    train(joint, [task(joint, BOTH)], CONFIG, cpu=True)
    assert not joint["target"][5]._forward_pre_hooks


def test_the_state_of_one_loss_is_none_of_another(tmp_path):
    with pytest.raises(Interrupted):
        run(tmp_path, "adversary", stop=4)
    with pytest.raises(TrainingError, match="belongs to another plan"):
        run(tmp_path, "moments", resume=True)
    loss = Sum({"adversary": (1.0, lambda output, batch: output)})
    with pytest.raises(TrainingError, match=r"loss of adapt, none, but has width"):
        unpack_loss(loss, {"width": torch.zeros(1)}, "adapt")


class Counting(nn.Module):
    """A loss that is a module and counts how often it was asked."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, output, batch):
        self.calls += torch.is_grad_enabled()
        return output.square().mean() * self.calls


def test_a_module_as_loss_keeps_its_state_through_an_interrupt(tmp_path):
    whole = run(None, Counting())[0]
    with pytest.raises(Interrupted):
        run(tmp_path, Counting(), stop=8)
    found = run(tmp_path, Counting(), resume=True)[0]
    assert float(found["loss/calls"]) == 18
    assert all(torch.equal(found[key], tensor) for key, tensor in whole.items())


# Several processes --------------------------------------------------------------------------------------------


def weights(out):
    return [load_file(out / f"{rank}.safetensors") for rank in (0, 1)]


def launch(folder, out, norm, die=0):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", str(PROGRAM)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [*command, str(folder), str(out), norm, str(die)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=240,
    )  # fmt: skip
    if die:
        assert done.returncode and not Path(out).exists()
        return None
    assert done.returncode == 0, done.stdout[-3000:]
    return weights(out)


@forks
def test_two_processes_have_one_discriminator_and_give_the_result_of_one(tmp_path):
    one = run(None, BOTH, norm="layer")[0]
    Started(adaptation_nets.main, str(tmp_path / "run"), str(tmp_path / "out"), "layer", 0, ranks=2).succeed()
    first, second = weights(tmp_path / "out")
    assert first.keys() == one.keys()
    for key, tensor in one.items():
        assert torch.equal(first[key], second[key]), key
        torch.testing.assert_close(first[key], tensor, rtol=1e-3, atol=1e-5)  # sums in another order


@pytest.mark.slow
def test_two_processes_that_were_cut_off_go_on_bit_for_bit_and_share_running_statistics(tmp_path):
    first, second = launch(tmp_path / "whole", tmp_path / "o1", "batch")
    assert all(torch.equal(first[key], second[key]) for key in first)
    launch(tmp_path / "cut", tmp_path / "o2", "batch", die=10)
    assert (tmp_path / "cut" / STATE).exists()
    for again in launch(tmp_path / "cut", tmp_path / "o2", "batch"):
        assert all(torch.equal(again[key], tensor) for key, tensor in first.items())


# What is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "more", "said"),
    [
        (
            "moments",
            {"settings": {"width": 3}},
            "settings of the loss moments must be of orders, found width",
        ),
        ("moments", {"settings": {"orders": 0}}, "at least one moment"),
        ("adversary", {"settings": {"width": "wide"}}, "settings of the loss adversary must suit it"),
        ("momens", {}, "no loss 'momens', did you mean 'moments'"),
    ],
)
def test_ways_and_settings_that_are_not_are_refused(loss, more, said):
    joint = twins()
    with pytest.raises(PlanError, match=said):
        train(joint, [task(joint, loss, **more)], CONFIG, cpu=True)


def test_a_source_is_needed_and_must_be_as_wide_and_targets_where_a_loss_wants_them():
    joint = twins()
    alone = Task("adapt", "target", [torch.zeros(4, 6)], loss="adversary")
    with pytest.raises(
        PlanError, match=r"compares a member's features.*the task has none.*templates\.source"
    ):
        train(joint, [alone], CONFIG, cpu=True)
    wide = task(joint, "adversary")
    wide = Task(
        "adapt", "target", wide.data, loss="adversary", source=wide.source.__class__("1", torch.zeros(9, 4))
    )
    with pytest.raises(PlanError, match=r"reaches '1' has 4 numbers .* the source and 8 for"):
        train(twins(), [wide], CONFIG, cpu=True)
    with pytest.raises(TrainingError, match=r"task 'adapt'.*compares with targets, but the data give none"):
        train(twins(), [Task("adapt", "target", [torch.zeros(4, 6)])], CONFIG, cpu=True)


def test_a_discriminator_is_exact_in_mixed_precision():
    joint, seen = twins(), []

    def spy(output, batch):
        loss = adversary(output, batch)
        seen.append((loss.dtype, {p.dtype for p in adversary.discriminator.parameters()}))
        return loss

    known = task(joint, "adversary")
    adversary = Adversary(joint["target"], "5", known.source.features)
    train(
        joint,
        [Task("adapt", "target", known.data, loss=spy)],
        {**CONFIG, "mixed_precision": "bf16"},
        cpu=True,
    )
    assert len(seen) == 1 + 18 and set(map(repr, seen)) == {repr((torch.float32, {torch.float32}))}
    assert (
        float(adversary.optimizer.state[adversary.discriminator[0].weight]["step"]) == 18
    )  # the rehearsal makes none
