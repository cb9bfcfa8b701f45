"""Targets that cannot be written: one sentence, nothing half-written, and what was there before untouched."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

import pytest
import torch
from artifacts import contents, pair, seeded, stack

import surgery
from surgery.artifact import save, writing
from surgery.disk import folders as files
from surgery.errors import OutputError


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return save(pair(), tmp_path / "out", recipe={"seed": 1})


def test_an_existing_target(out: Path, tmp_path: Path):
    before = contents(out)
    with pytest.raises(OutputError, match="exists and holds files"):
        save(pair(), out)
    assert contents(out) == before
    (out / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"also holds mine\.txt"):
        save(pair(), out, overwrite=True)
    (out / "mine.txt").unlink()
    assert contents(save(pair(), out, overwrite=True)) != before
    other = tmp_path / "photos"
    other.mkdir()
    (other / "README.md").write_text("mine")
    with pytest.raises(OutputError, match=r"also holds README\.md"):
        save(pair(), other, overwrite=True)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="is a file"):
        save(pair(), tmp_path / "file", overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "out", "photos"]


@pytest.mark.parametrize("where", ["write_shards", "make_card", "manifest_bytes"])
def test_a_failure_half_way_leaves_the_old_folder(out: Path, tmp_path: Path, monkeypatch, where: str):
    before = contents(out)

    def fail(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(writing, where, fail)
    with pytest.raises(KeyboardInterrupt):
        save(pair(), out, overwrite=True)
    with pytest.raises(KeyboardInterrupt):
        save(pair(), tmp_path / "deep" / "new")
    assert contents(out) == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("exchange", [True, False])
def test_a_failing_move_leaves_the_old_folder(out: Path, tmp_path: Path, monkeypatch, exchange: bool):
    before = contents(out)
    rename, calls = Path.rename, []

    def fail_second(self: Path, target: Path):
        calls.append(target)
        if len(calls) == 2:
            raise OSError(errno.EIO, "the disk failed")
        return rename(self, target)

    monkeypatch.setattr(files, "_exchange", (lambda *_: False) if not exchange else files._exchange)
    if exchange:
        monkeypatch.setattr(
            files, "_flush", lambda _: (_ for _ in ()).throw(OSError(errno.EIO, "the disk failed"))
        )
    else:
        monkeypatch.setattr(Path, "rename", fail_second)
    with pytest.raises(OutputError, match="the disk failed"):
        save(pair(), out, overwrite=True)
    assert contents(out) == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(("code", "words"), [
    (errno.ENOSPC, "the disk is full"),
    (errno.EROFS, "must be writable"),
    (errno.EACCES, "must be writable"),
])  # fmt: skip
def test_errors_of_the_system_are_sentences(tmp_path: Path, monkeypatch, code: int, words: str):
    def fail(*_args, **_kwargs):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OutputError, match=words):
        save(pair(), tmp_path / "a" / "out")
    assert not list(tmp_path.iterdir())


def test_too_little_room_is_said_before_writing(tmp_path: Path, monkeypatch):
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OutputError, match=r"needs [\d,]+ bytes, but the disk is full \(1,000 bytes free\)"):
        save(pair(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def small_disk(tmp_path: Path):
    """A file system of 64 KiB, where the test may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)], capture_output=True
    )
    if made.returncode:
        pytest.skip("mounting is not permitted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_and_a_read_only_one(small_disk: Path, monkeypatch):
    with pytest.raises(OutputError, match="the disk is full"):
        save(pair(), small_disk / "out")
    big = surgery.join(
        [
            surgery.Member(
                "net",
                seeded(lambda: stack(200)),
                surgery.Inputs((torch.zeros(2, 8),)),
                surgery.Origin("module", "net", "net"),
            )
        ]
    )
    monkeypatch.setattr(files, "_check_room", lambda *_: None)  # the disk fills up while it is written
    with pytest.raises(OutputError, match="the disk is full"):
        save(big, small_disk / "out")
    assert not list(small_disk.iterdir())
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(OutputError, match="must be writable"):
        save(pair(), small_disk / "out")
