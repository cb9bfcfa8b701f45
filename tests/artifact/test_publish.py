"""Uploads: what would go to the hub is said offline, and only what surgery wrote goes there."""

from __future__ import annotations

import json
import shutil

import huggingface_hub
import pytest
from artifacts import contents, pair
from command_line import surgery as command

import surgery
from surgery.artifact import reading
from surgery.disk import records
from surgery.disk.files import sha256_of
from surgery.errors import OutputError, PlanError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return surgery.save(pair(), tmp_path_factory.mktemp("hub") / "joint")


def test_a_dry_run_says_what_would_go(folder, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", None)  # nothing is asked
    found = surgery.push_to_hub(folder, "me/joint", dry_run=True)
    assert found.files == {name: len(content) for name, content in contents(folder).items()}
    assert found.card and found.url is None and not found.left
    assert f"{len(found.files)} files" in repr(found) and "would go to me/joint" in repr(found)
    assert "<table" in found._repr_html_()


def test_on_the_command_line(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", None)
    code, said, _ = command("push", str(folder), "me/joint", "--dry-run")
    assert code == 0 and "would go to me/joint" in said and "manifest.json" in said
    code, said, _ = command("push", str(folder), "me/joint", "--dry-run", "--json")
    assert code == 0 and json.loads(said)["repo"] == "me/joint" and json.loads(said)["url"] is None
    code, _, wrong = command("push", str(folder), "a/b/c", "--dry-run")
    assert code == 2 and "must be a name such as org/name" in wrong
    code, _, wrong = command("push", str(tmp_path), "me/joint", "--dry-run")
    assert code == 2 and "holds nothing of it" in wrong and "Traceback" not in wrong


def test_only_what_surgery_wrote_goes(folder, monkeypatch):
    asked = {}

    class Hub:
        def __init__(self, token=None):
            asked["token"] = token

        def create_repo(self, repo, **options):
            asked["made"] = repo, options

        def upload_folder(self, **options):
            asked.update(options)
            return type("Commit", (), {"commit_url": "https://hub/me/joint/commit/1"})

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    (folder / "notes.txt").write_text("mine")
    found = surgery.push_to_hub(folder, "me/joint", private=True, token="t")
    (folder / "notes.txt").unlink()
    assert asked["made"] == ("me/joint", {"private": True, "exist_ok": True}) and asked["token"] == "t"
    assert "notes.txt" not in asked["allow_patterns"] and "manifest.json" in asked["allow_patterns"]
    assert found.left == ("notes.txt",) and "commit/1" in repr(found)


def test_what_is_not_as_it_was_written_stays_here(folder, tmp_path):
    surgery.export(folder, "one", tmp_path / "around" / "plain", format="plain")
    shutil.copytree(folder, tmp_path / "joint")
    for name, place in (("model.safetensors", "around/plain"), ("manifest.json", "joint")):
        assert surgery.push_to_hub(tmp_path / place, "me/it", dry_run=True).files[name]
    with pytest.raises(OutputError, match="must be one that surgery wrote"):
        surgery.push_to_hub(tmp_path / "around", "me/it", dry_run=True)
    (tmp_path / "around/plain/README.md").write_text("---\n---\nmine")
    assert "README.md" in surgery.push_to_hub(tmp_path / "around/plain", "me/it", dry_run=True).left
    for file in (tmp_path / "around/plain/model.safetensors", tmp_path / "joint/dictionary.safetensors"):
        file.write_bytes(bytes([*file.read_bytes()[:-1], 99]))
        with pytest.raises(OutputError, match=rf"must be whole and as it was written, but .* {file.name}"):
            surgery.push_to_hub(file.parent, "me/it", dry_run=True)


@pytest.mark.parametrize("what", ["artifact", "export"])
def test_large_files_are_hashed_once(what, folder, tmp_path, monkeypatch):
    place = folder if what == "artifact" else surgery.export(folder, "one", tmp_path / "plain")
    hashed: list[str] = []

    def counted(path):
        hashed.append(path.name)
        return sha256_of(path)

    for module in (records, reading):
        monkeypatch.setattr(module, "sha256_of", counted)
    surgery.push_to_hub(place, "me/it", dry_run=True)
    large = [path.name for path in place.rglob("*.safetensors")]
    assert large and sorted(name for name in hashed if name.endswith(".safetensors")) == sorted(large)


def test_what_is_refused(folder, tmp_path, monkeypatch):
    with pytest.raises(PlanError, match="`repo` must be a name such as org/name, found 'a/b/c'"):
        surgery.push_to_hub(folder, "a/b/c", dry_run=True)
    with pytest.raises(OutputError, match="must be one that surgery wrote"):
        surgery.push_to_hub(tmp_path, "me/joint", dry_run=True)

    class Hub:
        def __init__(self, token=None):
            raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    with pytest.raises(OutputError, match=r"no network; check the network, the token"):
        surgery.push_to_hub(folder, "me/joint")
