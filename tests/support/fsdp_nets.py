"""A transformer and a convolutional network to be trained jointly by sharded processes; run as a program.

Its one argument is a JSON object of what `main` takes.
"""

import json
import os
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

import surgery
from surgery.slots.slots import locate
from surgery.training.loop.optimizers import plain
from surgery.training.loop.trainer import Trainer
from surgery.training.tasks.streams import Batches
from surgery.training.tasks.tasks import Task
from surgery.training.train import train

CONFIG = {
    "steps": 4, "burn_in": 1, "generations": 2, "final": 1, "save_seconds": 0, "accumulate": 2,
    "freeze": ["re:.*norm1.*"], "share": ["scale"],
    "evolution": {"epsilon": 0.1, "challengers": 2, "alpha": 0.7, "contexts": "scaled", "draw": "explain",
                  "least": 0.01, "scale": "rows"},
    "optimizer": {"name": "adamw", "lr": 0.01, "schedule": "cosine", "warmup": 3, "clip": 0.5, "weight_decay": 0.01},
}  # fmt: skip


class Reader(nn.Module):
    """Tokens to classes; what is hard to cut: a tied embedding, an LSTM's flat weights, a number alone."""

    def __init__(self, width=32):
        super().__init__()
        self.embed = nn.Embedding(16, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.0, batch_first=True) for _ in range(2)
        )
        self.recur = nn.LSTM(width, width, batch_first=True)
        self.score = nn.Linear(width, 16)
        self.score.weight = self.embed.weight
        self.scale, self.shift = nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(()))

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.score(self.recur(x)[0].mean(1)) * self.scale.mean() + self.shift


class Seer(nn.Module):
    """Images to classes; its `scale` can be the reader's."""

    def __init__(self):
        super().__init__()
        layers = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU()]
        for _ in range(2):
            layers += [nn.Conv2d(16, 16, 3, padding=1), nn.GroupNorm(2, 16), nn.ReLU()]
        layers += [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 24), nn.Linear(24, 2)]
        self.layers, self.scale = nn.Sequential(*layers), nn.Parameter(torch.ones(3))

    def forward(self, images):
        return self.layers(images) * self.scale.mean()


def build(dtype="float64"):
    """In blocks of an odd size; in float64 no decision depends on the order in which processes add up."""
    torch.manual_seed(0)
    members = [
        surgery.load_member(Reader(), name="reader", inputs=torch.randint(16, (2, 6))),
        surgery.load_member(Seer(), name="seer", inputs=torch.randn(2, 1, 6, 6)),
    ]
    return surgery.join(members, block=(7, 9), context=2).to(getattr(torch, dtype))


def tasks(dtype="float64"):
    draw = torch.Generator().manual_seed(0)
    tokens, images = torch.randint(16, (40, 6), generator=draw), torch.randn(40, 1, 6, 6, generator=draw)
    parity, bright = tokens.sum(1) % 3, (images.mean((1, 2, 3)) > 0).long()
    images = images.to(getattr(torch, dtype))

    def part(inputs, target, first, last, shuffle=True):
        return Batches(inputs[first:last], target[first:last], 8, shuffle=shuffle)

    distil = {"cross_entropy": 1.0, "distillation": 0.5}
    return [
        Task("parity", "reader", part(tokens, parity, 0, 24), distil,
             validation=part(tokens, parity, 24, 40, False)),
        Task("bright", "seer", part(images, bright, 0, 24), "cross_entropy", "accuracy",
             validation=part(images, bright, 24, 40, False), weight=2.0),
    ]  # fmt: skip


def held(trainer):
    """Bytes of this process: parameters, the weights made of them, gradients, and what the optimizer keeps."""
    joint = trainer.joint

    def size(tensors):
        own = (getattr(tensor, "_local_tensor", tensor) for tensor in tensors)
        return sum({tensor.data_ptr(): tensor.nbytes for tensor in own}.values())

    slots = [getattr(*locate(joint[p.site.member], p.site.owners[0])) for p in joint.plan.placements]
    state = [value for each in plain(trainer.optimizer).state.values() for value in each.values()]
    return {
        "dictionary": size(joint.dictionary.parameters()),
        "members": size([*slots, *joint.bodies.parameters()]),
        "gradients": size(p.grad for p in trainer.parameters() if p.grad is not None),
        "optimizer": size(value for value in state if value.ndim),
    }


def main(out, folder=None, slow=0.0, config=None, dtype="float64"):
    """Train, resuming where a state is; write each process's weights, and what it decided and held."""
    rank, step, facts = os.environ.get("RANK", "0"), Trainer.train_step, {}
    Path(out).mkdir(parents=True, exist_ok=True)
    (Path(out) / f"{rank}.pid").write_text(str(os.getpid()))

    def watched(self):
        time.sleep(slow)
        clip = self.processes.clip
        self.processes.clip = lambda *args: (facts.update(held(self)), clip(*args))
        step(self)
        del self.processes.clip

    Trainer.train_step = watched
    try:
        joint, given = build(dtype), {**CONFIG, **(config or {})}
        report = train(joint, tasks(dtype), given, folder=folder, resume=folder is not None, cpu=True)
    finally:
        Trainer.train_step = step
    weights = {f"{m}/{k}": t.clone() for m, s in joint.collapse().items() for k, t in s.items()}
    save_file(weights, Path(out) / f"{rank}.safetensors")
    decided = {
        "best": report.best,
        "generations": report.generations,
        "hypermodules": dict(report.hypermodules),
        "numbers": list(report.numbers),
        "trained": report.trained,
        "psi": {key: joint.dictionary[key].psi.tolist() for key in joint.dictionary},
    }
    scores = {name: score.loss for name, score in report.scores.items()}
    found = {"decided": decided, "scores": scores, "bytes": facts}
    (Path(out) / f"{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
