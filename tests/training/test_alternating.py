"""Tasks that alternate: a step of the optimizer for each task's batch."""

import pytest
import torch
from torch import nn

import surgery
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
    turns, update = [], Trainer._update

    def count(self):
        turns.append(tuple(task.name for task in self.turn))
        return update(self)

    monkeypatch.setattr(Trainer, "_update", count)
    trained(0.1, alternate=True, accumulate=2)
    assert all(len(turn) == 1 for turn in turns) and len(turns) == 30
    rounds = [tuple(turn[0] for turn in turns[at : at + 3]) for at in range(0, 30, 3)]
    assert all(set(each) == set(NAMES) for each in rounds) and len(set(rounds)) > 2
