"""Damaged artifacts: one sentence that names the file and what is wrong with it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from artifacts import contents, modules, pair, rewrite, seeded, stack

from surgery.artifact import load, save
from surgery.artifact.verify import verify
from surgery.errors import ArtifactError

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
    (lambda m: m.update(version=3), "of version 1 or 2, but is of version 3"),
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
    (lambda m: m["members"]["one"].update(same={"2.weight": "plain/two/none"}), "plain/two/none is stored"),
    (lambda m: m["members"]["one"].update(inputs=[1]), "members.one.inputs: example inputs must be a sketch"),
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
    from safetensors.torch import load_file

    from surgery.safetensors.writing import write_aligned

    path = out / "dictionary.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}  # not mapped
    tensors["8x8-float32/psi"] = torch.full_like(tensors["8x8-float32/psi"], 255)
    write_aligned(path, tensors)
    with pytest.raises(ArtifactError, match=r"must have alignments of 0 to .*255"):
        read(out)
    tensors["8x8-float32/psi"] = torch.zeros_like(tensors["8x8-float32/psi"])
    tensors["8x8-float32/single"][0, 0] = float("nan")
    write_aligned(path, tensors)
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
