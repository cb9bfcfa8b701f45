"""Provenance: recipe and report are typed fields, in memory and after a load, and say nothing that no longer holds."""

from __future__ import annotations

import copy
import json
import math
import pickle

import pytest
import torch
from artifacts import contents, member, modules, rewrite, seeded, stack
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

import surgery
from surgery.core.sizes import TensorReport
from surgery.errors import ArtifactError
from surgery.fitting.report import FitReport, Probes, StackReport

SIZES = st.dictionaries(st.sampled_from("abc"), st.integers(0, 1 << 53), max_size=3)
REPORTS = st.builds(
    FitReport,
    target=st.sampled_from(["", "max-error 0.05", "lossless"]),
    met=st.booleans(),
    original_bytes=SIZES,
    stored_bytes=st.integers(0, 1 << 53),
    saved=st.dictionaries(st.sampled_from(["sharing", "precision"]), st.integers(-(1 << 53), 1 << 53)),
    errors=st.dictionaries(st.sampled_from("abc"), st.floats(0, 1) | st.just(math.nan), max_size=3),
    hashes=st.dictionaries(st.sampled_from("abc"), st.sampled_from(["0" * 64, "ab" * 32])),
    probes=st.builds(Probes, st.none() | st.integers(0, 9), st.just(("a",)) | st.just(())),
    stacks=st.dictionaries(st.just("stack0"), st.builds(StackReport, *[st.integers(0, 99)] * 4)),
    parameters=SIZES,
    changed=st.just(()) | st.just(("a", "b")),
)


@given(REPORTS)
def test_a_report_read_back_from_json_is_written_as_the_same_json(report: FitReport):
    text = json.dumps(report.to_json(), allow_nan=False)
    found = TypeAdapter(FitReport).validate_json(text)
    assert json.dumps(found.to_json()) == text
    assert found.stacks == report.stacks and found.probes == report.probes
    repr(found)


def fitted(**target) -> surgery.JointModel:
    members = [
        member(seeded(stack, number), name, torch.zeros(2, 8)) for number, name in enumerate(modules())
    ]
    return surgery.fit(surgery.join(members), **(target or {"max_error": 0.05}))


def test_a_report_is_the_same_value_after_a_load_and_in_copies(tmp_path):
    joint = fitted()
    made = joint.report
    assert made is not None and all(isinstance(row, TensorReport) for row in made.detail)
    surgery.save(joint, tmp_path / "joint")
    found = surgery.load(tmp_path / "joint", modules=modules())
    report = found.report
    assert report is not None and report.detail == () and report.errors == made.errors
    assert report.to_json() == made.to_json() and report.bound == 0.05
    for twin in (copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
        assert twin.report == report
    assert "0.0 B" not in repr(report) and "-" in repr(report)  # sizes after the fit are not known any more
    surgery.save(found, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "joint")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"target": 3}, "report: target"),
        ({"met": "yes"}, "report: met"),
        ({"errors": {"one": "large"}}, "errors"),
        ({"errors": [0.1]}, "errors"),
        ({"hashes": {"one": "short"}}, "hashes"),
        ({"probes": {"seed": -1}}, "probes"),
        ({"stacks": {"stack0": {"layers": -1}}}, "stacks"),
        ({"saved": {"sharing": 1.5}}, "saved"),
        ({"changed": "one"}, "changed"),
        ([1], "report"),
    ],
)  # fmt: skip
def test_a_report_that_is_none_is_an_error_of_the_artifact(change, said, tmp_path):
    surgery.save(fitted(), tmp_path / "joint")
    rewrite(
        tmp_path / "joint",
        lambda m: m.update(report=m["report"] | change if isinstance(change, dict) else change),
    )
    with pytest.raises(ArtifactError, match=said.partition(":")[0]):
        surgery.load(tmp_path / "joint", modules=modules())
