"""Large models whose weights are not to be read: found from their configuration and headers, merged experts too."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import MixtralConfig, MixtralForCausalLM

from surgery.anatomy.sites import discover
from surgery.errors import LoadError
from surgery.inputs import candidates
from surgery.members import references
from surgery.members.origins import transformers_weights


@pytest.fixture(autouse=True)
def _all_are_large(monkeypatch):
    for module, name in ((references, "READ"), (transformers_weights, "READ"), (candidates, "_CPU_LIMIT")):
        monkeypatch.setattr(module, name, 0)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixtral")
    config = MixtralConfig(
        hidden_size=32, num_hidden_layers=2, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=3, vocab_size=64, max_position_embeddings=64, torch_dtype="bfloat16",
    )  # fmt: skip
    MixtralForCausalLM(config).bfloat16().save_pretrained(folder)
    assert any(".experts.2." in name for name in load_file(folder / "model.safetensors"))  # one by one
    return folder


@pytest.fixture
def mixtral(saved, tmp_path):
    for path in saved.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def test_what_is_found_is_what_is_found_with_weights_and_none_is_read(mixtral):
    whole = references.load_member(str(mixtral), name="m")
    outline = references.load_member(str(mixtral), name="m", read=False)
    assert all(p.is_meta for p in outline.module.parameters())
    assert not any(b.is_meta for b in outline.module.buffers())
    for one, other in zip(outline.module.buffers(), whole.module.buffers(), strict=True):
        assert torch.equal(one, other)
    assert outline.origin == whole.origin and outline.files == whole.files
    found, expected = discover(outline), discover(whole)
    assert found.sites == expected.sites and found.left_alone == expected.left_alone
    assert any(site.view.shape[0] == 3 for site in found.sites)  # the experts, merged


def test_tensors_that_are_missing_are_named(mixtral):
    tensors = load_file(mixtral / "model.safetensors")
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    save_file(tensors, mixtral / "model.safetensors", {"format": "pt"})
    with pytest.raises(LoadError, match=r"model\.layers\.1\.self_attn\.q_proj\.weight"):
        references.load_member(str(mixtral), read=False)


def test_a_model_that_has_to_be_read_is_read(mixtral, monkeypatch):
    real = transformers_weights._from_pretrained

    def only_with_files(kind, where, *rest):
        if "state_dict" in rest[-1]:
            raise transformers_weights._UnableError("needs values")
        return real(kind, where, *rest)

    monkeypatch.setattr(transformers_weights, "_from_pretrained", only_with_files)
    member = references.load_member(str(mixtral), read=False)
    assert not any(p.is_meta for p in member.module.parameters())
    monkeypatch.setattr(transformers_weights, "_from_pretrained", real)
    ran = references._member

    def computes(name, loaded, *rest, **options):
        if any(p.is_meta for p in loaded.module.parameters()):
            raise LoadError("computes with values")
        return ran(name, loaded, *rest, **options)

    monkeypatch.setattr(references, "_member", computes)
    member = references.load_member(str(mixtral), read=False)
    assert not any(p.is_meta for p in member.module.parameters())
