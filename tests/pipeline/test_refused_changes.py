"""Changes of an artifact that cannot be made, or end halfway: what is wrong is named, and the folder is as it was."""

from __future__ import annotations

import json

import pytest
from artifacts import contents, rewrite
from relatives import Net, modules, relative

import surgery
from surgery.disk.claims import place_of
from surgery.errors import SurgeryError

pytestmark = pytest.mark.usefixtures("figures")

BAD = [
    (lambda at: surgery.add(at, {"b": relative("b", 7)}), "has b already"),
    (lambda at: surgery.add(at, {}), "found none"),
    (lambda at: surgery.add(at, {"new": "./nowhere"}), "nowhere"),
    (lambda at: surgery.add(at, {"new": relative("new", 7)}, max_error=0.1, budget=0.1), "only one of"),
    (lambda at: surgery.add(at, {"new": relative("new", 7)}, budget=1e-4), "budget"),
    (lambda at: surgery.add(at, {"new": relative("new", 7)}, calibrate=["none.txt"]), "none.txt"),
    (lambda at: surgery.remove(at, "d"), "among a, b, c"),
    (lambda at: surgery.remove(at, []), "none was asked for"),
    (lambda at: surgery.remove(at, ["a", "b", "c"]), "at least one member"),
    (lambda at: surgery.add(at.with_name("other"), {"new": relative("new", 7)}), "does not exist"),
]


@pytest.mark.parametrize(("call", "words"), BAD, ids=[words for _, words in BAD])
def test_bad_input_is_named_and_nothing_changes(joint, call, words):
    former = contents(joint.parent)
    with pytest.raises(SurgeryError, match=words):
        call(joint)
    assert contents(joint.parent) == former


def damage_weights(folder):
    path = folder / "dictionary.safetensors"
    path.write_bytes(path.read_bytes()[:-64])


def damage_values(folder):
    """A shared matrix whose bytes are no codes."""
    path = folder / "dictionary.safetensors"
    data = bytearray(path.read_bytes())
    header = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + header])
    begin, end = next(each["data_offsets"] for name, each in entries.items() if name.endswith("shared:z"))
    data[8 + header + begin : 8 + header + end] = b"\xff" * (end - begin)
    path.write_bytes(bytes(data))


def damage_a_bit(folder):
    """Another value of a private row or a shared matrix, which decodes as well as the right one."""
    path = folder / "dictionary.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def lose_a_file(folder):
    min(folder.glob("members/*/*.safetensors")).unlink()


def foreign_file(folder):
    (folder / "mine.txt").write_text("mine")


def unknown_method(folder):
    def change(document):
        for bank in document["banks"].values():
            bank["method"] = "of_nobody"

    rewrite(folder, change)


@pytest.mark.parametrize(
    "damage", [damage_weights, damage_values, damage_a_bit, lose_a_file, foreign_file, unknown_method]
)
def test_a_folder_that_is_not_whole_is_left_alone(joint, damage):
    damage(joint)
    former = contents(joint.parent)
    modules = {name: Net() for name in "abc"}
    for call in (
        lambda: surgery.add(joint, {"new": relative("new", 7)}),
        lambda: surgery.remove(joint, "a"),
        lambda: surgery.refit(joint, modules=modules),
    ):
        with pytest.raises(SurgeryError):
            call()
        assert contents(joint.parent) == former


def test_a_manifest_that_was_lost_is_named(joint):
    (joint / "manifest.json").unlink()
    with pytest.raises(
        SurgeryError, match=r"files of an artifact, such as .*safetensors, but not its manifest\.json"
    ):
        surgery.add(joint, {"new": relative("new", 7)})


@pytest.mark.parametrize("where", ["write_stem", "write_front", "_Amending._check"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "full"), MemoryError])
def test_a_write_that_ends_anywhere_leaves_the_former_folder(joint, monkeypatch, where, error):
    former = contents(joint.parent)

    def end(*_, **__):
        raise error

    monkeypatch.setattr(f"surgery.artifact.amending.{where}", end)
    with pytest.raises((KeyboardInterrupt, MemoryError, SurgeryError)):
        surgery.add(joint, {"new": relative("new", 7)}, max_error=0.2)
    assert contents(joint.parent) == former and not place_of(joint).exists()


@pytest.mark.parametrize(
    ("names", "words"), [({"a": 0, "b": 1}, "live module"), ({"a": 0, "b": 5, "c": 2}, "b has other weights")]
)
def test_a_refit_without_all_origins_leaves_the_folder(joint, names, words):
    former = contents(joint.parent)
    with pytest.raises(SurgeryError, match=words):
        surgery.refit(joint, modules=modules(names))
    assert contents(joint.parent) == former
