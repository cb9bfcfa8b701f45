"""Recordings that example inputs were tried with are those that sites are found in, and no others."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_transformers import save_tiny
from torch import nn

from surgery.anatomy.sites import discover
from surgery.inputs import candidates
from surgery.members.member import Inputs
from surgery.members.references import load_member
from surgery.pipeline.merge import prepare
from surgery.settings.recipe import Recipe
from surgery.tracing import recorded_once, run_without_weights, tiers, trace


@pytest.fixture
def recordings(monkeypatch):
    """The modules of which recordings with stubs were made."""
    made, record = [], tiers._with_stubs
    monkeypatch.setattr(
        tiers, "_with_stubs", lambda module, *rest: (made.append(module), record(module, *rest))[1]
    )
    return made


class Looks(nn.Module):
    """Its forward pass looks at data or not, in layers of several kinds."""

    def __init__(self, parts, looks):
        super().__init__()
        self.parts, self.looks = nn.ModuleList(parts), looks

    def forward(self, x):
        for part in self.parts:
            x = part(x) if not self.looks or bool((x > 0).any()) else part(-x)
        return x[torch.ones(len(x), dtype=torch.bool)] if self.looks else x


PARTS = {"linear": lambda: nn.Linear(6, 6), "norm": lambda: nn.LayerNorm(6), "gelu": nn.GELU}


@settings(max_examples=20, deadline=None)
@given(st.lists(st.sampled_from([*PARTS]), min_size=1, max_size=5), st.booleans(), st.booleans())
def test_what_is_found_is_what_would_be_found(parts, looks, transposed):
    net = Looks([PARTS[part]() for part in parts], looks).eval()
    x = torch.zeros(6, 2).T if transposed else torch.zeros(2, 6)
    alone = trace(net, Inputs((x,)))
    with recorded_once():
        run_without_weights(net, Inputs((x,)))
        found = trace(net, Inputs((x,)))
    assert (found.uses, found.tier, found.notes) == (alone.uses, alone.tier, alone.notes)
    assert found.graph is not None and alone.graph is not None
    assert [n.meta.get("tensor") for n in found.graph.nodes] == [
        n.meta.get("tensor") for n in alone.graph.nodes
    ]
    assert str(found.graph) == str(alone.graph)


def test_a_large_model_is_recorded_once_from_a_recipe_to_its_plan(recordings, monkeypatch, tmp_path):
    save_tiny("gpt2", tmp_path / "a")
    recipe = Recipe.of(
        {"models": [{"model": str(tmp_path / "a")}, {"model": str(tmp_path / "a"), "name": "b"}]}
    )
    monkeypatch.setattr(candidates, "_CPU_LIMIT", 0)
    apart = [discover(load_member(str(tmp_path / "a"), name=name)) for name in "ab"]
    assert len(recordings) == 4  # each once when inputs were looked for and once more
    recordings.clear()
    assert list(prepare(recipe).anatomies) == apart
    assert len(recordings) == 2


@pytest.mark.parametrize("change", ["dtype", "part", "inputs", "outside", "twice"])
def test_a_recording_of_something_else_is_not_taken(recordings, change):
    net, x = Looks([nn.Linear(6, 6)], True).eval(), torch.zeros(2, 6)
    with recorded_once():
        run_without_weights(net, Inputs((x,)))
        if change == "dtype":
            net.double()
        elif change == "part":
            net.parts[0] = nn.Linear(6, 6)
        elif change == "inputs":
            x = torch.zeros(2, 6)
        elif change == "twice":
            trace(net, Inputs((x,)))
        if change != "outside":
            trace(net, Inputs((x,)))
    if change == "outside":
        trace(net, Inputs((x,)))
    assert len(recordings) == 2
