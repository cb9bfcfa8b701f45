"""Residual branches of layers as components: found in the graph, exact at first, off without being run, plain again."""

import copy

import pytest
import timm
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from routed import IDS, run
from torch import nn

import surgery
from surgery.errors import PlanError
from surgery.methods.routes.groups import routes_in
from surgery.methods.routes.hardening import drop_unused
from surgery.methods.routes.layers import RoutedBranch
from surgery.training.tasks.streams import Batches

PICTURES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
SMALL = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}


def seeded(make, *arguments, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make(*arguments, **options).eval()


def bert():
    return seeded(transformers.BertModel, transformers.BertConfig(**SMALL, intermediate_size=24))


def llama(**options):
    config = transformers.LlamaConfig(
        **SMALL, intermediate_size=24, bos_token_id=1, eos_token_id=2, use_cache=False, **options
    )
    return seeded(transformers.LlamaModel, config)


def vit(**options):
    return seeded(
        timm.create_model, "vit_tiny_patch16_224", img_size=32, patch_size=8, num_classes=5, embed_dim=16,
        num_heads=2, depth=3, **options,
    )  # fmt: skip


NETS = {
    "bert": (bert, IDS, ["attention.output.dense", "output.dense"]),
    "llama": (llama, IDS, ["self_attn", "mlp"]),
    "vit": (vit, PICTURES, ["attn", "mlp"]),
    "scaled": (lambda: vit(init_values=0.1), PICTURES, ["attn", "mlp"]),
}


def joined(module, x, **settings):
    one = surgery.load_member(module, name="net", inputs=x)
    return surgery.join([one], surgery.plan_modules([one], "routes", {"branches": True, **settings}))


def take(joint, on):
    """Harden so that the branches of some numbers stay."""
    (depths,) = routes_in(joint["net"]).values()
    for number, gates in enumerate(depths):
        gates.harden({"": (0,) if number in on else (1,)})
    return drop_unused(joint)


@pytest.mark.parametrize("name", NETS)
def test_branches_are_found_and_the_start_is_exact(name):
    make, x, modules = NETS[name]
    joint = joined(make(), x)
    (depths,) = routes_in(joint["net"]).values()
    assert [gates.names[0] for gates in depths] == [f"{i}.{module}" for i in range(3) for module in modules]
    assert torch.equal(run(joint["net"], x), run(make(), x))
    assert list(joint.collapse("net")) == list(make().state_dict())


@pytest.mark.parametrize("name", NETS)
def test_what_is_off_is_neither_stored_nor_run_and_its_plain_model_agrees(name, tmp_path):
    make, x, modules = NETS[name]
    on = {0, 3, 4}  # of the second layer the second branch; of the third the first
    joint = take(joined(make(), x), on)
    expected = make()
    layers = (
        expected.encoder.layer if name == "bert" else getattr(expected, "layers", None) or expected.blocks
    )
    for number in set(range(6)) - on:
        branch = layers[number // 2].get_submodule(modules[number % 2])
        with torch.no_grad():
            maps = [part for part in branch.modules() if isinstance(part, nn.Linear)]
            for parameter in maps[-1].parameters():
                parameter.zero_()
    wanted = run(expected, x)
    assert torch.equal(run(joint["net"], x), wanted)
    surgery.save(joint, tmp_path / "joint")
    loaded = surgery.load(tmp_path / "joint")
    assert torch.equal(run(loaded["net"], x), wanted)
    branches = [part for part in loaded["net"].modules() if isinstance(part, RoutedBranch)]
    assert [bool(len(part.held)) for part in branches] == [number in on for number in range(6)]
    assert len(loaded["net"].state_dict()) < len(expected.state_dict())
    plain = loaded.extract("net").eval()
    torch.testing.assert_close(run(plain, x), wanted)
    assert type(plain) is type(expected)


def test_a_layer_without_branches_is_left_out_where_it_passes_on(tmp_path):
    joint = take(joined(vit(), PICTURES), {0, 1, 5})
    plain = joint.extract("net").eval()
    assert len(plain.blocks) == 2
    torch.testing.assert_close(run(plain, PICTURES), run(joint["net"], PICTURES))
    joint = take(joined(bert(), IDS), {0, 1, 5})  # of which norms are left
    plain = joint.extract("net").eval()
    assert len(plain.encoder.layer) == 3 == plain.config.num_hidden_layers
    torch.testing.assert_close(run(plain, IDS), run(joint["net"], IDS))


class Block(nn.Module):
    """A pre-norm or a post-norm block, or one whose branches lie beside one another."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.one = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))
        self.two = nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 8), nn.Dropout(0.1))

    def forward(self, x):
        if self.kind == "beside":
            y = self.norm1(x)
            return x + (self.one(y) + self.two(y))
        if self.kind == "after":
            x = self.norm1(x + self.one(x))
            return self.norm2(self.two(x) + x)
        x = x + self.one(self.norm1(x))
        x += self.two(self.norm2(x))
        return x


class Net(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.into, self.out = nn.Linear(4, 8), nn.Linear(8, 2)
        self.blocks = nn.ModuleList([Block(kind) for _ in range(3)])

    def forward(self, x):
        x = self.into(x)
        for block in self.blocks:
            x = block(x)
        return self.out(x)


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(st.sampled_from(["before", "after", "beside"]), st.sets(st.integers(0, 5)))
def test_any_choice_of_branches_is_the_net_whose_others_add_zeros(kind, on):
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    net = seeded(Net, kind)
    joint = take(joined(copy.deepcopy(net), x), on)
    calls = []
    for path, module in joint["net"].named_modules():
        if isinstance(module, nn.Sequential):
            module.register_forward_hook(lambda *_, path=path: calls.append(path))
    found = run(joint["net"], x)
    assert len(calls) == len(on)
    with torch.no_grad():
        for number in set(range(6)) - on:
            block = net.blocks[number // 2]
            for parameter in (block.two if number % 2 else block.one)[2].parameters():
                parameter.zero_()
    torch.testing.assert_close(found, run(net, x))
    plain = joint.extract("net").eval()
    torch.testing.assert_close(run(plain, x), found)
    gone = 0 if kind == "after" else sum(not {2 * i, 2 * i + 1} & on for i in range(3))
    assert len(plain.blocks) == 3 - gone


def test_half_of_the_branches_stay_where_half_of_the_layers_shall():
    joint = joined(vit(), PICTURES, layers=2)
    task = surgery.Task("net", "net", Batches(PICTURES, None, 3), {"distillation": 1.0})
    config = {"steps": 2, "generations": 1, "final": 1, "evolution": {"change": "none", "codes": "ones"}}
    report = surgery.train(joint, [task], config, cpu=True)
    (kept,) = report.methods["routes"]["chosen"]["net:blocks.*"].values()
    assert sum(name != "identity" for (name,) in kept) == 4
    assert len(report.methods["routes"]["measured"]["net:blocks.*"][""]["left"]) == 2
    torch.testing.assert_close(run(joint.extract("net").eval(), PICTURES), run(joint["net"], PICTURES))


@pytest.mark.parametrize("wrong", [{"routing": "soft"}, {"members": True}, {"identity": False}])
def test_what_branches_need(wrong):
    with pytest.raises(PlanError, match="branches need routing gumbel, identity true and members false"):
        joined(vit(), PICTURES, **wrong)


def test_layers_without_branches_are_refused():
    layers = [nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3)]
    net = nn.Sequential(nn.Linear(4, 8), *layers, nn.Linear(8, 2))
    with pytest.raises(PlanError, match="the graph shows none: leave `branches` out"):
        joined(net, torch.randn(2, 4))


def test_branches_that_get_a_cache_are_refused():
    model = llama()
    model.config.use_cache = True
    with pytest.raises(PlanError, match="keep no cache"):
        joined(model, IDS)
