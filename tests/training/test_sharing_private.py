"""Private that members share: one parameter, trained by all losses, the same through save and resume."""

import copy

import pytest
import torch
from torch import nn
from training_nets import CONFIG, tasks

import surgery
from surgery.errors import PlanError
from surgery.training.loop.interruptions import Interrupted
from surgery.training.loop.run import STATE
from surgery.training.loop.sharing_private import share_private
from surgery.training.loop.trainer import Trainer
from surgery.training.train import train


def net(outputs):
    return nn.Sequential(
        nn.Linear(4, 16),
        nn.LayerNorm(16),
        nn.ReLU(),
        nn.Linear(16, 16),
        nn.BatchNorm1d(16),
        nn.Linear(16, outputs),
    )


def joined():
    torch.manual_seed(0)
    made = {"a": net(2), "b": net(1)}
    with torch.no_grad():
        made["b"][1].weight.mul_(3)  # the members differ in this one alone
    members = [surgery.load_member(m, name=n, inputs=torch.randn(2, 4)) for n, m in made.items()]
    return surgery.join(members, block=(8, 8), context=2)


def norms(joint):
    return share_private(joint, {name: ["re:1\\..*", "4.weight"] for name in joint.names})


def test_what_is_shared_begins_as_the_mean_and_the_rest_stays():
    joint = joined()
    before = {name: copy.deepcopy(joint[name].state_dict()) for name in joint.names}
    assert norms(joint) == 16 * 3
    for key in ("1.weight", "1.bias", "4.weight"):
        assert joint["a"].get_parameter(key) is joint["b"].get_parameter(key)
    assert torch.equal(joint["b"][1].weight, torch.full((16,), 2.0))
    assert torch.equal(joint["a"][4].weight, before["a"]["4.weight"])
    assert joint["a"][4].bias is not joint["b"][4].bias
    assert joint["a"][4].running_mean is not joint["b"][4].running_mean
    assert norms(joint) == 0  # again: nothing is left to do


def test_a_shared_gradient_is_the_sum_of_the_members_own():
    joint, x = joined(), torch.randn(9, 4)
    norms(joint)
    alone = {name: joint.extract(name).train() for name in joint.names}
    joint.bodies.train()
    with joint.step():
        for name in joint.names:
            joint[name](x).square().mean().backward()
    for module in alone.values():
        module(x).square().mean().backward()
    for key in ("1.weight", "1.bias", "4.weight"):
        expected = sum(module.get_parameter(key).grad for module in alone.values())
        torch.testing.assert_close(joint["a"].get_parameter(key).grad, expected, rtol=1e-5, atol=1e-7)


def test_training_keeps_them_equal_through_saving_and_an_interrupt(tmp_path, monkeypatch):
    config = {**CONFIG, "share": ["re:1\\..*", "a:4.weight", "b:4.weight"]}
    whole = joined()
    train(whole, tasks(), config, cpu=True)
    found = whole.collapse()
    for key in ("1.weight", "1.bias", "4.weight"):
        assert torch.equal(found["a"][key], found["b"][key])
    assert not torch.equal(found["a"]["1.weight"], torch.full((16,), 2.0))
    assert not torch.equal(found["a"]["4.bias"], found["b"]["4.bias"])

    plain, count = Trainer.train_step, 0

    def step(self):
        nonlocal count
        count += 1
        if count == 17:
            raise Interrupted
        plain(self)

    monkeypatch.setattr(Trainer, "train_step", step)
    with pytest.raises(Interrupted):
        train(joined(), tasks(), config, folder=tmp_path / "run", cpu=True)
    assert (tmp_path / "run" / STATE).exists()
    monkeypatch.undo()
    broken = joined()
    train(broken, tasks(), config, folder=tmp_path / "run", resume=True, cpu=True)
    for name, state in broken.collapse().items():
        for key, tensor in state.items():
            assert torch.equal(tensor, found[name][key]), (name, key)

    surgery.save(whole, tmp_path / "joint")
    loaded = surgery.load(tmp_path / "joint", modules={"a": net(2), "b": net(1)})
    for name, state in loaded.collapse().items():
        assert all(torch.equal(tensor, found[name][key]) for key, tensor in state.items())


@pytest.mark.parametrize("selector", ["5.bias", "3.weight", "b:4.bias"])
def test_a_selector_without_a_counterpart_is_refused(selector):
    joint = joined()
    before = {name: id(joint[name].get_parameter("1.weight")) for name in joint.names}
    with pytest.raises(PlanError, match="share"):
        train(joint, tasks(), {**CONFIG, "share": ["re:1\\..*", selector]}, cpu=True)
    assert {name: id(joint[name].get_parameter("1.weight")) for name in joint.names} == before
