"""What someone meets who exports, loads and uploads for the first time: odd names, odd arguments, spoilt files."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from artifacts import contents, modules, pair
from command_line import surgery as command
from tiny_transformers import save_tiny
from transformers import AutoConfig, GPT2LMHeadModel, GPT2Model

import surgery
from surgery.artifact.exporting import plan_export
from surgery.disk import records
from surgery.disk.untrusted import UnreadableError
from surgery.errors import LoadError, PlanError, SurgeryError, SurgeryWarning, TrainingError


@pytest.fixture(scope="module")
def joint(tmp_path_factory) -> Path:
    return surgery.save(pair(), tmp_path_factory.mktemp("first") / "joint")


@pytest.fixture(scope="module")
def coded(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("coded")
    member = surgery.load_member(str(save_tiny("gpt2", place / "source")), name="net")
    whole = surgery.fit(surgery.join([member]), budget=0.5)
    return surgery.export(whole, "net", place / "coded", format="transformers")


@pytest.mark.parametrize("cache", [2048, "2048", "2KiB", "2 kB"])
def test_a_cache_is_a_number_or_a_size(joint, cache):
    kept = surgery.load(joint, modules=modules(), resident="packed", cache=cache).cache
    assert kept is not None and kept.limit == (2000 if cache == "2 kB" else 2048)


@pytest.mark.parametrize("cache", [-1, True, "much", "", None, 1.5])
def test_other_caches_are_refused(joint, cache):
    with pytest.raises(PlanError, match="a size such as 50MB"):
        surgery.load(joint, modules=modules(), resident="packed", cache=cache)


def test_packed_members_are_not_exported(joint, tmp_path):
    packed = surgery.load(joint, modules=modules(), resident="packed")
    for ask in (surgery.export, plan_export):
        more = (tmp_path / "out",) if ask is surgery.export else ()
        with pytest.raises(TrainingError, match="the artifact's folder"):
            ask(packed, "one", *more)
        with pytest.raises(PlanError, match="found Sequential"):
            ask(torch.nn.Sequential(), "one", *more)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["Übung", "my net", "a" * 201, "..", "net!"])
def test_names_that_no_folder_can_have_are_refused_at_once(name):
    with pytest.raises(LoadError, match="at most 200") as error:
        surgery.load_member(f"{name}=mine.py:build")
    assert len(str(error.value)) < 300
    with pytest.raises(LoadError, match="at most 200"):
        surgery.load_member(torch.nn.Linear(2, 2), name=name, inputs=torch.zeros(1, 2))


def test_long_folders_give_names_that_can_be_saved(tmp_path):
    member = surgery.load_member(str(save_tiny("gpt2", tmp_path / ("x" * 240))))
    assert surgery.save(surgery.join([member]), tmp_path / "joint").is_dir()


def test_a_file_that_cannot_be_read_is_no_traceback(joint, tmp_path, monkeypatch):
    """As where its permissions are somebody else's."""
    surgery.export(joint, "one", tmp_path / "one")

    def refuse(path):
        raise UnreadableError("cannot be read: Permission denied")

    monkeypatch.setattr(records, "sha256_of", refuse)
    report = surgery.verify(tmp_path / "one")
    assert not report.ok and set(report.files.values()) == {"cannot be read: Permission denied"}
    code, _, wrong = command(
        "export", str(joint), "--member", "one", "--out", str(tmp_path / "one"), "--overwrite"
    )
    assert code == 2 and "Traceback" not in wrong and "changed since" in wrong


@pytest.mark.parametrize("part", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_checkpoint_names_its_file(coded, part, tmp_path):
    for name, content in contents(coded).items():
        (tmp_path / name).write_bytes(content)
    weights = tmp_path / "model.safetensors"
    os.truncate(weights, int(part * weights.stat().st_size))
    with pytest.raises(SurgeryError, match=r"damaged.*copy it again"):
        GPT2Model.from_pretrained(tmp_path)


def test_a_checkpoint_without_sums_says_so(coded, tmp_path):
    folder = shutil.copytree(coded, tmp_path / "coded")
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]["sums"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.warns(SurgeryWarning, match="exported before checksums were kept.*export the member again"):
        GPT2LMHeadModel.from_pretrained(folder)


def test_a_configuration_of_codes_beside_ordinary_weights(coded, tmp_path):
    config = AutoConfig.from_pretrained(coded)
    net = GPT2LMHeadModel._from_config(config)
    net.save_pretrained(tmp_path / "kept")  # as with every quantizer of transformers
    with pytest.raises(
        LoadError, match=r"weights are ordinary ones: take `quantization_config` out of config.json"
    ):
        GPT2LMHeadModel.from_pretrained(tmp_path / "kept")
    del net.config.quantization_config
    net.save_pretrained(tmp_path / "plain")
    again = GPT2LMHeadModel.from_pretrained(tmp_path / "plain").state_dict()
    assert all(torch.equal(each, again[name]) for name, each in net.state_dict().items())


def test_the_meta_device_has_shapes_alone(coded):
    found = GPT2Model.from_pretrained(coded, device_map="meta").state_dict()
    wanted = GPT2Model.from_pretrained(coded).state_dict()
    assert {n: (t.shape, t.dtype) for n, t in found.items()} == {
        n: (t.shape, t.dtype) for n, t in wanted.items()
    }
    assert all(each.is_meta for each in found.values())


def test_what_is_uploaded_is_named(tmp_path):
    for place in (tmp_path, tmp_path / "none"):
        with pytest.raises(SurgeryError, match="surgery export"):
            surgery.push_to_hub(place, "me/joint", dry_run=True)
