"""Fine-tunes of one small net, artifacts of three of them by how they were made, and what such a folder holds."""

from __future__ import annotations

import torch
from artifacts import member
from torch import nn

import surgery
from surgery.artifact.manifest import read_manifest
from surgery.artifact.reading import map_stored

TOKENS = {"tokenizer.json": b"t" * 2000, "config.json": b"{}"}


class Net(nn.Module):
    def __init__(self, width=48):
        super().__init__()
        self.first, self.last = nn.Linear(12, width), nn.Linear(width, 3)
        self.middle = nn.ModuleList(nn.Linear(width, width) for _ in range(2))

    def forward(self, x):
        x = self.first(x)
        for layer in self.middle:
            x = x + torch.relu(layer(x))
        return self.last(x)


def net(seed, base=0, size=0.1, width=48):
    """A fine-tune of a base; its first layer is the base's."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(base)
        made = Net(width).eval()
        torch.manual_seed(1000 + seed)
        with torch.no_grad():
            for layer in (*made.middle, made.last):
                o, i = layer.weight.shape
                layer.weight += size * torch.randn(o, 2) @ torch.randn(2, i) / 7
    return made


def relative(name, seed, files=None, **how):
    return member(net(seed, **how), name, torch.linspace(-1, 1, 96).reshape(8, 12), files)


def family(names="abc", **how):
    return surgery.join([relative(name, seed, TOKENS) for seed, name in enumerate(names)], **how)


TARGETS = {
    "budget": {"budget": 0.14},
    "error": {"max_error": 0.03},
    "lossless": {"max_error": 0},
    "joined": None,
}

"""How an artifact was made: what `surgery.fit` was given, or nothing, where it was joined alone."""


def make_artifact(how, folder):
    """An artifact of a family by its name in `TARGETS`."""
    target = TARGETS[how]
    return surgery.save(family() if target is None else surgery.fit(family(), **target), folder)


def loaded(folder):
    return surgery.load(folder, modules={name: Net() for name in read_manifest(folder).members})


def stored(folder):
    manifest = read_manifest(folder)
    return map_stored(folder, manifest, list(manifest.members))


def weights(folder, names="abc"):
    found = loaded(folder)
    return {name: found.collapse(name) for name in names}


def same(one, other):
    return all(torch.equal(one[name][key], other[name][key]) for name in one for key in one[name])


def modules(names):
    return {name: net(seed) for name, seed in names.items()}
