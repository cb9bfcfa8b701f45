"""Adapters of random members: whatever differs from a base, peft opens what is written, and it is within the bound."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import peft
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tiny_transformers import save_tiny, tiny
from torch import nn

import surgery
from surgery.artifact.export import export
from surgery.errors import ExportError
from surgery.inputs.probes import outputs_over, probe_inputs, relative_error

NETS = '''
import torch
from torch import nn

class Odd(nn.Module):
    """Names of other names' ends, of regular expressions, and of numbers; tiny layers; a layer that is used twice."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(30, 12)
        self.layers = nn.ModuleDict({
            "0": nn.Linear(12, 12), "a+b": nn.Linear(12, 12, bias=False), "x(1)|y": nn.Linear(12, 12),
            "10": nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12)), "^$": nn.Linear(12, 1),
        })
        self.proj, self.inner = nn.Linear(12, 12), nn.ModuleDict({"proj": nn.Linear(12, 12)})
        self.embed2 = nn.Linear(12, 12)
        self.conv = nn.Conv1d(12, 12, 3, padding=1)
        self.norm = nn.LayerNorm(12)
        self.weight = nn.Parameter(torch.ones(12))
        self.register_buffer("shift", torch.zeros(12))

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers.values():
            x = x + layer(x).tanh()
        x = self.conv(x.mT).mT + self.embed2(x) * self.weight + self.shift
        return self.norm(x + self.embed2(x) + self.proj(self.inner["proj"](x)))

def make():
    return Odd(0), torch.arange(24).view(4, 6) % 30
'''

KINDS = ["odd", "bert", "bert_mlm", "gpt2_classifier", "vit", "llama", "whisper"]
HOW = ["product", "noise", "rows", "vectors"]


def changed(net: nn.Module, choices: dict[int, str], scale: float, seed: int) -> nn.Module:
    """Tensors by number made others: by a product of rank 1, by noise, in a few rows, or where they are vectors."""
    net, generator = copy.deepcopy(net), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for number, (_, each) in enumerate(net.named_parameters()):
            how = choices.get(number)
            if how is None or (each.ndim == 1) != (how == "vectors"):
                continue
            move = torch.randn(each.shape, generator=generator)
            if how == "product" and each.ndim == 2:
                move = move[:, :1] @ move[:1] / each.shape[1] ** 0.5
            elif how == "rows":
                move[2:] = 0
            each += (scale * float(each.float().std().nan_to_num(1)) * move).to(each.dtype)
    return net


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    (folder / "odd_nets.py").write_text(NETS)
    return folder


def base_of(kind: str, dtype: torch.dtype, folder: Path) -> str:
    if kind == "odd":
        return f"{folder}/odd_nets.py:make"
    where = folder / f"{kind}-{str(dtype)[6:]}"
    if not where.exists():
        tiny(kind).to(dtype).save_pretrained(where)
    return str(where)


@pytest.mark.slow  # peft writes and opens an adapter in each
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
# `proj`, with which `inner.proj` ends:
@example("odd", torch.float32, {13: "product"}, 0.3, 0.01, 0)
@example("odd", torch.float32, {1: "rows", 2: "product"}, 0.3, 1e-3, 0)
@example("bert_mlm", torch.float32, {0: "rows"}, 0.3, 1e-3, 0)
@given(
    st.sampled_from(KINDS),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.dictionaries(st.integers(0, 24), st.sampled_from(HOW), min_size=1, max_size=8),
    st.sampled_from([1e-4, 0.05, 0.5]),
    st.sampled_from([1e-4, 0.02, 0.3]),
    st.integers(0, 9),
)
def test_within_the_bound_or_refused(bases, tmp_path, kind, dtype, choices, scale, bound, seed):
    base = base_of(kind, dtype, bases)
    origin = surgery.load_member(base, name="base")
    net = changed(origin.module, choices, scale, seed)
    member = surgery.load_member(net, name="net", inputs=origin.inputs)
    if kind != "odd":
        net.save_pretrained(tmp_path / "tuned")
        member = surgery.load_member(str(tmp_path / "tuned"), name="net")
    joint = surgery.join([member], block=(4, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            folder = export(
                joint, "net", tmp_path / "a", format="lora", base=base, max_error=bound, overwrite=True
            )
        except ExportError as error:
            assert any(
                said in str(error)
                for said in ("nothing for an adapter to say", "must move", "needs a linear layer")
            ), error
            return
        opened = peft.PeftModel.from_pretrained(
            copy.deepcopy(origin.module), folder, autocast_adapter_dtype=False
        ).eval()
    probes = probe_inputs(joint.members["net"])
    plain = joint.extract("net").eval()
    assert relative_error(outputs_over(plain, probes), outputs_over(opened, probes)) <= bound


@pytest.mark.slow
def test_adapters_that_were_cut_off_or_changed(tmp_path: Path):
    base = save_tiny("bert", tmp_path / "base")
    net = changed(tiny("bert"), dict.fromkeys(range(30), "product"), 0.3, 0)
    net.save_pretrained(tmp_path / "tuned")
    joint = surgery.join([surgery.load_member(str(tmp_path / "tuned"), name="net")])
    folder = export(joint, "net", tmp_path / "a", format="lora", base=str(base), max_error=0.05)
    path = folder / "adapter_model.safetensors"
    whole = path.read_bytes()
    for length in (0, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(Exception, match=r"(?i)header|incomplete|deserializ|invalid|small|metadata"):
            peft.PeftModel.from_pretrained(tiny("bert"), folder)
        assert not surgery.verify(folder).ok
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))  # which no library can see
    assert not surgery.verify(folder).ok
    path.write_bytes(whole)
    assert surgery.verify(folder).ok
