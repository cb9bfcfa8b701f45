"""Artifacts that are written anew in their place although something in them is damaged: what goes need not be whole."""

from __future__ import annotations

import json
import os
import shutil
import warnings

import pytest
import relatives
from artifacts import contents
from relatives import loaded, relative, same, stored, weights

import surgery
from surgery.errors import ArtifactError, SurgeryWarning

pytestmark = pytest.mark.usefixtures("figures")


def cut(path):
    path.write_bytes(path.read_bytes()[:-8])


def flip(path):
    """Another value of the last tensor, which decodes as well as the right one."""
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(bytes(data))


GONE = {
    "cut": cut,
    "foreign": lambda path: path.write_bytes(b"no tensors"),
    "lost": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", GONE.values(), ids=GONE)
def test_a_member_that_goes_need_not_be_whole(joint, tmp_path, damage):
    whole = shutil.copytree(joint, tmp_path / "whole")
    for folder in (joint, whole):
        (folder / "members/c/config.json").unlink()
    expected = surgery.remove(whole, "c")
    damage(joint / "members/c/weights.safetensors")
    with pytest.raises(ArtifactError, match="members/c/weights"):
        surgery.remove(joint, "b")
    gone = surgery.remove(joint, "c")
    assert contents(joint) == contents(whole)
    assert gone.names == ("c",) and 0 <= gone.stored_bytes - expected.stored_bytes < 4096
    bits = weights(joint, "ab")
    assert same(bits, weights(whole, "ab"))


@pytest.mark.parametrize("damage", [flip, *GONE.values()], ids=["flip", *GONE])
def test_what_a_member_that_goes_lends_must_be_whole(joint, damage):
    assert any(first.member == "a" for first in stored(joint).aliases.values())
    damage(joint / "members/a/weights.safetensors")
    former = contents(joint.parent)
    with pytest.raises(ArtifactError, match="members/a/weights"):
        surgery.remove(joint, "a")
    assert contents(joint.parent) == former


@pytest.mark.parametrize("call", ["add", "remove"])
def test_what_is_written_anew_was_what_had_been_written(joint, tmp_path, call):
    """A file that gains or loses a tensor gets a new hash, which would hide what had happened to its others."""
    if call == "add":  # lends a tensor of its own
        folder = surgery.save(
            surgery.fit(surgery.join([relative("a", 0, width=80)]), max_error=0), tmp_path / "one"
        )
        flip(folder / "members/a/weights.safetensors")
    else:  # gets what was lent to it
        folder = joint
        flip(folder / "members/b/weights.safetensors")
    former = contents(tmp_path)
    name = "a" if call == "add" else "b"
    with pytest.raises(ArtifactError, match=f"members/{name}/weights"):
        if call == "add":
            surgery.add(folder, {"x": relative("x", 1, width=80)}, max_error=0.03)
        else:
            surgery.remove(folder, "a")
    assert contents(tmp_path) == former


def later(path):
    """As a change that somebody makes after the folder was written."""
    flip(path)
    written = path.parents[2] if path.parent.parent.name == "members" else path.parent
    stamp = (written / "manifest.json").stat().st_mtime_ns + 10**9
    os.utime(path, ns=(stamp, stamp))


@pytest.mark.parametrize("linked", [True, False], ids=["linked", "copied"])
@pytest.mark.parametrize("call", ["add", "remove"])
def test_what_is_damaged_and_not_needed_is_named(joint, monkeypatch, call, linked):
    """The folder comes out as it is asked for, and a file that was spoilt before does not pass in silence."""
    if not linked:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError()))
    (flip if not linked else later)(joint / "members/b/weights.safetensors")
    with pytest.warns(
        SurgeryWarning, match=r"members/b/weights\.safetensors in .* must be as it was written"
    ) as said:
        if call == "add":
            surgery.add(joint, {"x": relative("x", 8)}, max_error=0.05)
        else:
            surgery.remove(joint, "c")
    assert sum(issubclass(each.category, SurgeryWarning) for each in said) == 1
    found = surgery.verify(joint)
    assert [*found.files] == ["members/b/weights.safetensors"]


def test_nothing_is_named_where_all_is_whole(joint):
    os.utime(joint / "members/b/weights.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        surgery.add(joint, {"x": relative("x", 8)}, max_error=0.05)
        surgery.remove(joint, "x")


def test_what_no_bank_can_be_made_of_is_named_by_its_file(joint):
    path = joint / "dictionary.safetensors"
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    owners = next(each for name, each in json.loads(data[8:start]).items() if name.endswith("/owner"))
    data[start + owners["data_offsets"][0]] = 255
    path.write_bytes(bytes(data))
    for call in (lambda: loaded(joint), lambda: surgery.add(joint, {"x": relative("x", 8)}, max_error=0.05)):
        with pytest.raises(ArtifactError, match=r"dictionary\.safetensors must have the SHA-256"):
            call()


def test_what_does_not_decode_is_named_by_its_file(tmp_path):
    folder = surgery.save(
        surgery.fit(surgery.join([relative("a", 0, width=128)]), max_error=0.02), tmp_path / "joint"
    )
    path = next(folder.rglob("weights.safetensors"))
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    coded = [each for name, each in json.loads(data[8:start]).items() if name.endswith(":z")]
    first, last = max((each["data_offsets"] for each in coded), key=lambda each: each[1] - each[0])
    data[start + (first + last) // 2 : start + last] = bytes(last - (first + last) // 2)
    path.write_bytes(bytes(data))
    with pytest.raises(ArtifactError, match=r"members/a/weights\.safetensors must have the SHA-256"):
        surgery.load(folder, modules={"a": relatives.Net(128)})
    surgery.verify(folder)
