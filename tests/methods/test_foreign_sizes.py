"""Sizes that a manifest of others states, for methods that check nothing themselves."""

from __future__ import annotations

import shutil

import artifacts
import nets
import pytest
import torch
from torch import nn

import surgery
from surgery.anatomy.plan import make_plan
from surgery.core.bank import Bank
from surgery.core.method import register_method
from surgery.core.module_method import ModuleSurgery
from surgery.core.tensor_method import TensorMethod
from surgery.errors import ArtifactError, LoadError
from surgery.members.replacement import Replacement
from surgery.settings.methods import REGISTERED
from surgery.settings.problems import Strict
from surgery.settings.quantities import Positive

KEY = "32x32-float32"


class Own(Strict):
    """No settings."""


class Width(Strict):
    """What an artifact says of a layer in two."""

    width: Positive


class Cosines(Bank):
    """Blocks as combinations of a few cosines, which are made when the bank is."""

    form = "cosines"

    def __init__(self, plan, parts):
        super().__init__()
        self.block = plan.block
        self.weights = nn.Parameter(parts["weights"])
        self.scale = parts.get("scale")
        grid = torch.arange(plan.block[0] * plan.block[1], dtype=torch.float32)
        self.register_buffer("waves", torch.cos(grid * torch.arange(1, 9)[:, None] / len(grid)))
        self.register_buffer("places", torch.zeros(plan.locations))

    @property
    def locations(self):
        return len(self.weights)

    def blocks(self, start=0, stop=None, task=None):
        return self.weights[start:stop] @ self.waves

    def pack(self, plan, like=()):
        return {"weights": self.weights.detach()}


@pytest.fixture(scope="module", autouse=True)
def method():
    @register_method
    class CosineMethod(TensorMethod):
        name = "cosines"
        form = "cosines"
        settings = Own

        def plan(self, anatomies, request):
            return make_plan(anatomies, None, method=self.name)

        def make(self, plan, blocks, generator):
            bank = Cosines(plan, {"weights": torch.zeros(len(blocks), 8)})
            return Cosines(
                plan, {"weights": torch.linalg.lstsq(bank.waves.T, blocks.T).solution.T.contiguous()}
            )

        def unpack(self, plan, parts):
            return Cosines(plan, parts)

        def asks(self, plan, target):
            return "8 cosines"

    @register_method
    class Squeezes(ModuleSurgery):
        name = "squeezed"
        settings = Own
        recorded = Width

        def plan(self, anatomies, request):
            return [Replacement(each.member, "2", self.name, {"width": 3}) for each in anatomies]

        def replace(self, place):
            old = place.current
            return nn.Sequential(
                nn.Linear(old.in_features, width := place.how.width), nn.Linear(width, old.out_features)
            )

    yield
    REGISTERED.pop("cosines")
    REGISTERED.pop("squeezed")


def modules():
    return {"mlp": nets.member("mlp", seed=7).module}


@pytest.fixture(scope="module")
def made(method, tmp_path_factory):
    one = nets.member("mlp")
    plan = surgery.plan_with([surgery.discover(one)], "cosines")
    return surgery.save(surgery.fit(surgery.join([one], plan)), tmp_path_factory.mktemp("made") / "joint")


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made, tmp_path / "joint")


def refused(folder, words):
    with artifacts.Largest() as largest, pytest.raises(ArtifactError, match=words):
        surgery.load(folder, modules=modules())
    with largest:
        report = surgery.verify(folder, modules=modules())
        assert not report.ok and not surgery.verify(folder).ok
    assert largest.nbytes < 1 << 20


def bank(**changes):
    return lambda manifest: manifest["banks"][KEY].update(changes)


def whole(side):
    """Site and block of one size, so that they suit each other."""

    def change(manifest):
        (number,) = (n for n, view in enumerate(manifest["views"]) if view["bank"] == KEY)
        manifest["views"][number].update(shape=[side, side], sizes={"o": side, "i": side})
        manifest["banks"][KEY]["block"] = [side, side]

    return change


def small_blocks(manifest):
    whole(1 << 24)(manifest)
    manifest["banks"][KEY].update(block=[1, 1], locations=1 << 53)


def encoded(manifest):
    manifest["banks"][KEY]["encoded"] = [["int4/64", "float32", [1 << 20, 1 << 20], ["weights"]]]


@pytest.mark.parametrize(("change", "words"), [
    (bank(block=[2**31 - 1, 2**31 - 1]), "blocks that its tensors fill, but one of 2,147,483,647 x 2,147,483,647 is "
     r"larger than mlp:2.weight with 32 x 32"),
    (bank(block=[32, 2**20]), "larger than mlp:2.weight"),
    (bank(locations=2**53), r"at most [\d,]+ elements, by the [\d,]+ bytes of its parts, but its 9,007,199"),
    (whole(2**15), "at most .* elements"),
    (whole(2**26), "at most .* elements"),
    (small_blocks, "at most .* elements"),
    (encoded, "must hold weights:q4"),
    (lambda m: m["banks"].update(other={**m["banks"][KEY], "block": [2**31 - 1, 2**31 - 1]}),
     "bank other must generate tensors of members"),
])  # fmt: skip
def test_sizes_that_nothing_bears_out_take_no_memory(folder, change, words):
    artifacts.rewrite(folder, change)
    refused(folder, words)


def test_what_is_there_loads(folder):
    assert surgery.verify(folder, modules=modules()).files == {}
    surgery.load(folder, modules=modules())


def with_part(folder, name):
    """The artifact with one more tensor among the parts of banks."""
    artifacts.rewrite_tensors(folder, "dictionary.safetensors", lambda held: {**held, name: torch.ones(3)})
    return folder


@pytest.mark.parametrize(("name", "words"), [
    (f"{KEY}/more", "bank 32x32-float32 has more, which nothing uses"),
    (f"{KEY}/weights:more", "bank 32x32-float32 has weights:more, which nothing uses"),
    ("other/weights", "dictionary holds other/weights, which is a part of no bank"),
    ("weights", "dictionary holds weights, which is a part of no bank"),
])  # fmt: skip
def test_parts_that_nothing_uses_are_refused(folder, name, words):
    refused(with_part(folder, name), words)


def test_a_part_that_is_read_where_it_is_there_may_be_there(folder):
    joint = surgery.load(with_part(folder, f"{KEY}/scale"), modules=modules())
    assert torch.equal(joint.dictionary[KEY].scale, torch.ones(3))


def test_rows_of_nothing_are_refused_as_any_other_part(tmp_path):
    folder = surgery.save(artifacts.pair(), tmp_path / "joint")
    with_part(folder, "8x8-float32/more")
    with pytest.raises(ArtifactError, match="8x8-float32 has more, which nothing uses"):
        surgery.load(folder, modules=artifacts.modules())


def test_what_stands_in_place_of_a_module_is_bounded_by_what_is_stored(tmp_path):
    one = nets.member("mlp")
    joint = surgery.join([one], surgery.plan_modules([one], "squeezed", block=(8, 8)))
    folder = surgery.save(joint, tmp_path / "joint")
    artifacts.rewrite(
        folder, lambda m: m["members"]["mlp"]["replacements"][0]["settings"].update(width=2**22)
    )
    with artifacts.Largest() as largest:
        with pytest.raises(LoadError, match=r"at most .* elements"):
            surgery.load(folder, modules=modules())
        assert not surgery.verify(folder, modules=modules()).ok
    assert largest.nbytes < 1 << 20
