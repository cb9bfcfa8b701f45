"""Stacks: which modules of a network are its repeated layers."""

import pytest
import timm
import torch
import zoo
from nets import made
from torch import nn

from surgery.anatomy.sites import discover
from surgery.anatomy.stacks import pool_runs
from surgery.members.member import Inputs, Member, Origin


def runs_of(module, *args):
    return discover(made("net", module, *args)).runs


def block(width, hidden=None):
    return nn.Sequential(nn.Linear(width, hidden or width), nn.ReLU(), nn.Linear(hidden or width, width))


@pytest.mark.parametrize(
    ("name", "path", "layers"),
    [
        ("vit_tiny_patch16_224", "blocks.*", 12),
        ("mixer_s32_224", "blocks.*", 8),
        ("convmixer_768_32", "blocks.*", 32),
        ("convnext_atto", "stages.2.blocks.*", 6),
        ("swin_tiny_patch4_window7_224", "layers.2.blocks.*", 6),
    ],
)
def test_the_layers_of_real_architectures_are_found(name, path, layers):
    with torch.device("meta"):
        module = timm.create_model(name)
    size = module.default_cfg["input_size"]
    module = module.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.zero_()
    found = {run.path: len(run.layers) for run in runs_of(module, torch.zeros(1, *size))}
    assert found[path] == layers


@pytest.mark.parametrize(
    ("kind", "paths"),
    [
        ("bert", {"encoder.layer.*"}),
        ("gpt2", {"transformer.h.*"}),
        ("llama", {"model.layers.*"}),
        ("t5", {"encoder.block.*", "decoder.block.*"}),
    ],
)
def test_the_layers_of_transformers_are_found(kind, paths):
    found = {run.path: run for run in discover(zoo.member(kind)).runs}
    assert set(found) == paths
    # The table of relative positions in T5's first layer is an embedding, so its layers are of one structure.
    assert all(len(run.layers) == 2 for run in found.values())


def test_parallel_modules_are_no_stack_and_sequential_ones_are():
    class Parallel(nn.Module):
        def __init__(self):
            super().__init__()
            self.into, self.a, self.b, self.out = nn.Linear(3, 8), block(8), block(8), nn.Linear(8, 2)

        def forward(self, x):
            x = self.into(x)
            return self.out(self.a(x) + self.b(x))

    inside = {run.layers for run in runs_of(Parallel(), torch.zeros(1, 3))}
    assert inside == {("a.0", "a.2"), ("b.0", "b.2")}  # within each, one linear map follows the other
    sequential = nn.Sequential(nn.Linear(3, 8), block(8, 5), block(8, 5), nn.Linear(8, 2))
    (run,) = runs_of(sequential, torch.zeros(1, 3))
    assert run.layers == ("1", "2") and run.parameters == 2 * 40 + 13


def test_two_towers_are_two_runs_of_one_stack():
    class Towers(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = (nn.Sequential(*(block(8, 6) for _ in range(3))) for _ in range(2))

        def forward(self, x, y):
            return self.one(x) @ self.other(y).T

    runs = runs_of(Towers(), torch.zeros(1, 8), torch.zeros(1, 8))
    assert {run.layers for run in runs} == {("one.0", "one.1", "one.2"), ("other.0", "other.1", "other.2")}
    (stack,) = pool_runs(runs)
    assert len(stack.layers) == 6


def test_what_is_tied_embedded_or_asked_for_belongs_to_no_layer():
    class Once(nn.Module):
        def __init__(self):
            super().__init__()
            self.into, self.layers = nn.Linear(3, 8), nn.ModuleList(block(8, 6) for _ in range(2))
            self.layers[1][0].weight = self.layers[0][0].weight
            self.out = nn.Linear(8, 2)

        def forward(self, x):
            x = self.into(x)
            for layer in self.layers:
                x = layer(x)
            return self.out(x)

    (run,) = runs_of(Once(), torch.zeros(1, 3))
    assert "0.weight" not in [part.name for part in run.parts] and len(run.parts) == 3
    one = made(
        "net", nn.Sequential(nn.Linear(3, 8), block(8, 6), block(8, 6), nn.Linear(8, 2)), torch.zeros(1, 3)
    )
    (run,) = discover(one, private=["re:.*0.weight"]).runs
    assert [part.name for part in run.parts] == ["0.bias", "2.weight", "2.bias"]


def test_norms_are_mixed_on_request_only():
    def layer():
        return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())

    net = nn.Sequential(
        nn.Conv2d(3, 4, 1), layer(), layer(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )
    runs = runs_of(net, torch.zeros(2, 3, 6, 6))
    assert [part.name for part in pool_runs(runs)[0].parts] == ["0.weight", "0.bias"]
    mixed = [part.name for part in pool_runs(runs, mix_norms=True)[0].parts]
    assert mixed == ["0.weight", "0.bias", "1.weight", "1.bias"]  # and never the running statistics


def test_without_a_graph_layers_are_told_by_their_numbers():
    net = nn.Sequential(nn.Linear(3, 8), block(8, 6), block(8, 6), block(8, 6), nn.Linear(8, 2))
    one = Member("net", net, Inputs(), Origin("module", "net", "Sequential"))
    anatomy = discover(one)
    assert anatomy.tier == "table of module types"
    assert [run.layers for run in anatomy.runs] == [("1", "2", "3")]
