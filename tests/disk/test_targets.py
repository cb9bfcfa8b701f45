"""Targets that are refused before anything is loaded, and members' folders that are distinct on every disk."""

import json
import os
import unicodedata
from pathlib import Path

import pytest
from artifacts import contents, member, pair, rewrite, seeded, stack
from command_line import surgery as run
from hypothesis import given
from hypothesis import strategies as st

import surgery
from surgery.artifact.export import export
from surgery.artifact.foldernames import folded, folder_names
from surgery.artifact.verify import verify
from surgery.disk.files import put
from surgery.disk.folders import check_target
from surgery.errors import ArtifactError, OutputError
from surgery.pipeline.merge import check
from surgery.settings.recipe import Recipe


@pytest.fixture
def place(tmp_path):
    put(tmp_path / "bert" / "config.json", b"{}")
    put(
        tmp_path / "nets" / "mine.py",
        b"def net():\n    raise SystemExit\n\ndef data():\n    raise SystemExit\n",
    )
    put(tmp_path / "weights" / "net.safetensors", b"")
    put(tmp_path / "pictures" / "a.png", b"")
    return tmp_path


def refused(place, target, model="bert", **more):
    """What a merge refuses before it loads anything."""
    reference = model.replace("@", f"{place}/")
    document = {"models": [{"model": f"net={reference}"}], "out": str(target), **more}
    with pytest.raises(OutputError) as found:
        check(Recipe.of(document), overwrite=True)
    return str(found.value)


def test_inputs_are_no_targets_and_no_place_for_one(place):
    bert = place / "bert"
    for target, how in (
        (bert, "is"),
        (bert / "joint", "lies in"),
        (place, "holds"),
        (bert / ".." / "bert", "is"),
    ):
        assert f" {how} {bert}, which is an input" in refused(place, target, "@bert")
        assert f" {how} {bert}, which is an input" in refused(place, target, "@bert?class=BertModel")
    assert "which is an input" in refused(place, place / "weights", "timm:resnet18=@weights/net.safetensors")
    assert "which is an input" in refused(place, place / "nets", "@nets/mine.py:net")
    assert "lies in" in refused(
        place, place / "pictures" / "out", "timm:resnet18", calibrate=[f"{place}/pictures"]
    )
    (place / "link").symlink_to(bert)
    assert "which is an input" in refused(place, place / "link" / "joint", "@bert")
    check(
        Recipe.of({"models": [{"model": f"{place}/nets/mine.py:net"}], "out": str(place / "nets" / "joint")})
    )
    assert (bert / "config.json").read_bytes() == b"{}"


def test_an_artifact_is_not_replaced_by_one_of_its_members(tmp_path):
    out = surgery.save(pair(), tmp_path / "out")
    before = contents(out)
    code, _, err = run("export", out, "--member", "one", "--out", out, "--overwrite")
    assert code == 2 and "which is an input" in err
    with pytest.raises(OutputError, match="lies in"):
        export(out, "one", out / "members" / "plain")
    assert contents(out) == before


def test_what_cannot_be_replaced_in_one_step_is_refused(place, monkeypatch):
    with pytest.raises(OutputError, match=r"a mount point; choose a folder in it, such as /proc/joint"):
        check_target("/proc", overwrite=True)
    (place / "link").symlink_to(place / "elsewhere")
    for target, said in (("link", "is a link to"), ("nets/mine.py", "is a file"), ("nets/mine.py/out", "is a file"),
                         ("n" * 300, "too long"), ("a\0b", "null")):  # fmt: skip
        with pytest.raises(OutputError, match=said):
            check_target(place / target)
    with pytest.raises(OutputError, match=r"also holds mine\.py"):
        check_target(place / "nets", overwrite=True)
    plain = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != place and plain(path, mode))
    with pytest.raises(OutputError, match="must be writable"):
        check_target(place / "new")


@pytest.mark.parametrize("verb", ["merge", "export", "train"])
def test_verbs_refuse_a_mount_point_before_they_load(verb, place, monkeypatch):
    monkeypatch.setattr(
        surgery.members.references, "load_member", lambda *_, **__: pytest.fail("something was loaded")
    )
    monkeypatch.setattr(
        "surgery.artifact.export._export_plain", lambda *_: pytest.fail("something was loaded")
    )
    (place / "mounted").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == place / "mounted")
    task = {"data": f"{place}/nets/mine.py:data"}
    recipe = {"models": [{"model": f"{place}/nets/mine.py:net", "tasks": [task]}], "train": {}}
    put(place / "recipe.json", json.dumps(recipe).encode())
    arguments = {"merge": [f"{place}/nets/mine.py:net"], "export": [place / "bert", "--member", "net"],
                 "train": [place / "recipe.json"]}[verb]  # fmt: skip
    code, _, err = run(verb, *arguments, "--out", place / "mounted")
    assert code == 2 and "is a mount point" in err


NAMES = st.text("aAsSßẞ\u0130i.né" + unicodedata.normalize("NFD", "é") + "-2con", min_size=1, max_size=5)


@given(st.lists(NAMES, unique=True))
def test_folders_are_distinct_on_every_disk_and_usable_on_windows(members):
    folders = folder_names(members)
    assert list(folders) == members
    assert len({folded(each) for each in folders.values()}) == len(members)
    assert not any(
        each.endswith((".", " ")) or each.partition(".")[0].casefold() == "con" for each in folders.values()
    )
    usual = [
        name for name in members if name.isascii() and name.islower() and name.isalnum() and name != "con"
    ]
    first = {name for name in usual if folded(name) not in {folded(m) for m in members if m != name}}
    assert all(folders[name] == name for name in first), "an ordinary name is its folder's"


def joint():
    import torch

    made = {name: member(seeded(stack, n), name, torch.zeros(2, 8), {"vocab.txt": b"a" * 2000}) for n, name in
            enumerate(("net", "Net", "con", "NET.", "net-2"))}  # fmt: skip
    return surgery.join(list(made.values()), block=(8, 8))


def test_members_that_differ_in_case_are_given_back(tmp_path):
    made = joint()
    out = surgery.save(made, tmp_path / "out")
    folders = sorted(path.name for path in (out / "members").iterdir())
    assert (
        folders == ["NET-3", "Net-4", "_con", "net", "net-2"] or len({folded(each) for each in folders}) == 5
    )
    files = [folded(name) for name in contents(out)]
    assert len(files) == len(set(files)), "a disk that knows no case keeps them all"
    modules = {name: seeded(stack, 9) for name in made.names}
    again = surgery.load(out, modules=modules)
    for name in made.names:
        assert surgery.members.member.content_hash(
            again.collapse(name)
        ) == surgery.members.member.content_hash(made.collapse(name))
        assert again.members[name].files == {"vocab.txt": b"a" * 2000}
        plain = export(out, name, tmp_path / f"plain-{folder_names(made.names)[name]}")
        assert (plain / "vocab.txt").read_bytes() == b"a" * 2000
    assert verify(out).ok
    assert contents(surgery.save(again, tmp_path / "again")) == contents(out)


def test_two_members_of_one_folder_are_a_contradiction(tmp_path):
    out = surgery.save(pair(), tmp_path / "out")
    rewrite(out, lambda manifest: manifest["members"]["two"].update(folder="one"))
    with pytest.raises(ArtifactError, match="a folder of its own, but members/one"):
        surgery.load(out)
    rewrite(out, lambda manifest: manifest["members"]["two"].update(folder="../two"))
    with pytest.raises(ArtifactError, match=r"folder"):
        surgery.load(out)
