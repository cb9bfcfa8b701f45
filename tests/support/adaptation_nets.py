"""Twins of which one adapts to a shifted domain; also run as a program, to be cut off or launched twice."""

import os
import sys
from pathlib import Path

import torch
from torch import nn

import surgery
from surgery.training.tasks.features import SourceFeatures, features_of
from surgery.training.tasks.streams import Batches
from surgery.training.tasks.tasks import Task
from surgery.training.train import train

CONFIG = {
    "steps": 6, "generations": 3, "final": 0, "freeze": ["re:.*"], "optimizer": {"lr": 0.01}, "save_seconds": 0,
    "templates": {"freeze": True, "lr": 0.03}, "stopping": {"keep": "last"},
    "evolution": {"codes": "ones", "change": "none", "freeze": True},
}  # fmt: skip
X = torch.randn(90, 6, generator=torch.Generator().manual_seed(0))
SHIFTED = X * 1.5 + 0.7


class Layer(nn.Module):
    def __init__(self, width, norm):
        super().__init__()
        self.into, self.out = nn.Linear(width, 12), nn.Linear(12, width)
        self.norm = nn.BatchNorm1d(12) if norm == "batch" else nn.LayerNorm(12)

    def forward(self, x):
        return x + self.out(torch.tanh(self.norm(self.into(x))))


def network(name, norm="layer"):
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(6, 8), *(Layer(8, norm) for _ in range(4)), nn.Linear(8, 3))
    return surgery.load_member(body, name=name, inputs=torch.zeros(2, 6))


def twins(norm="layer"):
    """A source and a target of the same weights, on templates that they share."""
    members = [network("source", norm), network("target", norm)]
    plan = surgery.plan_templates([surgery.discover(each) for each in members], (4, 4), 2, mixture="linear")
    return surgery.join(members, plan)


def task(joint, loss, **more):
    """The target sees shifted inputs without labels, an odd number, so that processes have unequal parts."""
    known = SourceFeatures("5", features_of(joint, "source", [X], "5"), **more)
    return Task("adapt", "target", Batches(SHIFTED, None, 35), loss=loss, source=known)


def main(folder, out, norm, die):
    """Train, resuming where a state is; end without a word at step `die`; write the weights of every rank."""
    from accelerate import PartialState
    from safetensors.torch import save_file

    from surgery.training.loop.trainer import Trainer

    plain, count = Trainer.train_step, [0]

    def step(self):
        count[0] += 1
        if count[0] == die:
            os._exit(9)
        plain(self)
        main.loss = self.losses["adapt"]

    Trainer.train_step = step
    joint = twins(norm)
    train(
        joint, [task(joint, {"moments": 1.0, "adversary": 0.5})], CONFIG, folder=folder, resume=True, cpu=True
    )
    found = {**joint.collapse("target"), **{f"loss/{k}": t for k, t in main.loss.state_dict().items()}}
    Path(out).mkdir(parents=True, exist_ok=True)
    save_file(
        {key: t.clone() for key, t in found.items()},
        Path(out) / f"{PartialState().process_index}.safetensors",
    )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
