"""compressed-tensors' packed integers: value for value ours, opened by transformers with that package."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from compressed_tensors.compressors.pack_quantized import pack_to_int32
from hypothesis import given
from hypothesis import strategies as st
from test_transformers import coded
from tiny_transformers import TINY, save_tiny
from torch import nn

import surgery
from surgery.artifact.export import export
from surgery.artifact.formats import compressed_tensors
from surgery.artifact.formats.compressed_tensors import (
    merged_layers,
    packed_words,
    patterns,
    plan_packing,
    server_rules,
    tie,
    write_compressed_tensors,
)
from surgery.errors import ExportError, PlanError
from surgery.storage.codecs import Grouping, Precision, encode
from surgery.storage.keys import PlainKey
from surgery.storage.states import state_of
from surgery.storage.stored import Stored


@given(st.integers(2, 8), st.integers(1, 5), st.integers(1, 130), st.integers(0, 99))
def test_words_are_those_of_the_package(bits, rows, columns, seed):
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=torch.Generator().manual_seed(seed))
    theirs = pack_to_int32((codes - (1 << (bits - 1))).to(torch.int8), bits)
    assert torch.equal(packed_words(codes.to(torch.uint8), bits), theirs)


LAYERS = [f"model.layers.{i}.{name}" for i in (0, 1, 10) for name in (
    "attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"
)]  # fmt: skip


@given(st.dictionaries(st.sampled_from(LAYERS), st.integers(2, 8)))
def test_tied_widths_are_taken_by_servers(bits):
    packed = {name: Grouping(each, 64) for name, each in bits.items()}
    tied, apart = tie(packed, LAYERS)
    assert {*tied, *apart} == {*packed} and not {*tied} & {*apart}
    assert all(each.bits >= packed[name].bits for name, each in tied.items())
    groups = {
        str(bits): {
            "targets": patterns([name for name, each in tied.items() if each.bits == bits], "model."),
            "weights": {"num_bits": bits, "group_size": 64},
        }
        for bits in (4, 8)
    }
    said = {"config_groups": groups, "ignore": patterns([x for x in LAYERS if x not in tied], "model.")}
    assert server_rules(said, LAYERS) == []


@given(st.sets(st.sampled_from(LAYERS)), st.sampled_from(["", "model.", "other.model."]))
def test_patterns_match_their_layers_alone(names, prefix):
    found = patterns(sorted(names), "model.")
    for name in LAYERS:
        there = prefix + name.removeprefix("model.")
        assert any(re.match(each.removeprefix("re:"), there) for each in found) == (name in names)


def test_what_servers_would_misread_is_named():
    weights = {"num_bits": 5, "group_size": 64}
    said = {
        "config_groups": {"group_0": {"targets": patterns(LAYERS[:1]), "weights": weights}},
        "ignore": patterns(LAYERS[2:]),
    }
    bad = server_rules(said, LAYERS)
    assert bad[0] == "model.layers.0.attn.k_proj is neither a target nor ignored"
    assert "q_proj has 5 bits, where kernels have 4 or 8" in bad[1]
    assert "q_proj 5 bits, model.layers.0.attn.k_proj as it is" in bad[2] and len(bad) == 3
    assert len(merged_layers(LAYERS)) == 15


def mixed(joint: surgery.JointModel) -> Stored:
    """Matrices of several widths: of each of which the format holds, and of 10 bits."""
    stored, tensors = coded(joint), {}
    for number, (key, each) in enumerate(stored.tensors.items()):
        bits = (2, 3, 4, 5, 6, 7, 8, 8, 10)[number % 9]
        if isinstance(key, PlainKey) and len(each.shape) == 2:
            from surgery.storage.codecs import decode

            each = encode(decode(each), Precision.parse(f"int{bits}/16"))
        elif isinstance(key, PlainKey) and each.shape == (64,):
            each = encode(each.parts[""], Precision.parse("bfloat16"))
        tensors[key] = each
    return Stored(stored.plan, tensors, stored.aliases, stored.ties)


@pytest.mark.parametrize("tie_widths", [False, True])
@pytest.mark.parametrize("kind", ["bert_mlm", "llama", "vit", "whisper"])
def test_opened_by_transformers(kind, tie_widths, tmp_path: Path):
    joint = surgery.join([surgery.load_member(str(save_tiny(kind, tmp_path / "source")), name="net")])
    stored, member = mixed(joint), joint.members["net"]
    packing, module = plan_packing(stored, member, tie_widths, False)
    (folder := tmp_path / "packed").mkdir()
    write_compressed_tensors(folder, packing, module, stored, member)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert "dequantize" not in config and "run_compressed" not in config
    linear = [name for name, each in module.named_modules() if isinstance(each, nn.Linear)]
    if tie_widths:
        assert server_rules(config, linear) == []
    loaded = getattr(transformers, TINY[kind][0]).from_pretrained(folder)
    wanted = joint.extract("net")
    wanted.load_state_dict(state_of(stored, "net"))
    inputs = member.inputs
    with torch.no_grad():
        theirs = loaded(*inputs.args, **inputs.kwargs)
        ours = wanted(*inputs.args, **inputs.kwargs)
    for name, value in wanted.named_parameters():
        assert torch.equal(loaded.get_parameter(name), value), name
    assert torch.equal(theirs[0], ours[0])
    assert (
        sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        < sum(packing.sizes.values()) + 30_000
    )


def test_said_before_anything_is_written(tmp_path):
    joint = surgery.join([surgery.load_member(str(save_tiny("bert", tmp_path / "source")), name="net")])
    joint = surgery.fit(joint, max_error=0.1)
    said = []

    def say(line):
        assert not (tmp_path / "out").exists()
        said.append(line)

    folder = export(joint, "net", tmp_path / "out", format="compressed-tensors", say=say)
    assert (folder / "model.safetensors").exists()
    text = "\n".join(said)
    assert re.search(r"packed, \d bits, a scale for \d+ values \(\d layers?, .*\): encoder.layer.0", text)
    assert "of Embedding, where weights of Linear are packed" in text


@pytest.mark.parametrize("kind", ["t5", "bert_mlm", "vit_mae"])
def test_a_plan_says_what_a_class_cannot_open(kind, tmp_path, monkeypatch):
    net = surgery.load_member(str(save_tiny(kind, tmp_path / kind)), name="net")
    stored = mixed(surgery.join([net]))
    said = ""
    try:
        assert not plan_packing(stored, net, False, False)[0].open_question
    except ExportError as error:
        said = str(error)
    reads = (
        r"transformers must open what is written .* raises .*its class reads weights that are packed; export"
    )
    assert bool(re.match(reads, said)) == (kind == "t5"), said
    monkeypatch.setattr(compressed_tensors, "check_outline", lambda *_: "")
    packing, module = plan_packing(stored, net, False, False)
    found = ""
    try:
        write_compressed_tensors(tmp_path, packing, module, stored, net)
    except ExportError as error:
        found = str(error)
    assert found == said


def test_what_outlines_cannot_tell_is_said(tmp_path, monkeypatch):
    net = surgery.load_member(str(save_tiny("bert", tmp_path / "source")), name="net")

    def values(self, module):
        if hasattr(module, "weight_packed"):
            raise RuntimeError("values are needed")

    monkeypatch.setattr(transformers.BertModel, "_init_weights", values)
    packing, _ = plan_packing(mixed(surgery.join([net])), net, False, False)
    said = "whether BertModel opens it is seen when it is written: without values it raises "
    assert packing.lines()[-1] == f"{said}RuntimeError: values are needed"


@pytest.mark.slow
def test_what_cannot_be_packed(tmp_path):
    joint = surgery.join([surgery.load_member(str(save_tiny("bert", tmp_path / "source")), name="net")])
    with pytest.raises(ExportError, match="stored in 2 to 8 bits, but member 'net' has none"):
        export(joint, "net", tmp_path / "out", format="compressed-tensors")
    with pytest.raises(PlanError, match="`tie_widths` is for the format compressed-tensors, found plain"):
        export(joint, "net", tmp_path / "out", tie_widths=True)
    assert not (tmp_path / "out").exists()
