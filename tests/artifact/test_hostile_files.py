"""Hostile files of artifacts, models and data: one sentence each, before time or memory is spent on them."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import timm
from artifacts import Largest, modules, pair, rewrite
from special_files import special
from tiny_transformers import save_tiny

import surgery
from surgery.artifact import load, save
from surgery.artifact.manifest import read_manifest
from surgery.artifact.sketch import MOST_ELEMENTS, draw
from surgery.artifact.verify import verify
from surgery.disk.untrusted import UnreadableError
from surgery.errors import ArtifactError, LoadError, PlanError
from surgery.inputs.calibration import read_calibration
from surgery.permission import Permission
from surgery.safetensors.header import parse_header
from surgery.settings.recipe import TaskSpec
from surgery.training.tasks.parts import split_rows
from surgery.training.tasks.sources import load_data

BANK = "8x8-float32"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return save(
        pair(files={"config.json": b'{"a": 1}'}), tmp_path_factory.mktemp("made") / "out", recipe={"seed": 1}
    )


@pytest.fixture
def out(made, tmp_path):
    return shutil.copytree(made, tmp_path / "out")


# Artifacts --------------------------------------------------------------------------------------------------


def view(**changes):
    return lambda m: m["views"][0].update(changes)


@pytest.mark.parametrize(("change", "said"), [
    (lambda m: m["banks"][BANK].update(context=10**59), "context: .*a number of about 59 digits"),
    (lambda m: m["banks"][BANK].update(locations=10**59), "locations"),
    (lambda m: m["banks"][BANK].update(block=[2**40, 2**40]), "block"),
    (lambda m: m["banks"][BANK].update(dtype="nn"), "a dtype that torch has, but has 'nn'"),
    (lambda m: m["members"]["one"].update(inputs={"args": [{"float32": [60000, 20000]}]}), "claim 1,200,000,000"),
    (lambda m: m["members"]["one"].update(inputs={"args": [{"float32": [60000]}] * 20000}), "claim 1,200,000,000"),
    (lambda m: m["members"]["one"].update(inputs={"args": [{"int64": [2], "is": [10**59, 1]}]}), "whole numbers"),
    (lambda m: m["members"]["one"].update(inputs={"args": [{"int64": [2], "is": [1]}]}), "has 1 values"),
    (lambda m: m["members"]["one"].update(inputs={"args": [{"nn": [2]}]}), "sketched as"),
    (lambda m: m["members"]["one"].update(same={"x": "plain"}), "under the keys of members"),
    (lambda m: m["members"]["one"].update(ties={"none": ["none", "0.bias"]}), "one must hold none"),
    (lambda m: m.update(report=[1]), "report"),
    (lambda m: m.update(report={"errors": {"one": "large"}}), r"report\.errors\.one"),
    (lambda m: m.update(report={"probes": {"seed": 10**59}}), r"report\.probes\.seed"),
    (lambda m: m.update(report={"hashes": {"one": None}}), r"report\.hashes\.one"),
    (lambda m: m.update(seed=10**59), "seed"),
    (lambda m: m.update(version=[1] * 10**6), r"is of version \[1, 1, 1, 1, ...\]"),
    (lambda m: m["files"].update({"x" * 10**6: m["files"]["README.md"]}), "relative, short"),
    (view(pattern="o i -> 1 o x"), "no pattern to a stack"),
    (view(pattern="o i -> o i"), "no pattern to a stack"),
    (view(pattern="o i -> 1 o o"), "no pattern to a stack"),
    (view(pattern="... -> 1 o i"), "is no pattern"),
    (view(pattern="(" * 10**5), "is no pattern"),
    (view(sizes={"z": 5}), "no pattern to a stack"),
    (view(shape=[2**50, 2**50], sizes={}), "but reach to"),
    (view(shape=[]), "axes"),
])  # fmt: skip
def test_a_manifest_of_impossible_values(out, change, said):
    rewrite(out, change)
    with Largest() as largest, pytest.raises(ArtifactError, match=said) as caught:
        load(out, modules=modules())
    assert largest.nbytes < 1 << 20 and len(str(caught.value)) < 4100


@pytest.mark.parametrize(
    "text", [b"\xff", b"[" * 10**6, b"null", b'{"format": "surgery", "format": "x"}', b"9" * 5000]
)
def test_a_manifest_that_is_no_document(out, text):
    (out / "manifest.json").write_bytes(text)
    with pytest.raises(ArtifactError, match=r"manifest\.json") as caught:
        read_manifest(out)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("kind", ["pipe", "device", "loop", "folder", "large"])
@pytest.mark.parametrize(
    "name",
    [
        "manifest.json",
        "recipe.yaml",
        "members/one/config.json",
        "members/one/weights.safetensors",
        "README.md",
    ],
)
def test_no_file_of_an_artifact_is_waited_for(out, name, kind):
    if kind == "large":
        os.truncate(out / name, 1 << 40)
    else:
        (out / name).unlink()
        special(kind, out / name)
    if name == "manifest.json":
        with pytest.raises(ArtifactError, match=r"manifest\.json"):
            verify(out)
        return
    try:
        assert not verify(out, origins=False).ok
    except ArtifactError as error:
        assert name in str(error)
    if name != "README.md":
        with pytest.raises(ArtifactError, match=Path(name).name):
            load(out, modules=modules())


def test_a_recipe_that_was_changed_is_not_taken(out):
    (out / "recipe.yaml").write_text("seed: 2\n")
    with pytest.raises(ArtifactError, match=r"recipe\.yaml is not the file that was recorded"):
        load(out, modules=modules())


# Tensor files -----------------------------------------------------------------------------------------------


def tensor(dtype="F32", shape=(2,), begin=0, end=8):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize(("header", "said"), [
    ({"a": tensor(), "b": tensor(begin=4, end=12)}, "'b' overlaps 'a'"),
    ({"a": tensor("F128")}, "is of F128"),
    ({"a": tensor(shape=[2**40] * 64)}, "has 8 bytes"),
    ({"a": tensor(shape=[-2])}, "dtype, shape and data_offsets"),
    ({"a": tensor(shape=[1] * 65)}, "dtype, shape and data_offsets"),
    ({"a": {**tensor(), "data_offsets": [10**59, 0]}}, "dtype, shape and data_offsets"),
    ({"a": None}, "says of 'a' None"),
    ({"a": tensor(), "__metadata__": {"x": 1}}, "texts as metadata"),
    ({"a": tensor(begin=8, end=0)}, "has -8 bytes"),
    ([1], "mapping"),
])  # fmt: skip
def test_a_header_is_checked_before_its_file_is_mapped(tmp_path, header, said):
    raw = json.dumps(header).encode()
    (tmp_path / "x").write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(8))
    with pytest.raises(UnreadableError, match=said):
        parse_header(tmp_path / "x")


@pytest.mark.parametrize("length", [0, 7, 2**63, 2**64 - 1, 100_000_001])
def test_a_header_of_a_hostile_length(tmp_path, length):
    (tmp_path / "x").write_bytes(length.to_bytes(8, "little") + b'{"a": 1}')
    with pytest.raises(UnreadableError, match="must begin with a"):
        parse_header(tmp_path / "x")


def test_inputs_of_the_largest_size_are_no_larger():
    with pytest.raises(ValueError, match="at most"):
        draw({"args": [{"bool": [MOST_ELEMENTS, 2]}]})
    assert (
        draw({"args": [{"bool": [3], "is": [1, 0, 1]}, None, "a", {"of": {"b": [1.5]}}]}).args[0].sum() == 2
    )


# Models -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_tiny("bert", folder / "bert")
    net = timm.create_model("test_convnext", num_classes=5)
    timm.models.save_for_hf(net, str(folder / "timm"), safe_serialization=True)
    return folder


def change_config(folder: Path, **changes) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.mark.parametrize(("kind", "changes", "said"), [
    ("bert", {"num_attention_heads": 7}, "attention heads.*config.json"),
    ("bert", {"num_attention_heads": 0}, "config.json"),
    ("bert", {"num_attention_heads": -4}, "config.json|bert"),
    ("bert", {"num_hidden_layers": 10**9}, "at most .* parameters.*config.json"),
    ("bert", {"vocab_size": 10**12}, "tensors of at most .*config.json"),
    ("bert", {"max_position_embeddings": 10**11}, "tensors of at most .*config.json"),
    ("bert", {"hidden_size": 10**59}, "config.json"),
    ("bert", {"architectures": [1]}, "names of its architectures"),
    ("bert", {"model_type": ["bert"]}, "model_type in text"),
    ("bert", {"auto_map": [1]}, "map names to classes"),
    ("timm", {"architecture": ["x"]}, "architecture in text"),
    ("timm", {"num_classes": 10**11, "model_args": {"num_classes": 10**11}}, "tensors of at most .*config.json"),
    ("timm", {"pretrained_cfg": {"input_size": [3, "a", 1]}}, "config.json"),
    ("timm", {"pretrained_cfg": {"input_size": [3, 60000, 20000]}}, "tensors of at most"),
    ("timm", {"pretrained_cfg": 5}, "config.json|options"),
])  # fmt: skip
def test_a_configuration_of_impossible_values(models, tmp_path, kind, changes, said):
    folder = change_config(shutil.copytree(models / kind, tmp_path / kind), **changes)
    with Largest() as largest, pytest.raises(LoadError, match=said):
        surgery.load_member(str(folder))
    assert largest.nbytes < 1 << 29


@pytest.mark.parametrize("kind", ["pipe", "device", "loop", "folder", "large"])
@pytest.mark.parametrize(
    "name", ["bert/config.json", "bert/model.safetensors", "timm/config.json", "timm/model.safetensors"]
)
def test_no_file_of_a_model_is_waited_for(models, tmp_path, name, kind):
    path = shutil.copytree(models / Path(name).parent, tmp_path / Path(name).parent) / Path(name).name
    if kind == "large":
        os.truncate(path, 1 << 40)
    else:
        path.unlink()
        special(kind, path)
    with pytest.raises(LoadError, match=path.name):
        surgery.load_member(str(path.parent))


# Data -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".txt", ".npz", ".safetensors", ".png"])
@pytest.mark.parametrize("kind", ["pipe", "device", "loop"])
def test_no_file_of_data_is_waited_for(models, tmp_path, ending, kind):
    path = special(kind, tmp_path / f"file{ending}")
    member = surgery.load_member(str(models / "timm"))
    with pytest.raises(LoadError, match=f"file{ending}"):
        read_calibration(member, path)
    if ending != ".png":
        path = special(kind, tmp_path / f"data{ending.replace('txt', 'jsonl')}")
        with pytest.raises(LoadError, match=path.name):
            load_data(TaskSpec(data=str(path)), member, 0, Permission.OWN)


def test_a_picture_that_unfolds_to_gigabytes_is_refused(models, tmp_path):
    from PIL import Image

    path = tmp_path / "bomb.png"
    Image.new("1", (8200, 8200)).save(path)
    with pytest.raises(LoadError, match=r"bomb\.png .*pixels"):
        read_calibration(surgery.load_member(str(models / "timm")), path)


def test_arrays_that_unfold_to_terabytes_are_refused(models, tmp_path):
    path = tmp_path / "bomb.npz"
    np.savez_compressed(path, inputs=np.zeros(10))
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:  # the archive's own word for the size, in its directory at the end
        size = archive.infolist()[0].file_size
    at = data.rindex(size.to_bytes(4, "little"))
    path.write_bytes(data[:at] + (2**32 - 2).to_bytes(4, "little") + data[at + 4 :])
    member = surgery.load_member(str(models / "timm"))
    for read in (
        lambda: read_calibration(member, path),
        lambda: load_data(TaskSpec(data=str(path)), member, 0, Permission.OWN),
    ):
        with pytest.raises(LoadError, match=r"bomb\.npz .*claims 4,294,967,294 bytes"):
            read()


@pytest.mark.parametrize("text", ["[" * 5000, '{"text": ' + "9" * 5000 + "}", "\xff"])
def test_rows_that_are_no_documents(models, tmp_path, text):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(LoadError, match=r"rows\.jsonl"):
        load_data(TaskSpec(data=str(path)), surgery.load_member(str(models / "bert")), 0, Permission.OWN)


@pytest.mark.parametrize("value", [[1], None, float("inf"), float("nan"), 10**400, "a", True, -1])
def test_options_of_data_are_numbers(value):
    with pytest.raises(PlanError, match=r"must be a number of examples|must be left"):
        split_rows(10, {"test": value}, 0)
    assert len(split_rows(10, {"test": 0.3}, 0)["test"]) == 3
