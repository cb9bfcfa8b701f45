"""Stacks and settings that have no route: each is refused before anything is joined, with the remedy."""

import pytest
import torch
import transformers
from routed import IDS, bert, by_hand, joined, member
from torch import nn

from surgery.errors import PlanError
from surgery.methods.routes.groups import routes_in


@pytest.mark.parametrize(("settings", "said"), [
    ({"layers": 5}, r"`layers` is 5, but encoder.layer.\* of 'text' has 4"),
    ({"component_budget": 0.2}, "of 0.2 leaves less than one layer of a stack of 4: give at least 0.25"),
    (by_hand(0, 1, 2), r"name one of 4 components, from 0, for each of 4 depths, but that of task '' has 3"),
    (by_hand(0, 1, 2, 9), "names 9"),
    ({"p_init": 0.0}, "p_init"),
    ({"tasks": {"image": ["mood"]}}, r"must name members \(text\), found image"),
    ({"layers": 2, "identity": False}, "identity true"),
])  # fmt: skip
def test_what_no_route_can_be(settings, said):
    with pytest.raises(PlanError, match=said):
        joined(settings)


def test_layers_that_change_the_shape_are_named():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.into, self.out = nn.Conv1d(4, 4, 1), nn.Conv1d(4, 2, 1)
            self.layers = nn.ModuleList([nn.Conv1d(4, 4, 3, stride=2) for _ in range(3)])

        def forward(self, x):
            x = self.into(x)
            for layer in self.layers:
                x = torch.relu(layer(x))
            return self.out(x)

    with pytest.raises(
        PlanError, match=r"of one shape, but for an input \[2, 4, 40\] of layers.0 .*identity gives"
    ):
        joined({}, Net(), "net", torch.randn(2, 4, 40))


def test_stacks_with_caches_are_refused_with_the_remedy():
    config = transformers.GPT2Config(
        n_layer=2, n_head=2, n_embd=16, vocab_size=64, n_positions=16, bos_token_id=1, eos_token_id=2
    )
    with pytest.raises(PlanError, match=r"keep no cache.*`use_cache` to false"):
        joined({}, transformers.GPT2Model(config).eval(), "gpt", IDS)
    config.use_cache = False
    joint = joined(
        {"routing": "permuted", "orders": {"gpt": {"": [1, -1]}}},
        transformers.GPT2Model(config).eval(),
        "gpt",
    )
    assert joint.extract("gpt").config.n_layer == 1


class Reads(nn.Module):
    """A net that reads the outputs of single layers."""

    def __init__(self, read):
        super().__init__()
        self.into, self.out, self.read = nn.Linear(12, 16), nn.Linear(16, 2), read
        self.layers = nn.ModuleList([nn.Linear(16, 16) for _ in range(3)])

    def forward(self, x):
        outs = [self.into(x)]
        for layer in self.layers:
            outs.append(torch.relu(layer(outs[-1])))
        return self.out(sum(outs[i] for i in self.read))


@pytest.mark.parametrize("read", [(1, 3), (2, 3), (1, 2, 3), (1,)])
def test_stacks_whose_single_layers_are_read_are_refused_before_anything_is_joined(read):
    settings = {"routing": "permuted", "orders": {"net": {"": [-1, 1, 2]}}}
    for each in (settings, {}, {"layers": 2}, {"routing": "soft"}):
        with pytest.raises(PlanError, match=r"layers\.[01] .*is read elsewhere too: choose other stacks"):
            member(Reads(read), "net", torch.randn(2, 12)).module.requires_grad_(True)
            joined(each, Reads(read), "net", torch.randn(2, 12))
    assert joined({"identity": False}, Reads(read), "net", torch.randn(2, 12))  # every depth keeps a layer


def test_hidden_states_that_a_model_returns_are_read():
    model = bert()
    model.config.output_hidden_states = True
    with pytest.raises(PlanError, match="by the model's outputs"):
        joined({"layers": 2}, model)


def test_what_lies_between_layers_reads_nothing():
    joint = joined({"layers": 2}, Reads((3,)), "net", torch.randn(2, 12))
    assert len(routes_in(joint["net"])["layers.*"]) == 3
