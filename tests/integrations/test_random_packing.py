"""Packed exports of random members: whatever has which width, the package opens it, with values equal bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_transformers import coded
from tiny_transformers import TINY, save_tiny, tiny
from torch import nn

import surgery
from surgery.artifact.formats.compressed_tensors import (
    Packing,
    configuration,
    plan_packing,
    server_rules,
    write_compressed_tensors,
)
from surgery.errors import ExportError
from surgery.storage.codecs import Grouping, Precision, decode, encode
from surgery.storage.keys import PlainKey
from surgery.storage.states import state_of
from surgery.storage.stored import Stored

STEPS = [
    "0",
    "1",
    "10",
    "a+b",
    "x(1)|y",
    "q_proj",
    "k_proj",
    "^$",
    "re:a",
    "[ab]",
    "up_proj",
    "w1",
    "query",
    "é",
    "a\\b",
]


class Named(nn.Module):
    """Linear layers of given names, in modules of modules."""

    def __init__(self, names: list[tuple[str, ...]], prefix: str):
        super().__init__()
        self.base_model_prefix = prefix
        for steps in names:
            here: nn.Module = self
            for step in steps[:-1]:
                if step not in here._modules:
                    here.add_module(step, nn.Module())
                here = here._modules[step]  # pyright: ignore
            if steps[-1] not in here._modules:
                here.add_module(steps[-1], nn.Linear(64, 8, bias=False))


@given(
    st.lists(st.lists(st.sampled_from(STEPS), min_size=1, max_size=3).map(tuple), min_size=1, max_size=9),
    st.sampled_from(["", "0", "a+b", "model"]),
    st.data(),
)
def test_targets_are_understood_by_the_package(names, prefix, data):
    net = Named(names, prefix)
    linear = [name for name, each in net.named_modules() if isinstance(each, nn.Linear)]
    widths = {
        name: Grouping(bits, group)
        for name in linear
        if (bits := data.draw(st.sampled_from([0, 0, 2, 3, 4, 5, 8])))
        and (group := data.draw(st.sampled_from([16, 64])))
    }
    said = configuration(Packing(widths, {}, {}), net)
    json.dumps(said)
    if not widths:
        return
    apply_quantization_config(net, QuantizationConfig.model_validate(said))
    for name in linear:
        scheme = getattr(net.get_submodule(name), "quantization_scheme", None)
        found = None if scheme is None else Grouping(scheme.weights.num_bits, scheme.weights.group_size)
        assert found == widths.get(name), (name, said)
    assert not any("neither" in each for each in server_rules(said, linear))


KINDS = ["bert", "bert_mlm", "gpt2", "vit", "llama", "whisper", "wav2vec2", "clip"]


@pytest.mark.slow  # transformers opens a checkpoint in each
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    st.sampled_from(KINDS),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.lists(
        st.tuples(st.sampled_from([2, 3, 4, 5, 6, 7, 8, 10, 12, 16]), st.sampled_from([5, 8, 16, 32, 64])),
        min_size=1, max_size=5,
    ),
    st.booleans(),
)  # fmt: skip
def test_values_are_equal_bit_for_bit_or_it_is_refused(tmp_path_factory, kind, dtype, widths, tie_widths):
    folder = tmp_path_factory.mktemp("random")
    tiny(kind).to(dtype).save_pretrained(folder / "source")
    member = surgery.load_member(str(folder / "source"), name="net")
    stored = coded(surgery.join([member]))
    tensors, number = {}, 0
    for key, each in stored.tensors.items():
        if isinstance(key, PlainKey) and len(each.shape) > 1:
            bits, group = widths[number % len(widths)]
            text, number = "bfloat16" if bits == 16 else f"int{bits}/{group}", number + 1
            each = encode(decode(each), Precision.parse(text))
        tensors[key] = each
    stored = Stored(stored.plan, tensors, stored.aliases, stored.ties, stored.extra)
    (out := folder / "packed").mkdir()
    try:
        packing, module = plan_packing(stored, member, tie_widths, False)
        write_compressed_tensors(out, packing, module, stored, member)
    except ExportError as error:
        assert "stored in 2 to 8 bits" in str(error) or "reads weights that are packed" in str(error)
        return
    state = state_of(stored, "net")
    loaded = getattr(transformers, TINY[kind][0]).from_pretrained(out, dtype="auto")
    with torch.no_grad():
        net = surgery.load_member(str(folder / "source"), name="again").module
        net.load_state_dict(state)
        inputs = member.inputs
        mine, theirs = net(*inputs.args, **inputs.kwargs), loaded(*inputs.args, **inputs.kwargs)
    for name, value in net.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert torch.equal(mine[0], theirs[0])


@pytest.mark.slow
def test_checkpoints_that_were_cut_off_or_changed(tmp_path: Path):
    member = surgery.load_member(str(save_tiny("bert", tmp_path / "source")), name="net")
    joint = surgery.join([member])
    joint = surgery.fit(joint, max_error=0.1)
    folder = surgery.export(joint, "net", tmp_path / "out", format="compressed-tensors")
    kind = transformers.BertModel
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for length in (0, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(Exception, match=r"(?i)header|incomplete|deserializ|invalid|small|metadata"):
            kind.from_pretrained(folder)
        assert not surgery.verify(folder).ok
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))  # which no library can see
    assert not surgery.verify(folder).ok
    path.write_bytes(whole)
    config = json.loads((folder / "config.json").read_text())
    groups = config["quantization_config"]["config_groups"]
    for group in groups.values():
        group["weights"]["num_bits"] = 11 - group["weights"]["num_bits"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(Exception, match=r"(?i)size|shape|bits|view"):
        kind.from_pretrained(folder)(torch.arange(4)[None])
