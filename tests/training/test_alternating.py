"""Tasks that alternate: a step of the optimizer for each task's batch."""

import pytest
import torch
from torch import nn

import surgery
from surgery.settings.former import DEFAULTS
from surgery.settings.training import Training
from surgery.training.loop.agreement import differences, flat
from surgery.training.loop.trainer import Trainer
from surgery.training.tasks.streams import Batches

NAMES = ("a", "b", "c")


def trained(lr, weights=(1, 1, 1), **config):
    x = torch.randn(24, 3, generator=torch.Generator().manual_seed(1))
    members, tasks = [], []
    for number, name in enumerate(NAMES):
        with torch.random.fork_rng():
            torch.manual_seed(number)
            net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
        members.append(surgery.load_member(net, name=name, inputs=x[:2].double()))
        data = Batches(x.double(), x[:, number : number + 1].double(), 8)
        tasks.append(surgery.Task(name, name, data, "mse", weight=weights[number]))
    joint = surgery.join(
        members, surgery.make_plan([surgery.discover(m, private=["re:.*"]) for m in members])
    )
    settings = {
        "steps": 5, "generations": 2, "final": 0, "stopping": {"keep": "last"},
        "optimizer": {"name": "sgd", "lr": lr, "momentum": 0.0}, "evolution": {"change": "none", "codes": "ones"},
    }  # fmt: skip
    surgery.train(joint, tasks, {**settings, **config}, cpu=True)
    return {name: joint[name].state_dict() for name in NAMES}


@pytest.mark.parametrize("weights", [(1, 1, 1), (1, 2, 5)])
def test_members_that_share_nothing_learn_as_together_at_so_many_times_the_rate(weights):
    together, apart = trained(0.3, weights), trained(0.1, weights, alternate=True)
    for name in NAMES:
        for key, tensor in together[name].items():
            torch.testing.assert_close(apart[name][key], tensor, rtol=1e-6, atol=1e-7)  # of float32 rates


def test_each_step_is_of_one_task_and_a_round_of_all(monkeypatch):
    turns, update = [], Trainer.compute

    def count(self, batches):
        turns.append(tuple(task.name for task in self.turn))
        return update(self, batches)

    monkeypatch.setattr(Trainer, "compute", count)
    trained(0.1, alternate=True, accumulate=2)
    assert all(len(turn) == 1 for turn in turns) and len(turns) == 30
    rounds = [tuple(turn[0] for turn in turns[at : at + 3]) for at in range(0, 30, 3)]
    assert all(set(each) == set(NAMES) for each in rounds) and len(set(rounds)) > 2


SAID = """accumulate burn_in checkpointing compile evolution.challengers evolution.change evolution.codes
evolution.contexts evolution.draw evolution.epsilon evolution.final_alpha evolution.freeze evolution.hypermodules
evolution.least evolution.power evolution.siblings evolution.start final freeze generations mixed_precision
optimizer.momentum optimizer.name optimizer.schedule optimizer.soft_eps optimizer.warmup optimizer.weight_decay share
steps stopping.keep stopping.patience templates.attraction templates.entropy templates.freeze templates.harden
templates.learn templates.like templates.lr templates.source templates.start templates.sure validate_every"""
"""Settings that states of runs have said since there are any."""

FREE = {"save_seconds", "trackers", "capture", "optimizer.lr", "optimizer.clip", "optimizer.soft_lr", "keep"}
"""Those that a run that goes on may change, or that are compared by themselves."""


def test_a_setting_that_is_new_has_a_value_for_runs_that_began_without_it():
    now = flat(Training().model_dump(mode="json"))
    assert set(now) - FREE == set(SAID.split()) | {name for name in DEFAULTS if name in now}


def test_a_run_that_began_before_tasks_could_alternate_goes_on():
    now = {"train": {"alternate": False, "steps": 5}}
    assert differences(now, {"train": {"steps": 5}}) == ""
    now["train"]["alternate"] = True
    assert differences(now, {"train": {"steps": 5}}) == "train.alternate was False and is True"
