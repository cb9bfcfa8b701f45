"""A transformer and a convolutional network to be trained jointly by sharded processes; run as a program.

Its one argument is a JSON object: `config` of the training, `folder` and `out`, `slow` steps that a test can kill, and
what `build` takes.
"""

import json
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

import surgery
from surgery.training.optimizers import plain
from surgery.training.streams import Batches
from surgery.training.tasks import Task
from surgery.training.train import train
from surgery.training.trainer import Trainer

CONFIG = {
    "steps": 5, "burn_in": 1, "generations": 3, "final": 1, "save_seconds": 0,
    "evolution": {"epsilon": 0.1, "challengers": 2, "alpha": 0.7, "contexts": "scaled", "draw": "explain",
                  "least": 0.01, "scale": "rows"},
    "optimizer": {"name": "adamw", "lr": 0.01, "schedule": "cosine", "warmup": 3, "clip": 0.5, "weight_decay": 0.01},
}  # fmt: skip


class Reader(nn.Module):
    """Tokens to classes; the scores of its layers' last linear map are tied to its embedding where asked."""

    def __init__(self, width=32, tied=False):
        super().__init__()
        self.embed = nn.Embedding(16, width)
        layer = [
            nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.0, batch_first=True) for _ in range(2)
        ]
        self.layers = nn.ModuleList(layer)
        self.recur = nn.LSTM(width, width, batch_first=True)
        self.score = nn.Linear(width, 16 if tied else 3)
        self.scale = nn.Parameter(torch.ones(()))
        if tied:
            self.score.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.score(self.recur(x)[0].mean(1)) * self.scale


def seer():
    layers = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU()]
    for _ in range(2):
        layers += [nn.Conv2d(16, 16, 3, padding=1), nn.GroupNorm(2, 16), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 24), nn.Linear(24, 2))


def build(block=(8, 8), context=2, tied=False, method=None):
    torch.manual_seed(0)
    members = [
        surgery.load_member(Reader(tied=tied), name="reader", inputs=torch.randint(16, (2, 6))),
        surgery.load_member(seer(), name="seer", inputs=torch.randn(2, 1, 6, 6)),
    ]
    if method != "templates":
        return surgery.join(members, block=block, context=context)
    from surgery.template_plan import plan_templates

    return surgery.join(members, plan_templates([surgery.discover(member) for member in members]))


def tasks(distil=False, dtype=torch.float32):
    draw = torch.Generator().manual_seed(0)
    tokens, images = (
        torch.randint(16, (40, 6), generator=draw),
        torch.randn(40, 1, 6, 6, generator=draw),
    )
    images = images.to(dtype)
    parity, bright = tokens.sum(1) % 3, (images.mean((1, 2, 3)) > 0).long()
    held = Batches(images[24:], bright[24:], 16, shuffle=False)
    loss = {"cross_entropy": 1.0, "distillation": 0.5} if distil else "cross_entropy"
    return [
        Task("parity", "reader", Batches(tokens, parity, 8), loss),
        Task("bright", "seer", Batches(images[:24], bright[:24], 8), loss, "accuracy", validation=held, weight=2.0),
    ]  # fmt: skip


def held(trainer):
    """Bytes of this process: parameters, the weights made of them, gradients, and what the optimizer keeps."""
    joint = trainer.joint

    def size(tensors):
        seen = {}
        for tensor in tensors:
            tensor = getattr(tensor, "_local_tensor", tensor)
            seen[tensor.untyped_storage().data_ptr()] = tensor.nbytes
        return sum(seen.values())

    slots = []
    for p in joint.plan.placements:
        path, _, name = p.site.owners[0].rpartition(".")
        slots.append(getattr(joint[p.site.member].get_submodule(path), name))
    state = [v for each in plain(trainer.optimizer).state.values() for v in each.values()]
    return {
        "dictionary": size(joint.dictionary.parameters()),
        "members": size([*slots, *joint.bodies.parameters()]),
        "gradients": size(p.grad for p in trainer.parameters() if p.grad is not None),
        "optimizer": size(v for v in state if isinstance(v, torch.Tensor) and v.ndim),
    }


def main(folder=None, out=None, slow=0.0, config=None, distil=False, **options):
    told, step = {}, Trainer.train_step

    def watched(self):
        time.sleep(slow)
        optimizer = plain(self.optimizer)
        inner = optimizer.step

        def measured():
            inner()
            told.update(held(self))

        optimizer.step = measured
        step(self)
        del optimizer.step

    Trainer.train_step = watched
    joint = build(**options)
    report = train(joint, tasks(distil), config or CONFIG, folder=folder, resume=folder is not None, cpu=True)
    from accelerate import PartialState

    rank = PartialState().process_index
    Path(out).mkdir(parents=True, exist_ok=True)
    weights = {f"{m}/{k}": t.clone() for m, s in joint.collapse().items() for k, t in s.items()}
    save_file(weights, Path(out) / f"{rank}.safetensors")
    scores = {name: score.loss for name, score in report.scores.items()}
    decided = {"best": report.best, "hypermodules": dict(report.hypermodules), "numbers": report.numbers}
    psi = {key: joint.dictionary[key].psi.tolist() for key in joint.dictionary}
    found = {"decided": decided, "psi": psi, "trained": report.trained, "scores": scores, "bytes": told}
    (Path(out) / f"{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
