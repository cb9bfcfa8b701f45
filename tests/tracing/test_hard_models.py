"""Some forty models that are hard to trace or to take apart: each to a graph, joined, run, and back, exactly."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.utils import parametrizations

from benchmarks.coverage.check import describe, round_trip
from benchmarks.coverage.shrink import shrunk_model
from surgery.anatomy.sites import discover
from surgery.inputs import example_inputs
from surgery.members.member import Inputs, Member, Origin

X = torch.randn(2, 7, 12, generator=torch.Generator().manual_seed(0))

TIMM = {  # name -> a side of its inputs and options that make it small
    "nf_resnet26": (64, {}), "nfnet_f0": (64, {}), "sequencer2d_s": (None, {}), "levit_128s": (None, {}),
    "samvit_base_patch16_224": (None, {}), "mvitv2_tiny": (None, {}),
    "hiera_tiny_224": (None, {"stages": (1, 1, 2, 1)}), "twins_pcpvt_small": (None, {"depths": (1, 1, 2, 1)}),
    "mobilevit_xxs": (64, {}), "tiny_vit_5m_224": (None, {"depths": (1, 1, 2, 1)}), "convnext_atto": (64, {}),
    "tf_efficientnet_lite0": (64, {}), "test_vit": (None, {}),
}  # fmt: skip
TRANSFORMERS = (
    "gpt2", "bert", "t5", "bart", "llama", "qwen2", "falcon", "mixtral", "deepseek_v3", "mamba", "rwkv", "jamba",
    "falcon_h1", "wav2vec2", "encodec", "longformer", "xlnet", "clip", "vit", "swin", "detr", "whisper", "sam",
    "qwen2_vl",
)  # fmt: skip
UNUSED = {"xlnet": 0.01, "whisper": 0.0}  # the share of the parameters that the model itself never uses


def check(member, skipped=0.0, sites=True):
    """Traced to a graph, every parameter accounted for, and exact."""
    anatomy = discover(member)
    assert "table" not in anatomy.tier, anatomy.notes
    shares = describe(anatomy, member)
    assert shares["skipped"] <= skipped, shares["why_skipped"]
    exact = round_trip(member, anatomy)
    assert exact.outputs and exact.state and exact.joined == sites
    return anatomy


LARGE = {
    "sequencer2d_s", "samvit_base_patch16_224", "nfnet_f0", "mvitv2_tiny", "falcon_h1", "detr", "qwen2_vl", "swin_t",
    "raft_large", "nf_resnet26", "jamba", "longformer", "hiera_tiny_224", "twins_pcpvt_small",
}  # fmt: skip


def but_large(names):
    """All names, those of large models in the slow tests."""
    return [pytest.param(each, marks=pytest.mark.slow if each in LARGE else ()) for each in names]


@pytest.mark.parametrize("name", but_large(TIMM))
def test_hard_models_of_timm_join_and_collapse_exactly(name):
    torch.manual_seed(0)
    size, options = TIMM[name]
    module = timm.create_model(name, **options).eval()
    side = (size, size) if size else module.pretrained_cfg["input_size"][1:]
    check(Member(name, module, Inputs((torch.randn(1, 3, *side),)), Origin("timm", name, name)))


@pytest.mark.slow
def test_timm_with_few_layers():
    """The smallest of its kind has 167 million parameters."""
    torch.manual_seed(0)
    module = timm.create_model("gemma4_vit_167m", depth=2, img_size=(96, 96)).eval()
    check(Member("m", module, Inputs((torch.randn(1, 3, 96, 96),)), Origin("timm", "gemma4_vit_167m", "m")))


@pytest.mark.parametrize("name", but_large(TRANSFORMERS))
def test_hard_models_of_transformers_join_and_collapse_exactly(name):
    module = shrunk_model(name)
    origin = Origin("transformers", name, type(module).__name__)
    check(Member(name, module, example_inputs(module, origin), origin), UNUSED.get(name, 0.0))


@pytest.mark.parametrize("name", but_large(["swin_t", "raft_large"]))
def test_hard_models_of_torchvision_join_and_collapse_exactly(name):
    torch.manual_seed(0)
    pair = torch.rand(1, 3, 128, 128), torch.rand(1, 3, 128, 128)
    inputs = pair if name == "raft_large" else (torch.zeros(1, 3, 64, 64),)
    module = torchvision.models.get_model(name, weights=None).eval()
    check(Member(name, module, Inputs(inputs), Origin("module", name, type(module).__name__)))


class Tied(nn.Module):
    """One weight in three places: two layers, and one module under two names."""

    def __init__(self):
        super().__init__()
        self.into, self.one, self.two, self.out = (
            nn.Linear(12, 16),
            nn.Linear(16, 16),
            nn.Linear(16, 16),
            nn.Linear(16, 3),
        )
        self.two.weight = self.one.weight
        self.again = self.one

    def forward(self, x):
        return self.out(self.again(self.two(torch.relu(self.one(self.into(x))))))


class Parametrised(nn.Module):
    def __init__(self):
        super().__init__()
        self.into = nn.Linear(12, 16)
        self.weighted = parametrizations.weight_norm(nn.Linear(16, 16))
        self.spectral = parametrizations.spectral_norm(nn.Linear(16, 16))
        self.orthogonal = parametrizations.orthogonal(nn.Linear(16, 16))
        self.old = nn.utils.weight_norm(nn.Linear(16, 16))
        self.older = nn.utils.spectral_norm(nn.Linear(16, 16))
        self.out = nn.Linear(16, 3)

    def forward(self, x):
        for part in (self.into, self.weighted, self.spectral, self.orthogonal, self.old, self.older):
            x = torch.tanh(part(x))
        return self.out(x)


class Scripted(nn.Module):
    def __init__(self):
        super().__init__()
        self.into, self.between, self.out = nn.Linear(12, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        self.middle = torch.jit.script(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)))

    def forward(self, x):
        return self.out(self.between(self.middle(self.into(x))))


class Wrapped(nn.Module):
    """Parameters in lists and dicts, a wrapper around a wrapper, and one used through `functional_call`."""

    def __init__(self):
        super().__init__()
        self.list = nn.ParameterList(
            [nn.Parameter(torch.randn(16, 12) / 4), nn.Parameter(torch.randn(16, 16) / 4)]
        )
        self.dict = nn.ParameterDict({"gate": nn.Parameter(torch.randn(16, 16) / 4)})
        self.wrapped = nn.Sequential(nn.DataParallel(nn.Sequential(nn.Linear(16, 16))))
        self.called = nn.Linear(16, 16)
        self.out = nn.Linear(16, 3)

    def forward(self, x):
        for weight in self.list:
            x = torch.tanh(F.linear(x, weight))
        x = x @ self.dict["gate"].T
        x = torch.func.functional_call(self.called, dict(self.called.named_parameters()), (self.wrapped(x),))
        return self.out(x)


SYNTHETIC = {"tied": Tied, "parametrised": Parametrised, "scripted": Scripted, "wrapped": Wrapped}


@pytest.mark.parametrize("name", SYNTHETIC)
def test_tied_parametrised_scripted_and_wrapped_models_join_and_collapse_exactly(name):
    torch.manual_seed(0)
    module = SYNTHETIC[name]().eval()
    with torch.no_grad():
        module(X)  # old-style weight norm makes its weight in the forward pass
    check(Member(name, module, Inputs((X,)), Origin("module", name, name)))


def test_what_is_shared_of_a_parametrised_weight_is_the_parameter_and_not_the_product():
    module = Parametrised().eval()
    anatomy = discover(Member("m", module, Inputs((X,)), Origin("module", "m", "m")))
    sites = {site.name for site in anatomy.sites}
    assert {
        "weighted.parametrizations.weight.original1", "spectral.parametrizations.weight.original",
        "old.weight_v", "older.weight_orig",
    } <= sites  # fmt: skip
    assert not {name for name in sites if name.endswith(("_u", "_v")) and name != "old.weight_v"}


def test_a_model_that_keeps_derived_weights_is_exact_after_its_forward_pass_too():
    torch.manual_seed(0)
    module = timm.create_model("levit_128s").eval()
    inputs = Inputs((torch.randn(1, 3, 224, 224),))
    with torch.no_grad():
        module(*inputs.args)  # keeps attention biases
    check(Member("m", copy.deepcopy(module), inputs, Origin("timm", "levit_128s", "levit_128s")))
