"""Records of many small members: few bytes, nothing lost, and artifacts of the former layout as before."""

from __future__ import annotations

import gzip
import hashlib
import json
import zipfile
from pathlib import Path

import pytest
import torch
from artifacts import contents
from places import DATA
from torch import nn

import surgery
from surgery import Inputs, Member
from surgery.artifact.manifest import APART, RECORDS, manifest_bytes
from surgery.errors import ArtifactError
from surgery.members.member import content_hash

MEMBERS = 9
TOGETHER = "members/weights.safetensors"
FRONT = ("README.md", "sharing.png")


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))


def relatives(count: int) -> dict[str, nn.Module]:
    generator = torch.Generator().manual_seed(0)
    base = [torch.randn(p.shape, generator=generator) * 0.3 for p in net().parameters()]
    made = {}
    for number in range(count):
        made[f"m{number}"] = module = net().eval()
        with torch.no_grad():
            for p, b in zip(module.parameters(), base, strict=True):
                p.copy_(b + 0.01 * torch.randn(b.shape, generator=generator))
    return made


def modules(count: int = MEMBERS) -> dict[str, nn.Module]:
    return {f"m{number}": net() for number in range(count)}


def member(name: str, module: nn.Module) -> Member:
    x = torch.randn(32, 6, generator=torch.Generator().manual_seed(1))
    return surgery.load_member(module, name=name, inputs=Inputs((x,)))


def fitted(count: int) -> surgery.JointModel:
    members = [member(name, module) for name, module in relatives(count).items()]
    plan = surgery.make_plan([surgery.discover(each, sites=("re:.*weight",)) for each in members])
    return surgery.fit(surgery.join(members, plan), max_error=0.05, seed=0, device="cpu")


def needed(folder: Path) -> int:
    return sum(len(data) for path, data in contents(folder).items() if path not in FRONT)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("many") / "joint"
    surgery.save(fitted(24), out)
    return out


@pytest.fixture(scope="module")
def former(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("former")
    with zipfile.ZipFile(DATA / "artifacts_2.zip") as archive:
        archive.extractall(out)
    return out


def states(joint: surgery.JointModel) -> dict[str, str]:
    return {name: content_hash(joint.collapse(name)) for name in joint.names}


def test_small_members_lie_in_one_file_and_their_records_apart(many):
    found = contents(many)
    assert set(found) == {
        "README.md",
        "sharing.png",
        "manifest.json",
        "dictionary.safetensors",
        TOGETHER,
        RECORDS,
    }
    manifest = json.loads(found["manifest.json"])
    assert manifest["version"] == 2 and not {*APART} & manifest.keys()
    records = json.loads(gzip.decompress(found[RECORDS]))
    assert len(records["members"]) == 24 and len(records["report"]["errors"]) == 24
    assert len(found[RECORDS]) + len(found["manifest.json"]) < 24 * 200  # 700 and more for each before
    report = surgery.verify(many, modules=modules(24))
    assert not report.files and all(check.rebuilt for check in report.members)


def test_it_loads_whole_or_in_part_and_is_written_again_to_the_same_bytes(many, tmp_path):
    joint = surgery.load(many, modules=modules(24))
    part = surgery.load(many, modules={"m3": net(), "m20": net()}, members=["m3", "m20"])
    assert joint.report is not None and joint.report.errors.keys() == joint.report.hashes.keys() == {
        *modules(24)
    }
    hashes = states(joint)
    assert states(part) == {name: hashes[name] for name in ("m3", "m20")}
    surgery.save(joint, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(many)
    packed = surgery.load(many, modules={"m3": net()}, members=["m3"], resident="packed")
    x = torch.randn(4, 6)
    assert torch.equal(packed["m3"](x), joint["m3"](x))


def test_what_was_added_is_removed_byte_for_byte(many, tmp_path):
    import shutil

    folder = Path(shutil.copytree(many, tmp_path / "joint"))
    before, new = contents(folder), member("new", relatives(25)["m24"])
    surgery.add(folder, {"new": new}, max_error=0.05, device="cpu")
    assert states(surgery.load(folder, modules={**modules(24), "new": net()})).keys() == {*modules(24), "new"}
    assert 0 < sum(map(len, contents(folder).values())) - sum(map(len, before.values())) < 3 * 2172
    surgery.remove(folder, "new")
    assert contents(folder) == before


def test_few_members_keep_a_file_each(tmp_path):
    surgery.save(fitted(3), tmp_path / "joint")
    found = contents(tmp_path / "joint")
    assert TOGETHER not in found and {f"members/m{n}/weights.safetensors" for n in range(3)} <= found.keys()
    assert RECORDS not in found and len(json.loads(found["manifest.json"])["members"]) == 3


def test_an_artifact_of_the_former_layout_loads_and_grows(former, tmp_path):
    import shutil

    expected = json.loads((former / "hashes.json").read_text())["many"]
    folder = Path(shutil.copytree(former / "many", tmp_path / "many"))
    assert json.loads((folder / "manifest.json").read_text())["version"] == 1
    joint = surgery.load(folder, modules=modules())
    assert states(joint) == expected
    surgery.save(joint, tmp_path / "again")
    assert states(surgery.load(tmp_path / "again", modules=modules())) == expected
    assert needed(tmp_path / "again") < 0.7 * needed(folder)
    surgery.add(folder, {"new": member("new", relatives(10)["m9"])}, max_error=0.05, device="cpu")
    assert TOGETHER in contents(folder)
    surgery.remove(folder, "new")
    assert states(surgery.load(folder, modules=modules())) == expected
    assert contents(folder) == contents(tmp_path / "again")


def changed_records(folder: Path, data: bytes, listed: bool) -> None:
    """Other records, with or without a manifest that lists them."""
    (folder / RECORDS).write_bytes(data)
    if listed:
        manifest = json.loads((folder / "manifest.json").read_text())
        del manifest["checksum"]
        manifest["files"][RECORDS] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        (folder / "manifest.json").write_bytes(manifest_bytes(manifest))


@pytest.mark.parametrize(
    ("data", "listed", "said"),
    [
        (gzip.compress(b"{}"), False, "is not the file that was recorded"),
        (b"{}", True, "must be gzipped"),
        (gzip.compress(b"{}")[:-4], True, "must hold a document"),
        (gzip.compress(b" " * (1 << 26) + b"{}"), True, "must hold a document"),
        (gzip.compress(b"[]"), True, "mapping"),
        (gzip.compress(b'{"files": {}}'), True, "must hold members"),
        (gzip.compress(b'{"banks": {}}'), True, "members"),
    ],
    ids=["not recorded", "plain", "cut off", "large", "a list", "other members", "no members"],
)
def test_records_that_are_not_those_of_the_manifest_are_refused(data, listed, said, many, tmp_path):
    import shutil

    folder = Path(shutil.copytree(many, tmp_path / "joint"))
    changed_records(folder, data, listed)
    with pytest.raises(ArtifactError, match=said):
        surgery.load(folder, modules=modules(24))
    with pytest.raises(ArtifactError, match=said):
        surgery.verify(folder)


def test_missing_files_are_named(many, tmp_path):
    import shutil

    for path in (RECORDS, TOGETHER):
        folder = Path(shutil.copytree(many, tmp_path / path.replace("/", "-")))
        (folder / path).unlink()
        with pytest.raises(ArtifactError, match=path):
            surgery.load(folder, modules=modules(24))


def test_tensors_of_no_member_are_refused(many, tmp_path):
    import shutil

    from surgery.artifact.tensorfiles import read_header, read_tensors
    from surgery.safetensors.gathered import write_gathered

    folder = Path(shutil.copytree(many, tmp_path / "joint"))
    path = folder / TOGETHER
    tensors = {name: t.clone() for name, t in read_tensors(path).items()}
    write_gathered(path, {**tensors, "nobody/w": torch.zeros(3)})
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["checksum"]
    data = path.read_bytes()
    manifest["files"][TOGETHER] = {
        "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "header": read_header(path).digest,
    }  # fmt: skip
    (folder / "manifest.json").write_bytes(manifest_bytes(manifest))
    with pytest.raises(ArtifactError, match="nobody/w, which is of no member"):
        surgery.load(folder, modules=modules(24))
