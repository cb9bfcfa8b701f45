"""Outputs that hardly differ between inputs: a small error may be all that they tell, and this is said."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace

import pytest
import torch
from artifacts import member, numbers
from command_line import surgery as command
from torch import nn

import surgery
from surgery.errors import SurgeryWarning
from surgery.fitting.report import FitReport
from surgery.fitting.variation import faint, variation


@pytest.fixture(autouse=True)
def plainly(monkeypatch):
    """With error feedback these small nets stay clear at the fewest bits that there are."""
    monkeypatch.setattr("surgery.fitting.learning.LARGEST", 0)


def network(*ends, raised=0.0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(len(ends))
        net = nn.Sequential(
            nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10), *ends
        )
    with torch.no_grad():
        net[4].bias += raised
    return net.eval()


def one(name, *ends, raised=0.0, inputs=None):
    given = torch.linspace(-2, 2, 128).reshape(4, 32) if inputs is None else inputs
    return member(network(*ends, raised=raised), name, given)


def said(make):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        made = make()
    return made, [str(each.message) for each in found if issubclass(each.category, SurgeryWarning)]


def test_what_differs_is_counted_by_input_and_by_tensor():
    common, own = torch.full((4, 6), 3.0), torch.tensor([[1.0], [-1.0], [1.0], [-1.0]]).expand(4, 6)
    whole = common + own
    expected = (4 / 3 / 10) ** 0.5
    assert variation([(whole,)]) == pytest.approx(expected)
    assert variation([(whole[:3],), (whole[3:],)]) == pytest.approx(expected)
    assert variation([(whole, common)]) == pytest.approx(
        expected
    )  # what is constant beside others tells nothing
    assert variation([(common,)]) == 0.0
    assert variation([(own[:2, :3],), (own[:1],)]) == pytest.approx(
        2**0.5
    )  # one of another length compares with none
    assert variation([(whole[:1],)]) is None and variation([(torch.zeros(4, 2),)]) is None
    losses = [(torch.tensor(value),) for value in (1.0, 3.0)]
    assert variation(losses) == pytest.approx((2 / 10 * 2) ** 0.5)


def test_errors_that_do_not_look_small_or_are_nothing_need_no_words():
    errors = {"nothing": 0.0, "small": 0.01, "much": 0.04, "all": 0.9, "unknown": float("nan")}
    assert faint(errors, dict.fromkeys(errors, 0.05)) == {"much": 0.05}
    assert faint(errors | {"large": 0.3}, dict.fromkeys([*errors, "large"], 0.3)) == {}


ENDS = {"sigmoid": [nn.Sigmoid()], "softmax": [nn.Softmax(-1)]}


@pytest.mark.parametrize("end", ENDS)
def test_a_fit_names_the_member_whose_probabilities_hardly_differ(end):
    joint = surgery.join([one("odds"), one(end, *ENDS[end])])
    fitted, words = said(lambda: surgery.fit(joint, max_error=0.05))
    report = fitted.report
    assert report.variations["odds"] > 0.3 and report.variations[end] < 0.1
    (text,) = words
    assert text == report.faint and f"of {end} (by " in text and "odds (" not in text
    assert "log-odds" in text and "`max_error`" in text
    _, words = said(lambda: surgery.fit(surgery.join([one(end, *ENDS[end])]), max_error=0.005))
    assert not words


def test_a_sigmoid_near_its_end_is_named_however_near_it_is():
    for raised in (6.0, 40.0):
        _, words = said(lambda r=raised: surgery.fit(surgery.join([one("a", nn.Sigmoid(), raised=r)])))
        assert ["Outputs of a (by" in text for text in words] in ([True], []), raised
    report = FitReport(errors={"a": 1e-3}, variations={"a": 0.0})
    assert "Outputs of a (by 0% of their size" in report.faint and "max_error" not in report.faint


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_inputs_that_are_all_the_same_tell_nothing(value):
    joint = surgery.join([one("a", nn.Sigmoid(), inputs=torch.full((4, 32), value))])
    fitted, words = said(lambda: surgery.fit(joint, max_error=0.05))
    assert not words and not fitted.report.variations


def test_an_added_member_is_named_and_forgotten_when_it_goes(tmp_path, monkeypatch):
    monkeypatch.setattr("surgery.artifact.writing.draw_sharing", numbers)
    folder = surgery.save(surgery.fit(surgery.join([one("a")]), max_error=0.05), tmp_path / "joint")
    (added,), words = said(lambda: surgery.add(folder, {"new": one("new", nn.Sigmoid())}, max_error=0.05))
    assert [added.warning] == words and "Outputs of new" in added.warning
    modules = {"a": network(), "new": network(nn.Sigmoid())}
    report = surgery.load(folder, modules=modules).report
    assert report.faint == added.warning and added.warning in (folder / "README.md").read_text()
    assert not replace(report, errors={"new": 0.001}).faint
    surgery.remove(folder, "new")
    assert "new" not in surgery.load(folder, modules={"a": network()}).report.variations


FACTORY = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    layers = nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10), nn.Sigmoid()
    return nn.Sequential(*layers).eval(), torch.randn(4, 32)
"""


def test_commands_say_it_also_when_they_are_quiet(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets.py").write_text(FACTORY)
    code, out, err = command("merge", "a=nets.py:net", "--max-error", 0.05, "--out", "j", "--quiet")
    assert (code, out) == (0, "") and "Outputs of a (by" in err and "(--max-error)" in err
    code, out, _ = command("merge", "a=nets.py:net", "--out", "j", "--overwrite", "--json")
    document = json.loads(out)
    assert "Outputs of a (by" in document["warning"] and 0 < document["report"]["variations"]["a"] < 0.1
    code, out, _ = command("report", "j")
    assert code == 0 and "Outputs of a (by" in out
    code, out, _ = command("report", "j", "--json", "--html")
    assert "Outputs of a (by" in json.loads(out)["artifact"]["warning"]
    assert "Outputs of a (by" in (tmp_path / "j.html").read_text()


def test_a_percentage_is_said_to_be_one_also_when_quiet(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets.py").write_text(FACTORY.replace(", nn.Sigmoid()", ""))
    code, out, err = command("merge", "a=nets.py:net", "--max-error", 5, "--out", "j", "--quiet")
    assert (code, out) == (0, "") and "--max-error is a fraction" in err
