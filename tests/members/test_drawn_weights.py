"""Weights that no file holds: they follow the seed and the member's name, and nothing else, and are found again."""

import json
import random

import numpy as np
import pytest
import torch
from artifacts import contents
from hypothesis import given
from hypothesis import strategies as st
from tiny_transformers import tiny

import surgery
from surgery.artifact.verify import verify
from surgery.errors import LoadError
from surgery.members.member import content_hash
from surgery.members.references import build_architecture, load_member, load_origin
from surgery.permission import Permission
from surgery.pipeline.merge import merge
from surgery.pipeline.train import prepare_training
from surgery.settings.recipe import Recipe
from surgery.util.randomness import Draws, all_seeded, member_seed

SMALL = "timm:test_vit?pretrained=false&num_classes=3"
OTHER = "timm:test_resnet?pretrained=false&num_classes=3"
"""timm's own smallest models, made for tests."""
FACTORY = """
import random
import numpy as np
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 16), nn.Linear(16, 16)
        self.scale = nn.Parameter(torch.tensor([random.random(), np.random.rand()], dtype=torch.float32))
        self.register_buffer("order", torch.randperm(16), persistent=False)

    def forward(self, x):
        return self.b(self.a(x)[:, self.order]) * self.scale.sum()

def net():
    return Net(), (torch.zeros(2, 4),)

def constant():
    made = nn.utils.skip_init(nn.Linear, 4, 4)
    made.requires_grad_(False)
    made.weight.fill_(1), made.bias.fill_(0)
    return made, (torch.zeros(2, 4),)
"""


def hash_of(reference, **given):
    return content_hash(load_member(reference, **given).module.state_dict())


@pytest.fixture
def folder(tmp_path):
    """A transformers folder with a configuration and no weights."""
    tiny("bert").config.save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


@pytest.fixture
def factory(tmp_path):
    (tmp_path / "nets.py").write_text(FACTORY)
    return f"{tmp_path}/nets.py:net"


@given(st.integers(0, 2**63), st.integers(0, 2**63), st.text(max_size=8), st.text(max_size=8))
def test_seeds_of_members_differ_where_seed_or_name_does(one, two, name, other):
    assert (member_seed(one, name) == member_seed(two, other)) == ((one, name) == (two, other))
    assert 0 <= member_seed(one, name) < 2**32


@given(st.integers(0, 2**32 - 1))
def test_generators_are_where_they_were(seed):
    outside = Draws()
    with all_seeded(seed) as draws:
        first = torch.rand(3).tolist(), np.random.rand(), random.random()
        assert draws.any
    with all_seeded(seed):
        assert first == (torch.rand(3).tolist(), np.random.rand(), random.random())
    assert not outside.any


def test_weights_follow_seed_and_name_whatever_ran_before(folder, factory):
    for reference in (SMALL, f"{folder}?pretrained=false", factory):
        torch.manual_seed(1)
        first = hash_of(reference, name="net", seed=5)
        torch.rand(100), random.random(), np.random.rand()
        outside = Draws()
        assert hash_of(reference, name="net", seed=5) == first
        assert not outside.any, "loading moved a global generator"
        assert hash_of(reference, name="net", seed=6) != first
        assert hash_of(reference, name="other", seed=5) != first
        member = load_member(reference, name="net", seed=5)
        again = load_origin(member.origin, name="renamed", permission=Permission.of_user(True), seed=7)
        assert content_hash(again.module.state_dict()) == first


def test_what_draws_nothing_or_is_stored_records_no_seed(tmp_path, factory):
    assert load_member(factory.replace(":net", ":constant")).origin.seed is None
    member = load_member(SMALL)
    surgery.save(surgery.join([member]), tmp_path / "out")
    stored = surgery.export(tmp_path / "out", member.name, tmp_path / "plain")
    assert load_member(str(stored)).origin.seed is None
    assert load_member(f"{stored}?pretrained=false", name=member.name).origin.seed == member.origin.seed


def test_an_architecture_is_built_again_with_what_its_constructor_drew(factory):
    member = load_member(factory, seed=3)
    outside = Draws()
    again = build_architecture(member.origin, member.files, permission=Permission.of_user(True))
    assert torch.equal(again.order, member.module.order) and not outside.any


def recipe(models, out, **more):
    document = {
        "models": [{"name": n, "model": r} for n, r in models.items()],
        "out": str(out),
        "seed": 7,
        **more,
    }
    return Recipe.of({"parameters": {"max_error": 0}, **document})


@pytest.mark.slow
def test_the_same_command_gives_the_same_bytes_and_verify_agrees(tmp_path):
    models = {"a": SMALL, "b": OTHER, "c": SMALL}
    merge(recipe(models, tmp_path / "one"))
    torch.rand(7), random.random(), np.random.rand()
    merge(recipe(models, tmp_path / "two"))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    origins = {
        n: m["origin"]
        for n, m in json.loads((tmp_path / "one" / "manifest.json").read_text())["members"].items()
    }
    assert {name: origin["seed"] for name, origin in origins.items()} == {
        n: member_seed(7, n) for n in models
    }
    merge(recipe(dict(reversed(models.items())), tmp_path / "three"))
    report = verify(tmp_path / "three", origins=True)
    assert report.ok and [check.origin for check in report.members] == ["same"] * 3
    one, three = surgery.load(tmp_path / "one"), surgery.load(tmp_path / "three")
    assert all(content_hash(one.collapse(name)) == content_hash(three.collapse(name)) for name in models)
    np.savez(tmp_path / "data.npz", inputs=np.zeros((2, 3, 160, 160), np.float32), targets=np.zeros(2, int))
    trained = recipe(models, tmp_path / "t", train={}, parameters={}).model_dump()
    trained["models"][0]["tasks"] = [{"data": str(tmp_path / "data.npz")}]
    prepared = prepare_training(Recipe.of(trained))
    loaded = {member.name: content_hash(member.module.state_dict()) for member in prepared.members}
    assert loaded == {name: content_hash(one.collapse(name)) for name in models}
    assert content_hash(one.collapse("a")) != content_hash(one.collapse("c"))


def test_an_artifact_without_a_recorded_seed_is_loaded_and_not_called_changed(tmp_path):
    from artifacts import rewrite

    merge(recipe({"a": SMALL}, tmp_path / "out"))

    def forget(manifest):
        del manifest["members"]["a"]["origin"]["seed"]
        manifest["report"]["hashes"]["a"] = "0" * 64

    rewrite(tmp_path / "out", forget)
    found = verify(tmp_path / "out", origins=True)
    assert found.ok and "a seed that was not recorded" in found.members[0].origin


def test_a_folder_without_weights_says_how_to_have_them_drawn(folder):
    with pytest.raises(LoadError, match=r"\?pretrained=false"):
        load_member(str(folder))
    drawn = load_member(f"{folder}?pretrained=false&class=BertForMaskedLM", seed=1)
    assert type(drawn.module).__name__ == "BertForMaskedLM" and drawn.origin.seed == member_seed(1, "bert")
    with pytest.raises(LoadError, match="not pretraind"):
        load_member(f"{folder}?pretraind=false")
