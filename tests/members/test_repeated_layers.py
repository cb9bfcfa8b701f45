"""Repeated layers: tensors that a class does not tie, and numbers of layers that a configuration does not say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
import transformers
from artifacts import seeded
from safetensors.torch import load_file, save_file
from test_dtypes import as_in_file
from tiny_transformers import TINY
from torch import nn

import surgery
from surgery.artifact.export import export
from surgery.artifact.folder import load, save
from surgery.artifact.verify import verify
from surgery.errors import LoadError
from surgery.members.origins.layers import correct_layers, say_layers
from surgery.members.references import load_member

LAYERS = {
    "bert": ("num_hidden_layers", "encoder.layer"),
    "gpt2": ("n_layer", "transformer.h"),
    "llama": ("num_hidden_layers", "model.layers"),
    "t5": ("num_layers", "encoder.block"),
    "vit": ("num_hidden_layers", "vit.layers"),
}


def deep(kind: str, layers: int = 4) -> nn.Module:
    name, config, arguments = TINY[kind]
    arguments = {**arguments, LAYERS[kind][0]: layers}
    return seeded(lambda: getattr(transformers, name)(getattr(transformers, config)(**arguments)))


def path_of(module: nn.Module, kind: str) -> str:
    """Where the layers are: their place differs between versions of transformers."""
    own = LAYERS[kind][1]
    paths = [path for path, part in module.named_modules() if isinstance(part, nn.ModuleList)]
    return own if own in paths else next(path for path in paths if len(module.get_submodule(path)) > 1)


def put_layers(module: nn.Module, kind: str, order: list[int]) -> str:
    path = path_of(module, kind)
    holder, _, name = path.rpartition(".")
    layers = module.get_submodule(path)
    setattr(module.get_submodule(holder), name, nn.ModuleList([layers[i] for i in order]))
    return path


@pytest.mark.parametrize("kind", [*LAYERS])
def test_layers_given_twice_are_written_twice(tmp_path: Path, kind: str):
    module = deep(kind)
    # T5's first layer has a bias of its own, which a class builds nowhere else.
    put_layers(module, kind, [0, 1, 1, 1] if kind == "t5" else [0, 1, 0, 1])
    member = load_member(module, name="m")
    expected = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    joint = surgery.join([member], block=(8, 8))
    out = save(joint, tmp_path / "joint")
    for source, place in ((joint, "live"), (out, "read")):
        plain = export(source, "m", tmp_path / place)
        again = load_member(str(plain), name="m").module.state_dict()
        assert again.keys() == expected.keys()
        assert all(torch.equal(again[key], expected[key]) for key in expected)
    assert verify(out, origins=True).ok


@pytest.mark.parametrize("kind", [*LAYERS])
@pytest.mark.parametrize("says, holds", [(4, 2), (2, 4)])
def test_a_folder_whose_configuration_says_another_number_of_layers(
    tmp_path: Path, kind: str, says: int, holds: int
):
    deep(kind, holds).save_pretrained(tmp_path / "m")
    path, key = tmp_path / "m" / "config.json", LAYERS[kind][0]
    config = json.loads(path.read_text())
    path.write_text(
        json.dumps({**config, key: says} | ({"layer_types": None} if "layer_types" in config else {}))
    )
    with pytest.raises(
        LoadError, match=rf"config\.json says {key} = {says}, but the tensors hold {holds} in "
    ):
        load_member(str(tmp_path / "m"), name="m")


@pytest.mark.parametrize("kind", [*LAYERS])
@pytest.mark.parametrize("order", [[0, 1], [0, 1, 2, 3, 2, 3]])
def test_layers_cut_or_repeated_with_the_configuration_unchanged(tmp_path: Path, kind: str, order: list[int]):
    deep(kind).save_pretrained(tmp_path / "m")
    member = load_member(str(tmp_path / "m"), name="m")
    path = put_layers(member.module, kind, order)
    said = rf"{LAYERS[kind][0]} = 4, but the tensors hold {len(order)} in {path}"
    joint = surgery.join([member], block=(8, 8))
    expected = {name: tensor.clone() for name, tensor in joint.collapse("m").items()}
    with pytest.warns(UserWarning, match=said):
        plain = export(joint, "m", tmp_path / "plain")
    again = load_member(str(plain), name="m").module.state_dict()
    assert again.keys() == expected.keys() and all(torch.equal(again[k], expected[k]) for k in expected)
    with pytest.warns(UserWarning, match=said):
        out = save(joint, tmp_path / "joint")
    found = load(out).collapse("m")
    assert found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in expected)


def test_timm_weights_with_fewer_blocks(tmp_path: Path):
    state = seeded(lambda: timm.create_model("test_vit")).state_dict()
    blocks = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    save_file(
        {k: t for k, t in state.items() if f"blocks.{blocks - 1}." not in k}, tmp_path / "w.safetensors"
    )
    said = rf"The model has {blocks} layers in blocks, but the tensors hold {blocks - 1}\."
    with pytest.raises(LoadError, match=said):
        load_member(f"m=timm:test_vit={tmp_path / 'w.safetensors'}")


def test_heads_tied_by_hand_are_written_in_full(tmp_path: Path):
    name, config, arguments = TINY["llama"]
    made = {**arguments, "tie_word_embeddings": False}
    module = seeded(lambda: getattr(transformers, name)(getattr(transformers, config)(**made)))
    module.lm_head.weight = module.model.embed_tokens.weight
    joint = surgery.join([load_member(module, name="m")], block=(8, 8))
    plain = export(joint, "m", tmp_path / "plain")
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= {*load_file(plain / "model.safetensors")}
    as_in_file(load_member(str(plain), name="m").module, plain)


def test_another_head_is_said_in_a_plain_export(tmp_path: Path):
    deep("vit", 1).save_pretrained(tmp_path / "m")
    member = load_member(str(tmp_path / "m"), name="m")
    member.module.classifier = nn.Linear(32, 7, bias=False)
    joint = surgery.join([member], block=(8, 8))
    with pytest.warns(UserWarning, match=r"not what its configuration builds.*classifier\.weight \(7, 32\)"):
        plain = export(joint, "m", tmp_path / "plain")
    assert load_file(plain / "model.safetensors")["classifier.weight"].shape == (7, 32)


def test_numbers_of_layers_in_nested_configurations():
    config = {"num_hidden_layers": 2, "text_config": {"num_hidden_layers": 3, "layer_types": ["a", "a", "b"]}}
    built = [f"text_model.layers.{i}.w" for i in range(3)] + [f"vision_model.layers.{i}.w" for i in range(2)]
    changed, notes = correct_layers(config, built, [name for name in built if ".2." not in name])
    assert changed["text_config"] == {"num_hidden_layers": 2, "layer_types": ["a", "a"]}
    assert changed["num_hidden_layers"] == 2 and len(notes) == 1
    assert say_layers({}, built, built) == []
