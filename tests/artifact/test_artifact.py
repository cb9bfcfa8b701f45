"""Laws of artifacts: what was saved comes back, twice the same bytes, and never larger than the members."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from artifacts import Tied, contents, fitted, hypermodules, member, modules, pair, seeded, size, stack
from safetensors.torch import save as as_safetensors
from torch import nn

import surgery
from surgery.artifact import load, save
from surgery.artifact.verify import verify
from surgery.artifact.writing import ALLOWANCE
from surgery.core.joint import JointModel
from surgery.errors import ArtifactError, OutputError
from surgery.members.member import content_hash
from surgery.settings.recipe import Recipe
from surgery.storage.codecs import BFLOAT16, encode, grouped
from surgery.storage.stored import Stored, revive, store


def states(joint: JointModel) -> dict[str, dict[str, torch.Tensor]]:
    return {name: {key: each.clone() for key, each in joint.collapse(name).items()} for name in joint}


def same(one: dict, other: dict) -> bool:
    return {k: content_hash(v) for k, v in one.items()} == {k: content_hash(v) for k, v in other.items()}


@pytest.mark.parametrize("make", [pair, fitted, hypermodules, lambda: fitted(BFLOAT16)])
def test_save_then_load_then_save_is_byte_identical(tmp_path: Path, make):
    joint = make()
    before = states(joint)
    first = save(joint, tmp_path / "first", recipe={"seed": 3, "models": [{"model": "x"}]})
    again = save(joint, tmp_path / "again", recipe={"seed": 3, "models": [{"model": "x"}]})
    loaded = load(first, modules=modules())
    second = save(loaded, tmp_path / "second")
    assert contents(first) == contents(again) == contents(second)
    assert same(states(loaded), before)
    assert verify(first).ok


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes_are_kept_and_outputs_stay(tmp_path: Path, dtype: torch.dtype):
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    joint = pair(dtype)
    expected = {name: joint[name](x) for name in joint}
    loaded = load(save(joint, tmp_path / "out"), modules=modules())
    for name in joint:
        assert torch.equal(loaded[name](x), expected[name])
        assert {t.dtype for t in loaded.collapse(name).values()} == {dtype}


def test_tied_weights_stay_tied(tmp_path: Path):
    module = seeded(Tied)
    original = {key: each.clone() for key, each in module.state_dict().items()}
    joint = surgery.join([member(module, "net", torch.zeros(2, 6, dtype=torch.long))], block=(8, 8))
    save(joint, tmp_path / "out")
    untied = seeded(Tied, 5)
    untied.head.weight = nn.Parameter(untied.head.weight.detach().clone())
    loaded = load(tmp_path / "out", modules={"net": untied})
    assert loaded["net"].head.weight is loaded["net"].embed.weight
    assert same({"net": loaded.collapse("net")}, {"net": original})
    assert contents(save(loaded, tmp_path / "again")) == contents(tmp_path / "out")


def own_bytes(joint: JointModel) -> int:
    total = 0
    for name, each in joint.members.items():
        state = joint.collapse(name)
        total += len(as_safetensors({first: state[first].clone() for first in joint.owners[name]}))
        total += sum(map(len, each.files.values()))
    return total


class Tiny(nn.Module):
    """Hundreds of tiny tensors under long names."""

    def __init__(self, width: int):
        super().__init__()
        self.a_rather_long_name_for_a_list_of_layers = nn.ModuleList(
            nn.Linear(width, width) for _ in range(300)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.a_rather_long_name_for_a_list_of_layers:
            x = layer(x)
        return x


@pytest.mark.slow
def test_artifact_is_no_larger_than_its_members(tmp_path: Path):
    scalars = nn.ParameterList(torch.zeros(1) for _ in range(800))
    siblings = [seeded(lambda: Tiny(2), number // 2) for number in range(4)]
    cases = {
        "pair": pair(files={"config.json": b"{}" * 3000}),
        "tiny": surgery.join([member(seeded(lambda: Tiny(4)), "net", torch.zeros(2, 4))], block=(4, 4)),
        "scalars": surgery.join([member(scalars, "net", torch.zeros(1))]),
        "siblings": surgery.join(
            [member(m, f"m{i}", torch.zeros(2, 2)) for i, m in enumerate(siblings)], block=(2, 2)
        ),
        "many": surgery.join(
            [member(seeded(stack, i), f"member-{i}", torch.zeros(2, 8)) for i in range(24)], block=(16, 16)
        ),
    }
    for name, joint in cases.items():
        out = save(joint, tmp_path / name)
        assert size(out) <= own_bytes(joint) + ALLOWANCE, name


def test_encodings_that_do_not_pay_are_undone(tmp_path: Path):
    tiny = seeded(lambda: Tiny(3))
    stored = store(surgery.join([member(tiny, "net", torch.zeros(2, 3))], block=(3, 3)))
    lossy = {key: encode(each.parts[""], grouped(6, 64)) for key, each in stored.tensors.items()}
    joint = revive(
        [member(seeded(lambda: Tiny(3)), "net", torch.zeros(2, 3))],
        Stored(stored.plan, lossy, stored.aliases, stored.ties),
    )
    before = states(joint)
    out = save(joint, tmp_path / "out")
    assert size(out) <= own_bytes(joint) + ALLOWANCE
    loaded = load(out, modules={"net": seeded(lambda: Tiny(3))})
    assert same(states(loaded), before)
    assert contents(save(loaded, tmp_path / "again")) == contents(out)


def test_sharing_makes_the_artifact_smaller(tmp_path: Path):
    joint = pair(files={"tokenizer.json": os.urandom(5000)})
    assert (
        size(save(joint, tmp_path / "out")) < own_bytes(joint) + 20_000 - 5000
    )  # equal blocks, one tokenizer
    loaded = load(tmp_path / "out", modules=modules())
    assert loaded.members["two"].files == joint.members["two"].files


def test_some_members_alone(tmp_path: Path):
    for make in (pair, fitted, hypermodules):
        joint = make()
        before = states(joint)
        out = save(joint, tmp_path / make.__name__)
        alone = load(out, modules=modules(), members=["two"])
        assert alone.names == ("two",)
        torch.testing.assert_close(alone.collapse("two"), before["two"], rtol=1e-5, atol=1e-6)
        smaller = save(alone, tmp_path / f"{make.__name__}-two")
        assert same(states(load(smaller, modules={"two": modules()["two"]})), states(alone))
    with pytest.raises(ArtifactError, match="must be among one, two, but three"):
        load(out, members=["three"])


def test_large_tensors_are_sharded_with_an_index(tmp_path: Path):
    joint = pair()
    out = save(joint, tmp_path / "out", max_shard_size=6000)
    index = json.loads((out / "members/one/weights.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert list((out).glob("dictionary-*-of-*.safetensors"))
    assert same(states(load(out, modules=modules())), states(joint))
    assert verify(out).ok


def test_report_recipe_and_inputs_come_back(tmp_path: Path):
    joint = fitted()
    out = save(joint, tmp_path / "out", recipe={"seed": 3, "parameters": {"block": (8, 8)}})
    loaded = load(out, modules=modules())
    assert loaded.report.errors["one"] == 0.1 and loaded.report.error("two") is None
    assert loaded.recipe == Recipe.of({"seed": 3, "parameters": {"block": "8x8"}})
    assert loaded.members["one"].inputs.args[0].shape == (2, 8)
    assert load(out, modules=modules(), members=["one"]).report.errors == {"one": 0.1}
    card = (out / "README.md").read_text()
    assert "| one |" in card and "10.00%" in card and "sharing.png" in card
    assert (out / "sharing.png").stat().st_size < 20_000


def test_training_after_loading(tmp_path: Path):
    joint = load(save(hypermodules(), tmp_path / "out"), modules=modules())
    joint["one"](torch.ones(2, 8)).square().sum().backward()
    bank = joint.dictionary[joint.dictionary.keys()[0]]
    assert bank.rows.grad is not None and bool(bank.rows.grad.abs().sum() > 0)
    with torch.no_grad():
        bank.rows += 1
        joint["one"][0].bias += 1
    again = load(save(joint, tmp_path / "again"), modules=modules())
    assert same(states(again), states(joint))
    assert verify(tmp_path / "out").ok  # mapped from the disk, but never written to


def test_an_artifact_may_replace_the_one_it_was_loaded_from(tmp_path: Path):
    out = save(fitted(), tmp_path / "out", recipe={"seed": 3})
    before = contents(out)
    loaded = load(out, modules=modules())
    assert contents(save(loaded, out, overwrite=True)) == before
    assert same(states(loaded), states(load(out, modules=modules())))


def test_live_modules_are_asked_for(tmp_path: Path):
    out = save(pair(), tmp_path / "out")
    with pytest.raises(ArtifactError, match=r"'one' was a live module .*modules=\{'one': module\}"):
        load(out)


def test_names_that_are_no_folders(tmp_path: Path):
    joint = surgery.join([member(seeded(stack), "..", torch.zeros(2, 8))], block=(8, 8))
    with pytest.raises(OutputError, match="fit for a folder"):
        save(joint, tmp_path / "out")
    assert not list(tmp_path.iterdir())
