"""Two small networks with a task each, for training tests, and a training for processes of their own."""

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from safetensors.torch import save_file
from torch import nn

import surgery
from surgery.training.loop.interruptions import Interrupted
from surgery.training.loop.trainer import Trainer
from surgery.training.tasks.streams import Batches
from surgery.training.tasks.tasks import Task
from surgery.training.train import train

CONFIG = {
    "steps": 7, "burn_in": 1, "generations": 4, "final": 1, "save_seconds": 0,
    "evolution": {"fraction": 0.5, "epsilon": 0.1, "challengers": 2, "alpha": 0.7, "contexts": "fitted",
                  "draw": "explain"},
    "optimizer": {"lr": 0.01, "schedule": "cosine", "warmup": 3, "clip": 1.0},
}  # fmt: skip


@contextmanager
def interrupted_after(steps: int) -> Iterator[None]:
    """Inside, a run is interrupted after so many steps, and has to say so."""
    step = Trainer.train_step

    def stopping(self):
        step(self)
        if self.steps == steps:
            os.kill(os.getpid(), signal.SIGINT)

    Trainer.train_step = stopping
    try:
        with pytest.raises(Interrupted):
            yield
    finally:
        Trainer.train_step = step


def net(outputs, dropout=0.0):
    layers = [nn.Linear(4, 16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 16), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, outputs))


def build(dropout=0.1, block=(8, 8), context=2):
    torch.manual_seed(0)
    members = [
        surgery.load_member(net(outputs, dropout), name=name, inputs=torch.randn(2, 4))
        for name, outputs in (("a", 2), ("b", 1))
    ]
    return surgery.join(members, block=block, context=context)


def tasks():
    x = torch.randn(72, 4, generator=torch.Generator().manual_seed(0))
    label, product = (x.sum(1) > 0).long(), x[:, :1] * x[:, 1:2]
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(x[:48], product[:48]), batch_size=16, shuffle=True
    )
    return [
        Task(
            "classes", "a", Batches(x[:48], label[:48], 16), "cross_entropy", "accuracy",
            validation=Batches(x[48:], label[48:], 16, shuffle=False),
        ),
        Task(
            "product", "b", loader, {"mse": 1.0, "distillation": 0.1}, "rmse",
            validation=Batches(x[48:], product[48:], 16, shuffle=False), weight=2.0,
        ),
    ]  # fmt: skip


def main(folder, out, slow, dropout):
    """Train, resuming where a state is; write the collapsed weights of every rank."""
    if slow:
        plain = Trainer.train_step

        def step(self):
            time.sleep(0.05)
            plain(self)

        Trainer.train_step = step
    joint = build(dropout)
    report = train(joint, tasks(), CONFIG, folder=folder, resume=True, cpu=True)
    rank = PartialState().process_index
    weights = {f"{m}/{k}": t.contiguous() for m, s in joint.collapse().items() for k, t in s.items()}
    Path(out).mkdir(parents=True, exist_ok=True)
    save_file({k: t.clone() for k, t in weights.items()}, Path(out) / f"{rank}.safetensors")
    (Path(out) / f"{rank}.json").write_text(
        json.dumps({"best": report.best, "hypermodules": dict(report.hypermodules)})
    )
