"""What a fit measured is measured by `verify` on the same inputs, or is not compared, and that is said."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import artifacts
import pytest
import torch
from command_line import surgery as command
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import surgery
from surgery.artifact.sketch import draw, sketch
from surgery.inputs.probes import followed, probe_inputs, unknown_in_probes
from surgery.members.member import Inputs, Member, Origin


class Net(nn.Module):
    """Takes ids, their mask and features; outputs depend on all of them."""

    def __init__(self):
        super().__init__()
        self.words, self.into = nn.Embedding(500, 32), nn.Linear(6, 32)
        self.middle, self.deep, self.out = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 5)

    def forward(self, ids, mask, x):
        found = torch.tanh(self.words(ids) * mask[..., None] + self.into(x))
        return self.out(torch.tanh(self.deep(torch.tanh(self.middle(found)))))


def net(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net().eval()


def inputs(batch=8, length=20, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return {
        "ids": torch.randint(3, 500, (batch, length), generator=generator),
        "mask": torch.ones(batch, length, dtype=torch.long),
        "x": torch.rand(batch, length, 6, generator=generator) * 7 - 2,
    }


def saved(tmp_path, given=None):
    one = surgery.load_member(net(), name="net", inputs=given or inputs())
    joint = surgery.fit(surgery.join([one], block=(8, 8)), max_error=0.1)
    return joint, surgery.save(joint, tmp_path / "joint")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("made"))


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made[1], tmp_path / "joint")


def as_before(manifest):
    """A manifest of before tensors of example inputs said what values they had."""
    for value in manifest["members"]["net"]["inputs"]["kwargs"].values():
        value.pop("like", None)


def test_given_inputs_of_a_live_module_are_measured_as_they_were(made):
    joint, folder = made
    (check,) = surgery.verify(folder, modules={"net": net()}).members
    assert check.ok and check.error == pytest.approx(joint.report.errors["net"], rel=1e-6)
    assert check.not_compared is None


def test_an_artifact_that_does_not_say_what_inputs_were_like_is_not_compared(folder):
    artifacts.rewrite(folder, as_before)
    artifacts.rewrite(folder, lambda m: m["report"]["errors"].update(net=1e-3))
    (check,) = surgery.verify(folder, modules={"net": net()}).members
    assert check.ok and "example inputs ids, mask, x were not kept" in (check.not_compared or "")


def test_an_error_that_is_larger_than_recorded_is_still_found(folder):
    artifacts.rewrite(folder, lambda m: m["report"]["errors"].update(net=1e-3))
    (check,) = surgery.verify(folder, modules={"net": net()}).members
    assert not check.ok and "must stay within the recorded error 0.001, but differ by 0.0" in check.reasons[0]


def test_a_mask_that_was_not_kept_is_not_compared(tmp_path):
    given = inputs()
    given["mask"][:, 11:] = 0
    folder = saved(tmp_path, given=given)[1]
    artifacts.rewrite(folder, lambda m: m["report"]["errors"].update(net=1e-3))
    (check,) = surgery.verify(folder, modules={"net": net()}).members
    assert check.ok and "example inputs mask were not kept" in (check.not_compared or "")


def test_what_was_measured_on_files_of_the_users_is_not_compared(tmp_path):
    one = surgery.load_member(net(), name="net", inputs=inputs())
    joint = surgery.fit(
        surgery.join([one], block=(8, 8)), max_error=0.1, probes={"net": [Inputs((), inputs(seed=5))]}
    )
    folder = surgery.save(joint, tmp_path / "joint")
    (check,) = surgery.verify(folder, modules={"net": net()}).members
    assert check.ok and "inputs that were given to the fit" in (check.not_compared or "")


SOURCE = """
import torch
from test_same_inputs import inputs, net
def make():
    return net(), inputs()
def drawn():
    return net(), inputs(seed=int(torch.randint(1000, ())))
def bare():
    return net()
"""


@pytest.mark.slow
@pytest.mark.parametrize("factory", ["make", "drawn"])
def test_inputs_of_a_factory(tmp_path, monkeypatch, factory):
    """Also where it gives other ones each time."""
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(SOURCE)
    code, said, err = command(
        "merge", f"net=own.py:{factory}", "--max-error", "0.1", "--out", "joint", "--trust-remote-code",
        "--seed", "3",
    )  # fmt: skip
    assert code == 0, said + err
    report = surgery.load("joint", trust_remote_code=True).report
    (check,) = surgery.verify("joint", origins=True, trust_remote_code=True).members
    assert check.ok and check.error == pytest.approx(report.errors["net"], rel=1e-6)


def test_inputs_that_were_given_beside_a_reference(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(SOURCE)
    one = surgery.load_member("net=own.py:make", inputs=inputs(seed=9), trust_remote_code=True)
    joint = surgery.fit(surgery.join([one], block=(8, 8)), max_error=0.1)
    surgery.save(joint, "joint")
    (check,) = surgery.verify("joint", origins=True, trust_remote_code=True).members
    assert check.ok and check.error == pytest.approx(joint.report.errors["net"], rel=1e-6)


def test_the_verb_says_that_it_did_not_compare(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(SOURCE)
    one = surgery.load_member("net=own.py:make", trust_remote_code=True)
    surgery.save(surgery.fit(surgery.join([one], block=(8, 8)), max_error=0.1), "joint")
    artifacts.rewrite(Path("joint"), as_before)
    artifacts.rewrite(Path("joint"), lambda m: m["report"]["errors"].update(net=1e-3))
    code, said, _ = command("verify", "joint", "--origins", "--trust-remote-code")
    assert code == 0 and "not compared with the recorded error: its example inputs" in " ".join(said.split())
    assert json.loads(command("verify", "joint", "--origins", "--trust-remote-code", "--json")[1])["ok"]


def test_a_loaded_member_is_fitted_and_saved_on_the_same_inputs(made, folder):
    joint = made[0]
    loaded = surgery.load(folder, modules={"net": net()})
    mine, theirs = (probe_inputs(each.members["net"]) for each in (joint, loaded))
    assert all(
        torch.equal(a.kwargs[k], b.kwargs[k]) for a, b in zip(mine, theirs, strict=True) for k in a.kwargs
    )
    before = (folder / "manifest.json").read_bytes()
    surgery.save(loaded, folder, overwrite=True)
    assert (folder / "manifest.json").read_bytes() == before


def test_what_was_not_kept_is_not_made_up_by_saving_again(folder, tmp_path):
    artifacts.rewrite(folder, as_before)
    surgery.save(surgery.load(folder, modules={"net": net()}), tmp_path / "again")
    assert "like" not in (tmp_path / "again/manifest.json").read_text().partition('"banks"')[0]


# -- laws ------------------------------------------------------------------------------------------------------

SHAPES = st.lists(st.integers(0, 9), max_size=3)
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.int16, torch.bool])


@st.composite
def tensors(draw_one):
    shape, dtype = draw_one(SHAPES), draw_one(DTYPES)
    generator = torch.Generator().manual_seed(draw_one(st.integers(0, 999)))
    if dtype.is_floating_point:
        return (torch.randn(shape, generator=generator) * draw_one(st.floats(0, 1e3)) + 5).to(dtype)
    low = 0 if dtype == torch.bool else draw_one(st.integers(-9, 9))
    high = low + 2 if dtype == torch.bool else low + draw_one(st.integers(1, 400))
    return torch.randint(low, high, shape, generator=generator).to(dtype)


VALUES = st.recursive(
    st.one_of(tensors(), st.none(), st.booleans()),
    lambda inner: st.one_of(
        st.lists(inner, max_size=2), st.dictionaries(st.sampled_from("ab"), inner, max_size=2)
    ),
    max_leaves=4,
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(VALUES, max_size=2), st.dictionaries(st.sampled_from(["ids", "mask", "x"]), VALUES, max_size=2)
)
def test_probes_of_recorded_inputs_are_those_of_the_inputs_or_are_said_to_be_others(args, kwargs):
    one = Member("one", nn.Linear(2, 2), Inputs(tuple(args), kwargs), Origin("module", "Linear", "Linear"))
    recorded = sketch(one.inputs, followed(one))
    recorded = json.loads(json.dumps(recorded))
    again = Member("one", one.module, draw(recorded), one.origin)
    assert sketch(again.inputs, followed(again)) == recorded
    unknown = unknown_in_probes(again)
    mine, theirs = (probe_inputs(each, seed=3, count=2) for each in (one, again))
    places = [*((str(i), i) for i in range(len(args))), *((name, name) for name in kwargs)]
    for name, key in places:
        if not any(each.partition(".")[0] == name for each in unknown):
            for a, b in zip(mine, theirs, strict=True):
                torch.testing.assert_close(
                    b.kwargs[key] if isinstance(key, str) else b.args[key],
                    a.kwargs[key] if isinstance(key, str) else a.args[key],
                    rtol=0, atol=0,
                )  # fmt: skip


class Boxed(nn.Module):
    def __init__(self):
        super().__init__()
        self.into, self.middle, self.out = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, box):
        return self.out(torch.tanh(self.middle(torch.tanh(self.into(box.x)))))


class Box:
    def __init__(self, x):
        self.x = x


def test_a_module_whose_inputs_no_file_can_hold_is_not_run(tmp_path):
    net = Boxed()
    one = surgery.load_member(copy.deepcopy(net), name="net", inputs=(Box(torch.randn(4, 6)),))
    folder = surgery.save(surgery.fit(surgery.join([one], block=(8, 8)), budget=0.5), tmp_path / "joint")
    (check,) = surgery.verify(folder, modules={"net": net}).members
    assert check.error is None and "made-up inputs do not run in it: TypeError" in (check.not_compared or "")
