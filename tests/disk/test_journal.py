"""A journal gives back what was kept, whatever a kill left of its last line, and belongs to one subject."""

from __future__ import annotations

import errno
import json
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.disk.journal import LINES, Journal, kept_in, made_once
from surgery.errors import OutputError

SUBJECT = {"recipe": {"seed": 0}, "files": {"a.safetensors": [10, 20]}, "software": {"number of threads": 2}}


def tensors_of(number):
    half = torch.randn(3, number + 1, generator=torch.Generator().manual_seed(number)).bfloat16()
    return {"whole": torch.arange(number), "half": half, "one": torch.tensor(float(number))}


def same(one, other):
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


@settings(max_examples=30, deadline=None)
@given(count=st.integers(1, 5), cut=st.integers(0, 400), data=st.data())
def test_what_is_whole_stays_and_the_rest_is_made_again(tmp_path_factory, count, cut, data):
    folder = tmp_path_factory.mktemp("journal") / "journal"
    journal = Journal(folder, SUBJECT, folder)
    for number in range(count):
        value, tensors = journal.keep(f"part {number}", [number, 0.1, float("inf")], tensors_of(number))
        assert value == [number, 0.1, float("inf")]
        assert same(tensors, tensors_of(number))
    lines = (folder / LINES).read_bytes()
    left = lines[: max(0, len(lines) - cut)]
    (folder / LINES).write_bytes(left)
    spoilt = data.draw(st.integers(0, count - 1))
    path = folder / f"{spoilt}.bin"
    path.write_bytes(data.draw(st.sampled_from([path.read_bytes()[:-1], b"\1" + path.read_bytes()[1:]])))
    again = Journal(folder, SUBJECT, folder)
    assert again.found == left.count(b"\n")
    for number in range(count):
        found = again.get(f"part {number}")
        assert (found is None) == (number >= again.found or number == spoilt)
        if found is None:
            found = again.keep(f"part {number}", [number, 0.1, float("inf")], tensors_of(number))
        assert found[0] == [number, 0.1, float("inf")]
        assert same(found[1], tensors_of(number))
    third = Journal(folder, SUBJECT, folder)
    assert all(same(third.get(f"part {number}")[1], tensors_of(number)) for number in range(count))
    third.discard()
    assert not folder.exists()


@pytest.mark.parametrize(
    "change",
    [
        {"file": "../other.bin"},
        {"file": None},
        {"tensors": {"whole": ["int64", [1 << 40], 0]}},
        {"tensors": {"whole": ["int64", [1], 1 << 40]}},
        {"tensors": {"whole": ["int64", [-1], 0]}},
        {"tensors": {"whole": ["load", [1], 0]}},
        {"tensors": {"whole": ["no_such_dtype", [1], 0]}},
        {"tensors": [1]},
        {"extra": 1},
    ],
)
def test_lines_that_no_run_writes_count_as_not_made(tmp_path, change):
    folder = tmp_path / "journal"
    Journal(folder, SUBJECT, folder).keep("part", 1, tensors_of(3))
    (tmp_path / "other.bin").write_bytes((folder / "0.bin").read_bytes())
    (folder / "strange.bin").write_bytes(b"")
    line = json.loads((folder / LINES).read_text())
    (folder / LINES).write_text(json.dumps({**line, **change}) + "\n")
    again = Journal(folder, SUBJECT, folder)
    assert again.found == 0 and again.get("part") is None
    assert same(again.keep("part", 1, tensors_of(3))[1], tensors_of(3))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"recipe": {"seed": 1}}, "another recipe was asked for"),
        ({"files": {"a.safetensors": [10, 21]}}, "a.safetensors was written to"),
        ({"files": {}}, "another files was asked for"),
        ({"software": {"number of threads": 1}}, "another number of threads was asked for"),
    ],
)
def test_a_journal_of_something_else_is_named_and_stays(tmp_path, change, said):
    Journal(tmp_path / "journal", SUBJECT, tmp_path / "out").keep("part", 1, {})
    with pytest.raises(
        OutputError, match=rf"{tmp_path}/out was interrupted.*{said}.*delete {tmp_path}/journal"
    ):
        Journal(tmp_path / "journal", {**SUBJECT, **change}, tmp_path / "out")
    assert Journal(tmp_path / "journal", SUBJECT, tmp_path / "out").get("part") == (1, {})


def test_a_full_disk_is_said_and_what_was_kept_stays(tmp_path, monkeypatch):
    journal = Journal(tmp_path / "journal", SUBJECT, tmp_path / "out")
    journal.keep("first", 1, tensors_of(1))

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(journal, "_write", full)
    with pytest.raises(OutputError, match="the disk is full"):
        journal.keep("second", 2, tensors_of(2))
    again = Journal(tmp_path / "journal", SUBJECT, tmp_path / "out")
    assert again.found == 1
    assert same(again.get("first")[1], tensors_of(1))


def test_things_are_made_once(tmp_path):
    made = []

    def make():
        made.append(1)
        return len(made), {"x": torch.ones(2)}

    assert [made_once("x", make)[0] for _ in range(2)] == [1, 2]  # no journal
    for _ in range(2):
        with kept_in(Journal(tmp_path / "journal", SUBJECT, tmp_path / "out")):
            assert [made_once("x", make)[0] for _ in range(2)] == [3, 3]


def test_tensors_come_back_where_they_are_wanted(tmp_path):
    """A journal's tensors lie on the CPU; what goes on with them may not."""

    def make():
        return None, {"x": torch.ones(2, 3)}

    for journal in (None, Journal(tmp_path / "journal", SUBJECT, tmp_path / "out")):
        with kept_in(journal):
            for device in (torch.device("cpu"), torch.device("meta")):
                _, tensors = made_once("x", make, device)
                assert tensors["x"].device == device and tensors["x"].shape == (2, 3)
