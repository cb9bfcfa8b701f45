"""Derivatives in float32 where a dtype is not native to the CPU: near those in the dtype, and nothing else changes."""

import copy

import nets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import surgery
from surgery.fitting import sensitivity, widened
from surgery.fitting.trial import Trial
from surgery.fitting.widened import in_float32, native
from surgery.members.member import owners_of, state_tensors


class Body(nn.Module):
    """Layers of several kinds; `names` is a dtype that its forward asks for."""

    def __init__(self, width, depth, names=None):
        super().__init__()
        self.first, self.last = nn.Linear(6, width), nn.Linear(width, 6)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.last.weight = self.first.weight if width == 6 else self.last.weight  # tied
        self.register_buffer("scale", torch.rand(width) + 0.5)
        self.names = names

    def forward(self, x):
        x = self.first(x)
        for layer in self.layers:
            x = x + torch.relu(layer(x)) * self.scale
        x = self.norm(x)
        return self.last(x if self.names is None else x.to(self.names))


def trial_of(module):
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(5))
    member = surgery.load_member(module, name="net", inputs=x.to(module.first.weight.dtype))
    state, owners = state_tensors(member.module), owners_of(member.module)
    return Trial(
        member, {name: state[name].detach() for name in owners}, owners, [member.inputs], torch.device("cpu")
    )


@pytest.fixture
def software(monkeypatch):
    """A CPU without instructions for narrow dtypes."""
    monkeypatch.setattr(widened, "native", lambda dtype: dtype not in widened.NARROW)


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from([torch.bfloat16, torch.float16]),
    st.sampled_from([6, 16]),
    st.integers(0, 3),
    st.integers(0, 9),
)
def test_sensitivities_are_those_of_the_dtype_and_weights_stay_as_they_are(dtype, width, depth, seed):
    torch.manual_seed(seed)
    trial = trial_of(Body(width, depth).to(dtype))
    trial.module.first.bias.requires_grad_(False)
    before = copy.deepcopy(trial.module.state_dict())
    exact = sensitivity.sensitivities(trial, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(widened, "native", lambda each: each not in widened.NARROW)
        found = sensitivity.sensitivities(trial, seed)
    assert found.keys() == exact.keys() and len(found) >= 2 * depth + 4
    assert all(
        found[name] == pytest.approx(exact[name], rel=0.1) for name in found
    )  # 8 bits, over some layers
    after = trial.module.state_dict()
    nets.assert_same_bits(after, before)
    assert all(torch.equal(nets.bits(after[name]), nets.bits(before[name])) for name in before)
    assert [n for n, p in trial.module.named_parameters() if not p.requires_grad] == ["first.bias"]
    assert all(p.grad is None for p in trial.module.parameters())
    assert (width == 6) == (trial.module.first.weight is trial.module.last.weight)


def test_a_member_that_names_its_dtype_runs_in_it(software):
    torch.manual_seed(0)
    trial = trial_of(Body(16, 1, torch.bfloat16).bfloat16())
    with in_float32(trial) as probes:
        assert probes is trial.probes and trial.module.first.weight.dtype == torch.bfloat16
    assert len(sensitivity.sensitivities(trial, 0)) == 8


def test_weights_are_put_back_after_an_error(software):
    trial = trial_of(Body(16, 1).bfloat16())
    with pytest.raises(KeyError), in_float32(trial) as probes:
        assert trial.module.first.weight.dtype == probes[0].args[0].dtype == torch.float32
        raise KeyError
    assert trial.module.first.weight.dtype == torch.bfloat16


def test_wider_dtypes_and_other_devices_stay(software):
    trial = trial_of(Body(16, 1))
    with in_float32(trial) as probes:
        assert probes is trial.probes
    narrow = trial_of(Body(16, 1).bfloat16())
    narrow.device = torch.device("meta")
    with in_float32(narrow) as probes:
        assert probes is narrow.probes and narrow.module.first.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("onednn", "capability", "instructions", "found"),
    [(True, "AVX512", True, True), (True, "AVX512", False, False), (False, "AVX2", False, False),
     (True, "DEFAULT", False, True), (None, "AVX2", False, True)],
)  # fmt: skip
def test_capabilities_decide(monkeypatch, onednn, capability, instructions, found):
    class Ops:
        if onednn is not None:
            _is_mkldnn_bf16_supported = staticmethod(lambda: onednn)

    monkeypatch.setattr(torch.ops, "mkldnn", Ops, raising=False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: instructions, raising=False)
    assert native(torch.bfloat16) is found
    assert native(torch.float32) and native(torch.int64)


def test_a_fit_where_a_dtype_is_native_asks_for_nothing(monkeypatch):
    monkeypatch.setattr(widened, "native", lambda dtype: True)
    monkeypatch.setattr(Trial, "running_with", lambda *_: pytest.fail("other weights were run"))
    trial = trial_of(Body(16, 1).bfloat16())
    with in_float32(trial) as probes:
        assert probes is trial.probes
