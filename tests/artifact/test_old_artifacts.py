"""Artifacts of earlier versions load bit for bit: one of each way of sharing, written by the code of 2026-11-26."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
import torch
from places import DATA
from torch import nn

import surgery
from surgery.members.member import content_hash

ARCHIVE = DATA / "artifacts_1.zip"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("old")
    with zipfile.ZipFile(ARCHIVE) as archive:
        archive.extractall(out)
    return out


def live_modules() -> dict[str, nn.Module]:
    """Architectures of the artifact whose members were live modules."""

    def net() -> nn.Module:
        layers = nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)
        return nn.Sequential(*layers)

    return {"one": net(), "two": net()}


@pytest.mark.parametrize("name", ["exact", "fitted", "hypermodules", "templates", "timm", "trained"])
def test_an_old_artifact_loads_and_is_written_again(name: str, folder: Path, tmp_path: Path):
    expected = json.loads((folder / "hashes.json").read_text())[name]
    modules = live_modules() if name == "hypermodules" else None
    report = surgery.verify(folder / name, modules=modules)
    assert not report.files and all(check.rebuilt for check in report.members)
    joint = surgery.load(folder / name, modules=modules)
    assert {member: content_hash(joint.collapse(member)) for member in joint.names} == expected
    surgery.save(joint, tmp_path / "again")
    again = surgery.load(tmp_path / "again", modules=live_modules() if modules else None)
    for member in joint.names:
        one, other = joint.collapse(member), again.collapse(member)
        assert list(one) == list(other)
        assert all(torch.equal(one[key], other[key]) for key in one)
