"""Damaged artifacts and bad targets: one sentence that names the file, and nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from artifacts import contents, modules, pair, rewrite, seeded, stack

import surgery
from surgery import files, writing
from surgery.artifact import load, save
from surgery.errors import ArtifactError, OutputError
from surgery.verify import verify

DAMAGEABLE = ["README.md", "dictionary.safetensors", "manifest.json", "members/one/config.json",
              "members/one/weights.safetensors", "members/two/weights.safetensors", "recipe.yaml",
              "sharing.png"]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "out"
    return save(pair(files={"config.json": b'{"a": 1}'}), out, recipe={"seed": 1})


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "out")


def read(folder: Path):
    return load(folder, modules=modules())


def test_the_fixture_is_sound(out: Path):
    assert sorted({*contents(out)} - {"members/two/config.json"}) == DAMAGEABLE
    assert verify(out).ok
    read(out)


@pytest.mark.parametrize("name", DAMAGEABLE)
def test_a_flipped_byte_is_found(out: Path, name: str):
    data = bytearray((out / name).read_bytes())
    data[len(data) // 2] ^= 1
    (out / name).write_bytes(data)
    if name == "manifest.json":
        try:
            assert name in verify(out).files
        except ArtifactError as error:
            assert name in str(error)
        return
    report = verify(out)
    assert not report.ok and set(report.files) == {name}
    spoilt = {check.member for check in report.members if not check.ok}
    expected = (
        {"one", "two"} if name.startswith("dictionary") else {name.split("/")[1]} if "/" in name else set()
    )
    assert spoilt == expected


@pytest.mark.parametrize("name", DAMAGEABLE)
def test_a_truncated_file_is_found(out: Path, name: str):
    data = (out / name).read_bytes()
    (out / name).write_bytes(data[: len(data) // 2])
    if name == "manifest.json":
        with pytest.raises(ArtifactError, match=name):
            verify(out)
    else:
        report = verify(out)
        assert not report.ok and f"must have {len(data):,} bytes" in report.files[name]
    if name.endswith((".safetensors", "manifest.json", "config.json")):
        with pytest.raises(ArtifactError, match=name):
            read(out)


@pytest.mark.parametrize("name", DAMAGEABLE)
def test_a_missing_file_is_found(out: Path, name: str):
    (out / name).unlink()
    if name != "manifest.json":
        assert verify(out).files == {name: "is missing"}
    if name not in ("README.md", "sharing.png"):
        with pytest.raises(ArtifactError, match=name):
            read(out)


def test_no_artifact_at_all(tmp_path: Path):
    with pytest.raises(ArtifactError, match="does not exist"):
        load(tmp_path / "nothing")
    with pytest.raises(ArtifactError, match="has none"):
        load(tmp_path)


@pytest.mark.parametrize("change", [
    lambda header: header["6.bias"].update(data_offsets=[0, 10**9]),
    lambda header: header["6.bias"].update(dtype="F16", shape=[64]),
    lambda header: header.update(renamed=header.pop("6.bias")),
    lambda header: header["6.bias"].update(shape=[2, 16]),
    lambda header: header["6.bias"].pop("shape"),
])  # fmt: skip
def test_a_header_that_lies(out: Path, change):
    path = out / "members/one/weights.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    raw = json.dumps(header, separators=(",", ":")).encode().ljust(length)
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data[8 + length :])
    with pytest.raises(ArtifactError, match=r"members/one/weights\.safetensors"):
        read(out)
    path.write_bytes((10**12).to_bytes(8, "little") + data[8:])
    with pytest.raises(ArtifactError, match=r"weights\.safetensors must begin with a header that fits"):
        read(out)


def set_encoded(manifest: dict) -> None:
    manifest["members"]["one"]["encoded"] = [["int4/64", "float32", [16, 32], ["0.weight"]]]


@pytest.mark.parametrize(("change", "words"), [
    (lambda m: m.update(version=2), "of version 1, but is of version 2"),
    (lambda m: m.pop("files"), "files: Field required"),
    (lambda m: m.update(extra=1), "extra: Extra inputs"),
    (lambda m: m["members"]["one"].update(bytes="many"), "members.one.bytes"),
    (lambda m: m["members"].update({"..": m["members"]["one"]}), r"members\.\.\."),
    (lambda m: m["files"].update({"../secret": m["files"]["README.md"]}), "'../secret' must be relative"),
    (lambda m: m["files"].update({"/etc/passwd": m["files"]["README.md"]}), "'/etc/passwd' must be relative"),
    (lambda m: m["members"]["one"].update(borrowed={"../../x": "two"}), "'../../x' is borrowed"),
    (lambda m: m["views"][0].update(bank="other"), "names the bank 'other'"),
    (lambda m: m["views"][0].update(pattern="o i k -> 1 o i"), "View 0 of the manifest must fit"),
    (lambda m: m["members"]["two"]["placements"].append(["6.weight", 0, 9]), "but reach to"),
    (lambda m: m["members"]["two"]["placements"].append(["6.weight", 7, 9]), "has view 7 of 1"),
    (lambda m: m["members"]["two"]["placements"].pop(), "1 missing: 4.weight"),
    (lambda m: m["members"]["one"].update(ties={"0.bias": ["0.bias", "9.bias"]}), "1 unexpected: 9.bias"),
    (lambda m: m["members"]["one"].update(same={"2.weight": "plain/two/none"}), "plain/two/none is stored for sev"),
    (lambda m: m["members"]["one"].update(inputs=[1]), "inputs of member 'one' must be a sketch"),
    (lambda m: m["banks"]["8x8-float32"].update(locations=5), "but reach to"),
    (lambda m: m["banks"]["8x8-float32"].update(block=[8, 4]), "8x8-float32"),
    (set_encoded, "must hold 0.weight:q4 as torch.uint8"),
])  # fmt: skip
def test_a_manifest_that_does_not_fit(out: Path, change, words: str):
    rewrite(out, change)
    with pytest.raises(ArtifactError, match=words):
        read(out)


def test_tensors_of_another_architecture(out: Path):
    with pytest.raises(
        ArtifactError, match=r"must be those of Sequential.*2 missing: 10.weight, 10.bias.*other shape"
    ):
        load(out, modules={**modules(), "one": seeded(lambda: stack(32, 4))})


def test_alignment_out_of_range(out: Path):
    from safetensors.torch import load_file, save_file

    path = out / "dictionary.safetensors"
    tensors = load_file(path)
    tensors["8x8-float32/psi"] = torch.full_like(tensors["8x8-float32/psi"], 255)
    save_file(tensors, path)
    with pytest.raises(ArtifactError, match=r"must have alignments of 0 to .*255"):
        read(out)
    tensors["8x8-float32/psi"] = torch.zeros_like(tensors["8x8-float32/psi"])
    tensors["8x8-float32/single"][0, 0] = float("nan")
    save_file(tensors, path)
    with pytest.raises(ArtifactError, match="NaN or infinite values in single"):
        read(out)


def test_a_link_that_leads_out(out: Path, tmp_path: Path):
    target = out / "members/one/weights.safetensors"
    target.rename(tmp_path / "elsewhere.safetensors")
    target.symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(ArtifactError, match="is a link that leads out of the folder"):
        read(out)


def test_the_links_of_the_hubs_cache_are_followed(out: Path, tmp_path: Path):
    blobs, snapshot = tmp_path / "models--me--joint/blobs", tmp_path / "models--me--joint/snapshots/abc"
    blobs.mkdir(parents=True)
    for number, (name, content) in enumerate(contents(out).items()):
        (blobs / str(number)).write_bytes(content)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(blobs / str(number))
    assert read(snapshot).names == ("one", "two")


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


@pytest.mark.parametrize("where", ["write_tensors", "make_card", "manifest_bytes"])
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
