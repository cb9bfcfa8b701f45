"""Copies of modules right after a forward pass with gradients: what is part of a graph is copied without it."""

import copy
import threading

import pytest
import torch
from nets import assert_same_bits
from torch import nn
from torch.nn.utils import parametrizations, prune

import surgery
from surgery.util.copies import duplicate


class Keeping(nn.Module):
    """Keeps activations for pictures, in an attribute and deep in containers, and a lock, which has no copy."""

    def __init__(self):
        super().__init__()
        self.into, self.middle, self.out = nn.Linear(8, 32), nn.Linear(32, 32), nn.Linear(32, 8)
        self.kept, self.history, self.lock = None, {"all": []}, threading.Lock()

    def forward(self, x):
        self.kept = self.middle(torch.relu(self.into(x)))
        self.history["all"].append((self.kept, len(x)))
        return self.out(self.kept)


def _plain():
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 8))


def _with(change):
    net = _plain()
    change(net[2])
    return net


NETS = {
    "kept": Keeping,
    "weight norm": lambda: _with(nn.utils.weight_norm),
    "spectral norm": lambda: _with(nn.utils.spectral_norm),
    "pruned": lambda: _with(lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5)),
    "weight norm, parametrized": lambda: _with(parametrizations.weight_norm),
    "spectral norm, parametrized": lambda: _with(parametrizations.spectral_norm),
    "orthogonal": lambda: _with(parametrizations.orthogonal),
}


def _joined(kind):
    torch.manual_seed(0)
    net = NETS[kind]()
    x = torch.randn(4, 8)
    joint = surgery.join([surgery.load_member(net, name="net", inputs=x)], block=(8, 8))
    assert joint.plan.placements
    return joint, net, x


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("kind", NETS)
def test_members_are_copied_and_extracted_after_a_gradient_pass(kind, train):
    joint, net, x = _joined(kind)
    net.train(train)
    net(x).square().mean().backward()
    before = joint.collapse("net")
    kept = {key: value for key, value in vars(net).items() if isinstance(value, torch.Tensor)}
    extracted, twin = joint.extract("net"), copy.deepcopy(joint)
    for key, value in kept.items():
        assert (
            getattr(net, key) is value and value.requires_grad
        )  # the member keeps its own, history included
    assert_same_bits(extracted.state_dict(), before)
    assert_same_bits(twin.collapse("net"), before)
    net.eval()
    with torch.no_grad():
        wanted = net(x)
        assert torch.equal(extracted.eval()(x), wanted)
        assert torch.equal(twin["net"].eval()(x), wanted)
    extracted(x).sum().backward()
    assert all(p.grad is not None for p in extracted.parameters())


def test_values_are_kept_without_history_wherever_they_are_held():
    net = Keeping()
    net(torch.randn(4, 8))
    twin = duplicate(net)
    assert twin.kept.grad_fn is None and torch.equal(twin.kept, net.kept)
    assert twin.history["all"][0][0] is twin.kept and net.kept.grad_fn is not None
    assert twin.lock is net.lock


def test_copies_made_with_one_memo_share_what_their_modules_share():
    first, second, memo = nn.Linear(4, 4), nn.Linear(4, 4), {}
    second.weight = first.weight
    one, two = duplicate(first, memo), duplicate(second, memo)
    assert one.weight is two.weight and one.weight is not first.weight
