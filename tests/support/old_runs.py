"""Two small runs whose states older versions wrote: `python old_runs.py FOLDER` writes them with the code it finds.

Nothing but the public interface is used, and all is in float64, so that no decision depends on the order of sums.
"""

import signal
import sys
from pathlib import Path

import torch
from torch import nn

import surgery

CONFIG = {
    "steps": 4, "burn_in": 1, "generations": 2, "final": 1, "save_seconds": 0,
    "optimizer": {"name": "adamw", "lr": 0.02, "clip": 1.0, "schedule": "cosine", "warmup": 2, "weight_decay": 0.01},
}  # fmt: skip
KINDS = {
    "hypermodules": {
        **CONFIG,
        "evolution": {
            "epsilon": 0.1,
            "challengers": 2,
            "alpha": 0.7,
            "contexts": "fitted",
            "draw": "explain",
        },
    },
    "templates": {
        **CONFIG,
        "templates": {"count": 2, "mixing": "softmax", "start": "uniform", "lr": 0.3, "harden": True},
    },
}
STOP = {"hypermodules": 11, "templates": 10}  # batches, within the third generation


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.into, self.norm, self.out = nn.Linear(8, 12), nn.LayerNorm(12), nn.Linear(12, 8)

    def forward(self, x):
        return x + self.out(torch.tanh(self.norm(self.into(x))))


def build(kind):
    """The joint model that is trained."""
    torch.manual_seed(0)
    members = []
    for name in ("one", "two")[: 1 if kind == "templates" else 2]:
        layers = (
            [Layer() for _ in range(4)]
            if kind == "templates"
            else [nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)]
        )
        net = nn.Sequential(nn.Linear(4, 8), *layers, nn.Linear(8, 2)).double()
        members.append(surgery.load_member(net, name=name, inputs=torch.zeros(2, 4, dtype=torch.float64)))
    plan = surgery.plan_templates([surgery.discover(members[0])], (4, 4), 2) if kind == "templates" else None
    return surgery.join(members, plan, block=(4, 4), context=2)


class Data:
    """Batches in one order; asks for a stop once, where it is told to."""

    def __init__(self, batches, stop=None):
        self.batches, self.stop = batches, stop

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        for batch in self.batches:
            if self.stop is not None:
                self.stop -= 1
                if self.stop == 0:
                    signal.raise_signal(signal.SIGINT)
            yield batch


def tasks(kind, stop=None):
    x = torch.randn(48, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = ((x[:, 0] * x[:, 1] + x[:, 2]) > 0).long()
    batches, held = list(zip(x[:32].split(8), y[:32].split(8), strict=True)), [(x[32:], y[32:])]
    names = ("one", "two")[: 1 if kind == "templates" else 2]
    return [
        surgery.Task(f"signs of {name}", name, Data(batches, stop if name == "one" else None), "cross_entropy",
                     "accuracy", validation=held)
        for name in names
    ]  # fmt: skip


def run(kind, folder=None, stop=None, resume=False, config=None):
    """Train; the joint model and the report."""
    joint, config = build(kind), config or KINDS[kind]
    return joint, surgery.train(joint, tasks(kind, stop), config, folder=folder, resume=resume, cpu=True)


if __name__ == "__main__":
    for each in KINDS:
        try:
            run(each, Path(sys.argv[1]) / each, STOP[each])
        except BaseException as error:
            if type(error).__name__ != "Interrupted":
                raise
        else:
            raise SystemExit(f"{each} was not stopped")
