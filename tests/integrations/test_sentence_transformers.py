"""Folders of sentence-transformers are members: pooling, dense layers and normalisation come along."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer, models
from tiny_transformers import tiny
from transformers import AutoModel, BertTokenizerFast

import surgery
from surgery.artifact.export import export
from surgery.artifact.sums import wrong_beside
from surgery.errors import LoadError

SENTENCES = ["a b c", "b b", "c a d d"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sentences")
    tiny("bert").save_pretrained(folder / "bert")
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcd"]))
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder / "bert")
    dense = models.Dense(32, 12, activation_function=torch.nn.Tanh())
    parts = [models.Transformer(str(folder / "bert")), models.Pooling(32, "max"), dense, models.Normalize()]
    SentenceTransformer(modules=parts, device="cpu").save(str(folder / "model"))
    return folder / "model"


def embeddings(folder: Path) -> np.ndarray:
    return SentenceTransformer(str(folder), device="cpu").encode(SENTENCES)


@pytest.mark.parametrize("format", ["plain", "transformers"])
def test_exports_give_the_same_embeddings(format, source, tmp_path):
    joint = surgery.join([surgery.load_member(str(source), name="net")])
    wanted = embeddings(source)
    assert wanted.shape == (3, 12) and np.allclose(np.linalg.norm(wanted, axis=1), 1)
    out = surgery.save(joint, tmp_path / "joint")
    for each in (joint, out, surgery.load(out)):
        found = embeddings(export(each, "net", tmp_path / "out", format=format, overwrite=True))
        assert np.array_equal(found, wanted)


def test_weights_of_modules_that_were_pickled(source, tmp_path):
    import shutil

    folder = shutil.copytree(source, tmp_path / "older")
    (dense,) = folder.glob("*_Dense")
    torch.save(load_file(dense / "model.safetensors"), dense / "pytorch_model.bin")
    (dense / "model.safetensors").unlink()
    joint = surgery.join([surgery.load_member(str(folder), name="net")])
    out = export(joint, "net", tmp_path / "out")
    assert not list(out.rglob("*.bin"))
    assert np.array_equal(embeddings(out), embeddings(source))
    (dense / "pytorch_model.bin").write_bytes(pickle.dumps(Path))
    with pytest.raises(LoadError, match=r"must hold the weights of a module of sentence-transformers"):
        surgery.load_member(str(folder), name="net")


@pytest.mark.parametrize("change", ["values", "kind"])
@pytest.mark.parametrize("name", ["2_Dense/model.safetensors", "1_Pooling/config.json", "modules.json"])
def test_what_other_modules_are_made_of_is_compared(name, change, source, tmp_path):
    joint = surgery.join([surgery.load_member(str(source), name="net")])
    out = export(joint, "net", tmp_path / "out", format="transformers")
    assert surgery.verify(out).ok
    file = out / name
    content = file.read_bytes()
    file.unlink()
    if change == "kind" and name != "modules.json":
        file.mkdir()
    elif change == "kind":
        file.symlink_to(source / name)  # as the hub's client has it
        SentenceTransformer(str(out), device="cpu")
        return
    elif name.endswith("json"):  # one that another model could have
        other = content.replace(b'"max"', b'"mean"').replace(b"\n", b" \n", 1)
        file.write_bytes(other)
        assert other != content
    else:
        file.write_bytes(bytes([*content[:-1], content[-1] ^ 1]))
    with pytest.raises(LoadError, match=f"{name} is another file than was written"):
        SentenceTransformer(str(out), device="cpu")
    assert name in surgery.verify(out).files
    if change == "kind":
        file.rmdir()
        AutoModel.from_pretrained(out)  # it has no use for others, which the hub sends one by one
        with pytest.raises((ValueError, TypeError)):  # its own modules ask for it
            SentenceTransformer(str(out), device="cpu")
        assert name in surgery.verify(out).files


def test_without_the_list_of_modules(source, tmp_path):
    """SentenceTransformer would take the mean of tokens; the hub's cache has what was asked for."""
    joint = surgery.join([surgery.load_member(str(source), name="net")])
    out = export(joint, "net", tmp_path / "models--me--net" / "out", format="transformers")
    (out / "modules.json").unlink()
    with pytest.raises(LoadError, match=r"there is no modules.json"):
        SentenceTransformer(str(out), device="cpu")
    (tmp_path / "snapshots").mkdir()
    AutoModel.from_pretrained(out.rename(tmp_path / "snapshots" / "1a"))


def test_settings_may_be_changed(source, tmp_path):
    joint = surgery.join([surgery.load_member(str(source), name="net")])
    out = export(joint, "net", tmp_path / "out", format="transformers")
    for file in out.glob("*sentence*.json"):
        file.write_bytes(file.read_bytes() + b" ")
    assert np.array_equal(embeddings(out), embeddings(source))


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "a/../../x.json", "/x/y.safetensors", "x.bin", "config.json", 5]
)
def test_hashes_name_files_below_alone(name, source, tmp_path):
    assert wrong_beside({name: ""}, tmp_path) == ["it has no hashes of files beside that can be read"]
