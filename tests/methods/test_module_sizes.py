"""Sizes of members of which modules were replaced: before is the member as it was, wherever it is said."""

from __future__ import annotations

import json

import module_methods
import pytest
import torch
from command_line import surgery as command
from module_methods import joined, net
from torch import nn

import surgery
from surgery.core.module_method import ModuleSurgery
from surgery.fitting.report import saved_words
from surgery.members.replacement import Replacement
from surgery.page.overview import look
from surgery.page.render import render
from surgery.settings import methods as registry

PARAMETERS = sum(p.numel() for p in net().parameters())
LESS = 16 * 16 + 16 - 1  # a layer of its own against a factor
TRAINING = {"generations": 1, "steps": 2, "burn_in": 0, "optimizer": {"lr": 0.01}}


def task():
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(1))
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, x.sum(1).long() % 5), 8)
    return surgery.Task("classes", "net", data, "cross_entropy", validation=data)


def sizes_said(folder):
    """Bytes before, wherever an artifact says them."""
    code, said, _ = command("report", str(folder), "--json")
    assert code == 0
    card = (folder / "README.md").read_text()
    row = next(line for line in card.splitlines() if line.startswith("| net |"))
    opening = next(line for line in card.splitlines() if line.startswith("One model, "))
    page = render(look(folder))
    before = json.loads(said)["artifact"]["members"][0]["bytes_before"]
    words = surgery.util.wording.size(before)
    assert row.split("|")[3].strip() == words and f"tensors of {words} before" in opening
    assert f"{words} before" in page
    return before


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    joint = joined()
    report = surgery.train(joint, [task()], TRAINING, cpu=True)
    return joint, report, surgery.save(joint, tmp_path_factory.mktemp("trained") / "joint")


def test_training_compares_with_the_member_as_it_was(trained):
    alone = trained[1].sizes["alone"]["net"]
    assert alone == {"parameters": PARAMETERS, "bytes": 4 * PARAMETERS}
    assert trained[1].sizes["start"]["net"]["bytes"] <= 4 * (PARAMETERS - LESS)
    assert f"{PARAMETERS} parameters" in repr(trained[0])


@pytest.mark.parametrize("how", ["joined", "fitted", "trained"])
def test_an_artifact_says_what_the_member_was(trained, how, tmp_path):
    folder = trained[2]
    if how != "trained":
        joint = joined()
        folder = surgery.save(surgery.fit(joint) if how == "fitted" else joint, tmp_path / "joint")
    assert sizes_said(folder) == 4 * PARAMETERS
    again = surgery.load(folder, modules={"net": net()})
    assert again.members["net"].alone == surgery.members.member.Alone(PARAMETERS, 4 * PARAMETERS)
    assert sizes_said(surgery.save(again, tmp_path / "again")) == 4 * PARAMETERS


def test_what_is_loaded_is_trained_and_fitted_against_the_member_as_it_was(trained, tmp_path):
    again = surgery.load(trained[2], modules={"net": net()})
    one = surgery.join([again.copy_member("net")], block=(8, 8))
    assert surgery.train(one, [task()], TRAINING, cpu=True).sizes["alone"]["net"]["parameters"] == PARAMETERS
    report = surgery.fit(again, max_error=0.1).report
    assert report.original_bytes == {"net": 4 * PARAMETERS} and report.parameters == {"net": PARAMETERS}
    assert sum(report.saved.values()) == 4 * PARAMETERS - report.stored_bytes
    assert report.saved["replacing"] == 4 * LESS


class Wider(ModuleSurgery):
    name = "wider"

    def plan(self, anatomies, request):
        return [Replacement("net", "layers.3", self.name)]

    def replace(self, place):
        return nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 16))


def test_what_takes_more_than_it_replaces_is_said_to(monkeypatch, tmp_path):
    monkeypatch.setitem(registry.REGISTERED, "wider", Wider())
    one = module_methods.member()
    joint = surgery.fit(surgery.join([one], surgery.plan_modules([one], "wider", block=(8, 8))))
    more = 24 * 16 + 24 + 16 * 24 + 16 - (16 * 16 + 16)
    assert joint.report.saved == {"sharing": 0, "precision": 0, "replacing": -4 * more}
    words = "0 B by sharing, 0 B by precision; replacing takes 2.1 kB more"
    assert saved_words(joint.report.saved) == words and f"saved {words}" in repr(joint.report)
    folder = surgery.save(joint, tmp_path / "joint")
    assert f"Saved: {words}." in (folder / "README.md").read_text()
    assert f"Saved: {words}." in render(look(folder))


def test_the_verb_says_that_it_takes_more(monkeypatch, tmp_path):
    monkeypatch.setitem(registry.REGISTERED, "wider", Wider())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(
        "import torch\nfrom module_methods import net\ndef make():\n    return net(), torch.zeros(2, 6)\n"
    )
    code, said, err = command("merge", "net=own.py:make", "--method", "wider", "--out", "joint")
    assert code == 0, err
    said = " ".join(said.split())
    assert "replacing -2.1 kB what stands in the places of modules takes more than they did" in said
