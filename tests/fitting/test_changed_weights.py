"""Weights that change after a fit: they come back as they were, and nothing that was measured before outlives them."""

import copy
import functools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from artifacts import member, pair, seeded, stack
from command_line import surgery as command
from nets import assert_same_bits

import surgery
from surgery.artifact.reports import report_of
from surgery.core.known import Known
from surgery.fitting.report import FitReport
from surgery.storage.stored import loosened, revive, store
from surgery.storage.trim import trim
from surgery.training.train import train

SHORT = {"generations": 1, "steps": 2, "burn_in": 0, "final": 1}


@functools.cache
def fit_once(**target):
    return surgery.fit(pair(), **(target or {"max_error": 0.05}))


def fitted(**target):
    return copy.deepcopy(fit_once(**target))


def in_place(joint):
    with torch.no_grad():
        for p in joint.parameters():
            p.add_(0.01)


def biases(joint):
    """Tensors that a fit may store as they are, without a trace in their versions."""
    joint["one"][-1].bias.data.add_(0.5)
    joint["two"][-1].bias.data.add_(0.5)


def loaded_state(joint):
    joint.load_state_dict({k: t + t.is_floating_point() * 0.1 for k, t in joint.state_dict().items()})


def opened(joint):
    joint.open(2)
    in_place(joint)


def trained(joint):
    data = [(torch.randn(4, 8), torch.randn(4, 4)) for _ in range(2)]
    both = [surgery.Task(name, name, data, loss="mse") for name in joint.names]
    train(joint, both, {**SHORT, "optimizer": {"lr": 0.1}}, cpu=True)


WAYS = {
    "in place": in_place,
    "through .data": biases,
    "load_state_dict": loaded_state,
    "opened and changed": opened,
    "trained": trained,
    "half": lambda joint: joint.half(),
    "bfloat16": lambda joint: joint.to(torch.bfloat16),
    "double": lambda joint: joint.double(),
}
FITS = [{}, {"hypermodules": 3, "block": (8, 8), "context": 2}, {"max_error": 0}]


def again(joint, folder):
    """Saved and loaded."""
    surgery.save(joint, folder)
    return surgery.load(folder, modules={name: joint.extract(name) for name in joint.names})


def stored_and_revived(joint):
    """What an artifact would hold, and the joint model from it."""
    stored = store(joint)
    members = [replace(joint.members[name], module=joint.extract(name)) for name in joint.names]
    return report_of(joint, stored), revive(members, trim(stored))


@pytest.mark.parametrize("target", FITS, ids=lambda target: next(iter(target), "error"))
@pytest.mark.parametrize("way", WAYS)
def test_what_changed_after_a_fit_comes_back_as_it_is_and_nothing_is_said_of_it(way, target):
    joint = fitted(**target)
    WAYS[way](joint)
    live = joint.collapse()
    report, found = stored_and_revived(joint)
    for name, state in live.items():
        assert_same_bits(found.collapse(name), state)
    assert report.to_json().keys() == {"original_bytes", "parameters", "hashes", "changed"}
    assert report.changed == ("one", "two") and (joint.report is None or way == "trained")
    assert not isinstance(joint.report, FitReport)


def test_one_value_changed_without_a_trace_is_found_when_it_is_saved():
    joint = fitted()
    joint["one"][0].weight.data[0, 1] += 0.5
    live = joint.collapse("one")
    report, found = stored_and_revived(joint)
    assert report.changed == ("one",)
    assert_same_bits(found.collapse("one"), live)


def test_templates_that_were_changed_come_back_as_they_are():
    one = member(seeded(lambda: stack(16, 4), 1), "one", torch.zeros(2, 8))
    joint = surgery.join([one], surgery.plan_templates([surgery.discover(one)]))
    surgery.fit(joint, max_error=0.05, templates=2)
    in_place(joint)
    live = joint.collapse("one")
    report, found = stored_and_revived(joint)
    assert_same_bits(found.collapse("one"), live)
    assert report.changed == ("one",) and not report.stacks


def test_artifact_and_card_say_what_changed_and_are_written_the_same_again(tmp_path):
    first = again(fitted(), tmp_path / "first")
    trained(first)
    live = first.collapse()
    found = again(first, tmp_path / "joint")
    for name, state in live.items():
        assert_same_bits(found.collapse(name), state)
    card = (tmp_path / "joint" / "README.md").read_text()
    assert "Target" not in card and "Weights of one, two changed after the fit" in card
    assert "| not measured |" in card
    again(found, tmp_path / "twice")
    for each in ("manifest.json", "README.md"):
        assert (tmp_path / "twice" / each).read_bytes() == (tmp_path / "joint" / each).read_bytes()


def test_a_member_that_did_not_change_keeps_its_form_and_its_error(tmp_path):
    joint = fitted()
    errors = dict(joint.report.errors)
    with torch.no_grad():
        joint["two"][0].weight.add_(0.1)
    found = again(joint, tmp_path / "joint")
    report = found.known.report
    assert report.changed == ("two",) and report.errors == {"one": errors["one"]}
    assert not report.target and not {"target", "met"} & report.to_json().keys()
    manifest = json.loads((tmp_path / "joint" / "manifest.json").read_text())
    held = {name: each["encoded"] for name, each in manifest["members"].items()}
    assert "0.weight" in str(held["one"]) and "0.weight" not in str(held["two"])


def test_a_fused_optimizer_is_noticed_by_members_that_share_what_it_changed():
    twins = [member(seeded(stack, 1), name, torch.zeros(2, 8)) for name in ("a", "b")]
    joint = surgery.join(twins, block=(8, 8))
    joint.keep_known(Known(FitReport()))
    x = torch.randn(2, 8)
    with torch.no_grad():
        joint["b"](x)
    joint["a"](x).sum().backward()
    torch.optim.SGD(joint.dictionary.parameters(), lr=0.1, fused=True).step()
    with torch.no_grad():
        assert torch.equal(joint["b"](x), joint.extract("b")(x))
    assert joint.report is None


def test_another_device_or_a_copy_change_nothing():
    joint = fitted()
    report = joint.report
    assert report is not None
    assert joint.to("cpu").report is report and joint.float().report is report
    twin = copy.deepcopy(joint)
    assert twin.report is report
    in_place(joint)
    assert joint.report is None and twin.report is report
    assert copy.deepcopy(joint).report is None


def test_a_model_in_another_dtype_stays_compressed():
    joint = fitted()
    before = store(joint)
    joint.half()
    after = store(joint)
    forms = {key: each.precision for key, each in before.tensors.items()}
    assert not all(form.is_native for form in forms.values()) and forms == {
        key: each.precision for key, each in after.tensors.items()
    }


def test_a_trained_model_is_fitted_again_and_verified_against_nothing_that_it_is_not(tmp_path):
    joint = fitted()
    in_place(joint)
    assert loosened(joint)["float32"] > 5
    surgery.fit(joint, max_error=0.1)
    assert not loosened(joint)
    assert joint.report.met and joint.report.target == "max-error 0.1" and joint.report.hashes == {}
    found = again(joint, tmp_path / "joint")
    assert found.report.errors == joint.report.errors
    for name in joint.names:
        assert_same_bits(found.collapse(name), joint.collapse(name))
    origins = {"one": seeded(stack, 1), "two": seeded(stack, 2)}
    checked = surgery.verify(tmp_path / "joint", modules=origins)
    assert checked.ok and all(check.weight_difference > 0 for check in checked.members)
    assert "one, two had been changed before" in (tmp_path / "joint" / "README.md").read_text()


def test_an_untouched_origin_is_still_known_by_its_hash_after_loading_and_fitting_without_loss(tmp_path):
    members = [member(seeded(stack, 1), "one", torch.zeros(2, 8))]
    joint = surgery.fit(surgery.join(members), max_error=0)
    found = again(joint, tmp_path / "exact")
    assert found.known.original == {"one"}
    surgery.fit(found, max_error=0.05)
    assert found.report.hashes == joint.report.hashes and not found.known.original


def test_what_holds_of_all_members_together_is_not_said_of_some(tmp_path):
    for target, kept in (({"budget": 0.3}, False), ({}, True)):
        folder = tmp_path / str(kept)
        surgery.save(fitted(**target), folder)
        report = surgery.load(folder, members=["one"], modules={"one": stack()}).report
        assert (bool(report.target), report.met) == (kept, kept)
        assert set(report.errors) == {"one"}


def test_training_what_was_fitted_says_so_and_how_to_compress_it(tmp_path):
    joint = surgery.fit(surgery.join([member(seeded(stack, 1), "one", torch.zeros(2, 8))]), max_error=0.05)
    data = [(torch.randn(4, 8), torch.randn(4, 4)) for _ in range(2)]
    report = train(joint, [surgery.Task("one", "one", data, loss="mse")], SHORT, cpu=True)
    assert report.loosened["float32"] > 3 and report.document()["loosened"] == report.loosened
    assert report.note.startswith(f"Weights changed since the fit: {report.loosened['float32']} tensors are ")
    assert train(surgery.join([member(seeded(stack, 1), "one", torch.zeros(2, 8))]),
                 [surgery.Task("one", "one", data, loss="mse")], SHORT, cpu=True).note == ""  # fmt: skip


FACTORY = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    layers = [nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2)]
    return nn.Sequential(*layers), torch.randn(2, 4)

def data():
    x = torch.randn(32, 4, generator=torch.Generator().manual_seed(1))
    return {"train": [(x, (x.sum(1) > 0).long())]}
"""


def test_merged_trained_and_merged_again_from_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(FACTORY)
    trust = ["--trust-remote-code", "--json"]
    command("merge", "net=mine.py:make", "--max-error", "0.05", "--out", "small", *trust)
    task = '[{"data": "mine.py:data"}]'
    sizes = ["generations=1", "steps=3", "burn_in=0", "final=1", "optimizer.lr=0.05"]
    changes = [f"--set=train.{each}" for each in sizes]
    code, out, err = command("train", "small", "--out", "trained", f"--set=models.0.tasks={task}", "--cpu", *changes,
                             "--trust-remote-code")  # fmt: skip
    assert not code, err
    said = " ".join(out.split())
    assert "Weights changed since the fit:" in said and "surgery merge trained --max-error 0.05" in said
    recipe = yaml.safe_load(Path("trained/recipe.yaml").read_text())
    assert recipe["parameters"]["max_error"] is None
    report = json.loads(Path("trained/manifest.json").read_text())["report"]
    assert report["changed"] == ["net"] and "target" not in report and "errors" not in report
    live = surgery.load("trained", trust_remote_code=True)
    command("merge", "trained", "--max-error", "0.03", "--out", "again", *trust)
    found = surgery.load("again", trust_remote_code=True)
    assert found.report.met and found.report.hashes == {}
    x = torch.randn(256, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        moved = (found["net"](x) - live["net"](x)).norm() / live["net"](x).norm()
    assert 0 < moved < 0.06  # twice what the probe inputs were held to
    assert json.loads(command("verify", "again", *trust)[1])["ok"]
