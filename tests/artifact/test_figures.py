"""Figures agree: parameters and bytes mean one thing on the screen, in the card, the manifest, pictures and reports."""

import json
import re

import pytest
import torch
import training_nets
from artifacts import Tied, member, seeded
from command_line import surgery as command
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import surgery
from surgery.artifact.card import make_card
from surgery.artifact.manifest import read_manifest
from surgery.artifact.shares import count_shares
from surgery.core import sizes
from surgery.members.member import owners_of
from surgery.settings.training import Evolution, Training
from surgery.storage.stored import store
from surgery.storage.trim import trim
from surgery.training.loop.starting import start
from surgery.training.report.comparison import measure, total, verdict, whole_parts
from surgery.training.report.runlog import find_log, read_log
from surgery.training.tasks.score import Score
from surgery.util import wording


def normed():
    layers = [nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)]
    return nn.Sequential(*layers)


def models():
    return {
        "tied": member(seeded(Tied, 1), "tied", torch.zeros(2, 3, dtype=torch.long)),
        "normed": member(seeded(normed, 2), "normed", torch.zeros(2, 8)),
        "half": member(seeded(normed, 3).bfloat16(), "half", torch.zeros(2, 8, dtype=torch.bfloat16)),
    }


def test_parameters_are_those_of_pytorch_and_bytes_those_of_the_state_dict():
    members = models()
    modules = {name: each.module for name, each in members.items()}
    parameters = {name: sum(p.numel() for p in m.parameters()) for name, m in modules.items()}
    taken = {name: sum(m.state_dict()[first].nbytes for first in owners_of(m)) for name, m in modules.items()}
    joint = surgery.join(list(members.values()), block=(8, 8))
    stored = store(joint)
    assert sizes.parameters_alone(joint) == parameters
    assert sizes.bytes_alone(stored) == taken
    assert all(count < 4 * taken[name] for name, count in parameters.items())


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 2**31 - 1), st.integers(1, 12), st.integers(1, 3))
def test_parts_add_up_whatever_the_alignment(seed, hypermodules, context):
    joint = training_nets.build(context=context)
    start(joint, Training(evolution=Evolution(start="random", hypermodules=hypermodules)), seed)
    stored = store(joint)
    rows = sizes.count_tensors(stored)
    assert sum(row.nbytes for row in rows) == stored.nbytes == sum(sizes.bytes_joint(stored).values())
    assert all(row.nbytes >= 0 for row in rows)
    shares = count_shares(stored)
    assert shares.after == sizes.bytes_joint(stored) and shares.before == sizes.bytes_alone(stored)
    parts = sizes.parameters_joint(joint)
    own = {name: sum(p.numel() for p in joint.private(name).values()) for name in joint.names}
    now, whole = sizes.parameters_of_dictionary(joint)
    assert round(sum(parts.values())) == now + sum(own.values())
    assert whole + sum(own.values()) == sum(sizes.parameters_alone(joint).values())
    assert sum(whole_parts(parts).values()) == round(sum(parts.values()))


def test_a_start_without_sharing_is_the_members_alone():
    joint = training_nets.build(block=(16, 16))
    start(joint, Training(evolution=Evolution(start="own")), 0)
    found, modules = measure(joint)
    assert found["joint"] == found["alone"] and not modules


def test_pictures_of_modules_and_of_sharing_tell_of_the_same_sharing():
    """A pair of members has blocks on shared rows exactly where a stored hypermodule has both."""
    joint = training_nets.build(context=1)
    start(joint, Training(evolution=Evolution(start="random", hypermodules=3, scale="contexts")), 0)
    shares = count_shares(store(joint))
    both = sum(count for names, count in shares.modules.items() if names == "a+b")
    assert both and shares.blocks[0][1] and shares.blocks[1][0]
    start_again = training_nets.build(context=4)
    start(start_again, Training(), 0)  # every hypermodule has one location, so collapse takes it away
    alone = count_shares(store(start_again))
    assert not alone.modules and alone.blocks == ((0, 0), (0, 0))


NETS = """
import torch
from torch import nn

def net(seed, width):
    torch.manual_seed(seed)
    layers = [nn.Linear(8, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, width), nn.Linear(width, 3)]
    return nn.Sequential(*layers).eval(), torch.randn(4, 8)

def one():
    return net(1, 48)

def two():
    return net(2, 40)
"""


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """A merge from the command line: its folder, and what it says as JSON."""
    folder = tmp_path_factory.mktemp("figures")
    (folder / "nets.py").write_text(NETS)
    options = ["--out", str(folder / "joint"), "--max-error", "0.1", "--json"]
    code, out, err = command("merge", f"a={folder}/nets.py:one", f"b={folder}/nets.py:two", *options)
    assert code == 0, err
    return folder, json.loads(out)


def test_card_screen_manifest_picture_and_plan_agree(merged):
    folder, facts = merged
    modules = {name: surgery.load_member(f"{folder}/nets.py:{f}", name=name).module
               for name, f in (("a", "one"), ("b", "two"))}  # fmt: skip
    before = {name: sizes.bytes_of_module(module) for name, module in modules.items()}
    rows = {row["name"]: row for row in facts["members"]}
    assert {name: row["bytes_before"] for name, row in rows.items()} == before
    assert {name: row["parameters"] for name, row in rows.items()} == {
        name: sizes.parameters_of_module(module) for name, module in modules.items()
    }
    manifest = json.loads((folder / "joint" / "manifest.json").read_text())
    report = manifest["report"]
    assert report["original_bytes"] == before == facts["report"]["original_bytes"]
    assert report["stored_bytes"] == sum(row["bytes_after"] for row in rows.values())
    assert sum(report["saved"].values()) == sum(before.values()) - report["stored_bytes"]
    joint = surgery.load(folder / "joint", modules=modules)
    shares = count_shares(trim(store(joint)))  # what the picture is drawn from
    assert dict(shares.before) == before
    assert shares.after == {name: row["bytes_after"] for name, row in rows.items()}
    card = (folder / "joint" / "README.md").read_text()
    assert card == make_card(read_manifest(folder / "joint"), shares) or "sharing.png" not in card
    for name, row in rows.items():
        cells = [each.strip() for each in re.search(rf"^\| {name} \|(.*)\|$", card, re.M)[1].split("|")]
        assert cells[1:3] == [wording.size(row["bytes_before"]), wording.size(row["bytes_after"])]
        assert cells[3] == wording.percent(row["output_error"], digits=2)


def test_the_table_on_the_screen_has_the_figures_of_the_card(tmp_path, merged):
    folder, facts = merged
    code, out, err = command(
        "merge", f"a={folder}/nets.py:one", f"b={folder}/nets.py:two", "--out", str(tmp_path / "j"),
        "--max-error", "0.1",
    )  # fmt: skip
    assert code == 0, err
    for row in facts["members"]:
        line = next(each.split() for each in out.splitlines() if each.split()[:1] == [row["name"]])
        words = [wording.count(row["parameters"]), *wording.size(row["bytes_before"]).split(),
                 *wording.size(row["bytes_after"]).split()]  # fmt: skip
        assert line[1:6] == words


def test_a_dry_run_and_inspect_count_as_the_merge_does(merged):
    folder, facts = merged
    _, shown, _ = command("inspect", f"{folder}/nets.py:one")
    assert f"{wording.count(facts['members'][0]['parameters'])} parameters" in shown
    _, out, _ = command("merge", f"a={folder}/nets.py:one", f"b={folder}/nets.py:two", "--dry-run", "--json")
    planned = {row["name"]: (row["parameters"], row["bytes"]) for row in json.loads(out)["members"]}
    assert planned == {row["name"]: (row["parameters"], row["bytes_before"]) for row in facts["members"]}


def test_a_training_run_ends_with_joint_against_alone_against_its_start(tmp_path):
    joint = training_nets.build(context=1)
    config = {
        "steps": 2,
        "burn_in": 0,
        "generations": 2,
        "final": 1,
        "evolution": {"start": "random", "hypermodules": 4},
    }
    report = surgery.train(joint, training_nets.tasks(), config, folder=tmp_path / "run", cpu=True)
    saved = surgery.save(joint, tmp_path / "joint")
    lines = read_log(find_log(tmp_path / "run"))
    assert lines[0]["sizes"] == {state: report.sizes[state] for state in ("alone", "start")}
    end = lines[-1]
    assert end["sizes"] == report.sizes and end["stored_modules"].get("a+b", 0) > 0
    reloaded = store(surgery.load(saved, modules={name: joint.extract(name) for name in joint.names}))
    shares = count_shares(reloaded)
    assert {name: each["bytes"] for name, each in report.sizes["joint"].items()} == shares.after
    assert {name: each["bytes"] for name, each in report.sizes["alone"].items()} == dict(shares.before)
    assert dict(shares.modules) == end["stored_modules"]
    assert total(report.sizes["joint"], "parameters") < total(report.sizes["alone"], "parameters")
    first = next(line["validation"] for line in lines if line.get("validation"))
    assert {name: score.document() for name, score in report.first.items()} == first
    said = verdict(report.sizes, report.first, report.scores)
    alone, now = (total(report.sizes[state], "bytes") for state in ("alone", "joint"))
    assert (
        said.startswith("Sharing paid")
        and wording.size(alone - now) in said
        and "accuracy of classes" in said
    )


def test_a_run_that_saves_nothing_says_so():
    alone = {"a": {"parameters": 10, "bytes": 40}}
    score = Score(0.5, 0.75, 8, "accuracy")
    said = verdict({"alone": alone, "joint": alone}, {"t": Score(0.9, 0.5, 8, "accuracy")}, {"t": score})
    assert said.startswith("Sharing did not pay") and "accuracy of t 0.5 to 0.75" in said
