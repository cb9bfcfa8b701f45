"""A small network with a stack of layers on templates, with a task, for training tests."""

import torch
from nets import made
from torch import nn

from surgery.anatomy.sites import discover
from surgery.core.joining import join
from surgery.methods.templates.plan import plan_templates
from surgery.training.tasks.streams import Batches
from surgery.training.tasks.tasks import Task

CONFIG = {
    "steps": 5, "burn_in": 1, "generations": 3, "final": 2, "save_seconds": 0,
    "optimizer": {"lr": 0.02, "clip": 1.0, "schedule": "cosine"},
    "evolution": {"challengers": 1, "alpha": 0.6},
    "templates": {"start": "uniform", "lr": 0.3, "entropy": 0.1, "attraction": 0.1, "harden": True},
}  # fmt: skip


class Layer(nn.Module):
    def __init__(self, width, hidden=12):
        super().__init__()
        self.into, self.norm, self.out = (
            nn.Linear(width, hidden),
            nn.LayerNorm(hidden),
            nn.Linear(hidden, width),
        )

    def forward(self, x):
        return x + self.out(torch.tanh(self.norm(self.into(x))))


def network(layers=4, hidden=12):
    torch.manual_seed(0)
    stack = (Layer(8, hidden) for _ in range(layers))
    body = nn.Sequential(nn.Linear(3, 8), *stack, nn.Linear(8, 16), nn.Linear(16, 2))
    return made("net", body, torch.zeros(2, 3))


def build(layers=4, hidden=12, templates=2, mixture=None):
    one = network(layers, hidden)
    return join([one], plan_templates([discover(one)], (4, 4), 2, templates=templates, mixture=mixture))


def task():
    x = torch.randn(64, 3, generator=torch.Generator().manual_seed(1))
    y = ((x[:, 0] * x[:, 1] + x[:, 2]) > 0).long()
    held = Batches(x[48:], y[48:], 16, shuffle=False)
    return Task("signs", "net", Batches(x[:48], y[:48], 16), "cross_entropy", "accuracy", validation=held)
