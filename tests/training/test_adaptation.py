"""Domain adaptation: its losses, and that a shifted domain is found again by mixtures alone."""

import pytest
import torch
from stacked_nets import Layer
from torch import nn

import surgery
from surgery.anatomy.sites import discover
from surgery.core.joining import join
from surgery.errors import PlanError
from surgery.methods.templates.plan import plan_templates
from surgery.training.tasks.adaptation import Adversary, Moments
from surgery.training.tasks.features import features_of
from surgery.training.tasks.streams import Batches
from surgery.training.tasks.tasks import Batch, Task
from surgery.training.train import train


def network(name):
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(6, 8), *(Layer(8) for _ in range(4)), nn.Linear(8, 3))
    return surgery.load_member(body, name=name, inputs=torch.zeros(2, 6))


def twins():
    """A source and a target of the same weights, on templates that they share."""
    members = [network("source"), network("target")]
    return join(members, plan_templates([discover(each) for each in members], (4, 4), 2, mixture="linear"))


X = torch.randn(128, 6, generator=torch.Generator().manual_seed(0))
SHIFTED = X * 1.5 + 0.7


def test_moments_are_those_of_the_paper():
    net = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2))
    source, x = torch.randn(50, 4) * 3 + 1, torch.randn(7, 6)
    loss = Moments(net, "1", source)
    found = loss(net(x), Batch())
    target = (net[0](x) - source.mean(0)) / source.std(0, correction=0)
    scaled = (source - source.mean(0)) / source.std(0, correction=0)
    slow = sum(
        sum(float((scaled[:, f] ** k).mean() - (target[:, f] ** k).detach().mean()) ** 2 for f in range(4))
        ** 0.5
        for k in (1, 2)
    )
    assert float(found.detach()) == pytest.approx(slow, rel=1e-4)
    same = nn.Sequential(nn.Identity(), nn.Linear(4, 2))
    assert float(Moments(same, "1", source)(same(source), Batch()).detach()) < 1e-5


def test_an_adversary_learns_to_tell_domains_and_only_while_gradients_are_recorded():
    net = nn.Sequential(nn.Identity(), nn.Linear(6, 2))
    loss = Adversary(net, "1", X, lr=1e-2)
    first = float(loss(net(SHIFTED), Batch()).detach())
    for _ in range(60):
        last = float(loss(net(SHIFTED), Batch()).detach())
    assert last > first + 0.5  # the surer it is, the more the target has to change
    before = [p.detach().clone() for p in loss.discriminator.parameters()]
    with torch.no_grad():
        loss(net(SHIFTED), Batch())
    assert all(torch.equal(a, b) for a, b in zip(before, loss.discriminator.parameters(), strict=True))
    assert all(p.requires_grad for p in loss.discriminator.parameters())


def test_features_leave_modes_of_single_modules_as_they_are():
    joint = twins()
    body = joint["source"].train()
    *_, still = body.modules()
    still.eval()  # as a norm that is frozen
    features_of(joint, "source", [(X, None)], "5")
    assert body.training and not still.training


@pytest.mark.parametrize("kind", [Moments, Adversary])
def test_adaptation_trains_the_target_s_mixtures_alone(kind):
    joint = twins()
    names = {"source": X, "target": SHIFTED}
    before = {name: features_of(joint, name, [(x, None)], "5") for name, x in names.items()}
    loss = kind(joint["target"], "5", before["source"])
    config = {
        "steps": 60, "generations": 1, "final": 0, "freeze": ["re:.*"], "optimizer": {"lr": 0.01},
        "templates": {"freeze": True, "lr": 0.03}, "stopping": {"keep": "last"},
        "evolution": {"codes": "ones", "change": "none"},
    }  # fmt: skip
    state = {name: joint.collapse(name) for name in joint}
    data = Batches(SHIFTED, torch.zeros(len(SHIFTED)), 64)
    report = train(joint, [Task("adapt", "target", data, loss=loss)], config, cpu=True)
    assert report.trained == 2 * 4 * 4  # both members' mixtures of four templates for four layers
    after = features_of(joint, "target", [(SHIFTED, None)], "5")

    def distance(features):
        return float((features.mean(0) - before["source"].mean(0)).norm())

    if kind is Moments:  # an adversarial game promises nothing after so few steps
        assert distance(after) < 0.8 * distance(before["target"])
    source = joint.collapse("source")
    assert all(torch.equal(source[key], tensor) for key, tensor in state["source"].items())
    changed = [key for key, t in joint.collapse("target").items() if not torch.equal(t, state["target"][key])]
    assert changed and all(key[0] in "1234" and "norm" not in key for key in changed)


def test_features_must_be_there():
    joint = twins()
    with pytest.raises(PlanError, match="there is no 'head'; there are 0, 1, 2"):
        Moments(joint["target"], "head", X)
    with pytest.raises(PlanError, match="did not run"):
        Moments(joint["target"], "5", X)(None, Batch())
