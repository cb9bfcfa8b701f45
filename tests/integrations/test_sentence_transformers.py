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
def test_weights_of_other_modules_are_compared(change, source, tmp_path):
    joint = surgery.join([surgery.load_member(str(source), name="net")])
    out = export(joint, "net", tmp_path / "out", format="transformers")
    assert surgery.verify(out).ok
    (file,) = out.glob("*_Dense/model.safetensors")
    content = file.read_bytes()
    file.unlink()
    if change == "values":
        file.write_bytes(bytes([*content[:-1], content[-1] ^ 1]))
    else:
        file.mkdir()
    with pytest.raises(LoadError, match=r"2_Dense/model.safetensors is another file than was written"):
        SentenceTransformer(str(out), device="cpu")
    assert str(file.relative_to(out)) in surgery.verify(out).files
    if change == "kind":
        file.rmdir()
        AutoModel.from_pretrained(out)  # it has no use for others, which the hub sends one by one
        with pytest.raises(ValueError, match=r"Could not find 'model.safetensors'"):
            SentenceTransformer(str(out), device="cpu")
        assert str(file.relative_to(out)) in surgery.verify(out).files


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "a/../../x.safetensors", "/x/y.safetensors", "x.bin", 5]
)
def test_hashes_name_files_below_alone(name, source, tmp_path):
    assert wrong_beside({name: ""}, tmp_path) == ["it has no hashes of files beside that can be read"]
