"""Tracing: a lint-clean graph, uses in order, and a module that is left exactly as it was."""

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from zoo import NETWORKS

from surgery.errors import TraceError
from surgery.members.member import Inputs
from surgery.tracing import TABLE, TIERS, Tier, trace

X = torch.randn(2, 12, generator=torch.Generator().manual_seed(0))


def run(module, inputs):
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        return torch.utils._pytree.tree_flatten(module(*inputs.args, **inputs.kwargs))[0]


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_trace_in_order_and_stay_as_they_were(name):
    module, inputs = NETWORKS[name]()
    state = {key: value.clone() for key, value in module.state_dict().items()}
    modes = [part.training for part in module.modules()]
    hooks = [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules()]
    before = run(module, inputs)
    found = trace(module, inputs)
    assert found.tier == TIERS[0].name and found.ordered
    found.graph.lint()
    assert next(iter(reversed(found.graph.nodes))).all_input_nodes
    assert {use.parameter for use in found.uses} <= set(state)
    assert [use.order for use in found.uses] == list(range(len(found.uses)))
    assert any(use.first for use in found.uses) and any(use.last for use in found.uses)
    after = module.state_dict()
    assert list(after) == list(state) and all(torch.equal(after[key], state[key]) for key in state)
    assert [part.training for part in module.modules()] == modes
    assert [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules()] == hooks
    assert all(
        torch.equal(a, b) for a, b in zip(before, run(module, inputs), strict=True) if torch.is_tensor(a)
    )


@pytest.mark.parametrize("name", ["bert", "gpt2", "resnet18"])
@pytest.mark.parametrize("tier", [1, 2, 4])
def test_tiers_agree(name, tier):
    module, inputs = NETWORKS[name]()
    reference = trace(module, inputs, TIERS[:1])
    other = trace(module, inputs, TIERS[tier : tier + 1])
    assert other.tier == TIERS[tier].name
    other.graph.lint()

    def facts(found):
        return {(u.parameter, u.role, u.kind, u.view and u.view.pattern, u.first, u.last) for u in found.uses}

    assert facts(other) == facts(reference)


def test_the_graph_computes_what_the_module_computes():
    module = nn.Sequential(nn.Linear(12, 8), nn.ReLU(inplace=True), nn.Linear(8, 3)).eval()
    graph = trace(module, Inputs(args=(X,))).graph
    ops = [node.op for node in graph.nodes]
    assert ops.count("placeholder") == 1 and ops.count("get_attr") == 4 and ops[-1] == "output"
    assert torch.equal(torch.fx.GraphModule(module, graph)(X), module(X))
    assert {node.meta["module"] for node in graph.nodes if node.op == "call_function"} == {"0", "1", "2"}


class Net(nn.Module):
    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.function(self, x)


def two():
    return {"a": nn.Linear(12, 12), "b": nn.Linear(12, 12)}


def ends(found):
    uses = found.uses
    return {u.parameter for u in uses if u.first}, {u.parameter for u in uses if u.last}


@pytest.mark.parametrize(
    "function",
    [
        lambda s, x: s.b(s.a(x).relu_()),
        lambda s, x: s.b(torch.zeros_like(x).copy_(s.a(x))),
        lambda s, x: s.b(torch.cat(s.a(x).chunk(2, -1)[::-1], -1)),
        lambda s, x: s.b(torch.stack([row for row in s.a(x)])),
        lambda s, x: s.b(F.relu(s.a(x), inplace=True)),
        lambda s, x: s.b(written(s.a(x))),
        lambda s, x: s.b(torch.jit.script(doubled)(s.a(x))),
        lambda s, x: s.b(Cube.apply(s.a(x))),
        lambda s, x: s.b(torch.mul(s.a(x), 2, out=torch.empty_like(x))),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_values_are_followed_through_writes_and_opaque_functions(function):
    found = trace(Net(function, **two()), Inputs(args=(X,)), TIERS[:1])
    assert found.ordered and ends(found) == ({"a.weight"}, {"b.weight"})


def written(x):
    out = torch.zeros_like(x)
    out[:, :3].add_(1)
    out[:, 3:] = x[:, 3:]
    return out


def doubled(x):
    return torch.relu(x) * 2


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x**3

    @staticmethod
    def backward(ctx, g):
        return g


def test_a_module_used_twice_is_one_map():
    found = trace(Net(lambda s, x: s.a(s.a(x)), a=nn.Linear(12, 12)), Inputs(args=(X,)))
    assert ends(found) == ({"a.weight"}, {"a.weight"})
    found = trace(Net(lambda s, x: s.c(s.a(s.b(s.a(x)))), c=nn.Linear(12, 2), **two()), Inputs(args=(X,)))
    assert ends(found) == ({"a.weight"}, {"c.weight"})


def test_tied_weights_go_by_their_first_owner():
    parts = two()
    parts["b"].weight = parts["a"].weight
    found = trace(Net(lambda s, x: s.b(s.a(x)), **parts), Inputs(args=(X,)))
    assert [use.parameter for use in found.uses] == ["a.weight", "a.bias", "a.weight", "b.bias"]
    assert [use.module for use in found.uses] == ["a", "a", "b", "b"]


def test_data_dependent_control_flow_runs_with_the_weights():
    module = Net(lambda s, x: s.a(x) if x.sum().item() > 1e9 else s.b(x), **two())
    found = trace(module, Inputs(args=(X,)))
    assert found.tier == TIERS[1].name and "item()" in found.notes[0]
    assert [use.parameter for use in found.uses] == ["b.weight", "b.bias", "a.weight", "a.bias"]
    assert [use.reached for use in found.uses] == [True, True, False, False]
    assert "2 parameters were not reached" in found.notes[-1]


def test_tensors_that_are_not_registered_are_kept():
    class Cached(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.cache, self.seen = nn.Linear(12, 12), {}, [torch.ones(12)]
            self.lock = threading.Lock()

        def forward(self, x):
            self.cache["last"] = self.a.weight * 2
            self.seen.append(x)
            return self.a(x) + self.seen[0]

    for tiers in (TIERS[:1], TIERS[1:2]):
        module = Cached().train()
        found = trace(module, Inputs(args=(X,)), tiers)
        assert found.ordered, found.notes
        assert module.cache == {} and len(module.seen) == 1 and module.training
        assert torch.equal(module.seen[0], torch.ones(12))


def test_writes_to_weights_and_buffers_are_undone():
    def forward(s, x):
        s.a.weight.data[0] = 0
        s.b.weight.mul_(2)
        s.n.running_mean.add_(1)
        torch.rand(3)
        if x.sum().item() > 1e9:
            return x
        raise ValueError("too small")

    module = Net(forward, n=nn.BatchNorm1d(12), **two())
    state, random = copy.deepcopy(module.state_dict()), torch.get_rng_state()
    found = trace(module, Inputs(args=(X,)))
    assert found.tier == TABLE and "ValueError: too small" in found.notes[1]
    assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


def test_running_statistics_stay_in_training_mode():
    module = nn.Sequential(nn.BatchNorm1d(12), nn.Dropout(), nn.Linear(12, 2)).train()
    found = trace(module, Inputs(args=(X,)), TIERS[1:2])
    assert found.ordered and module.training and module[0].num_batches_tracked == 0


def test_what_cannot_be_traced_at_all_is_an_error():
    class Strange(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(3, 3))

        def forward(self, x):
            raise ValueError("never runs")

    with pytest.raises(TraceError, match=r"never runs.*give example inputs"):
        trace(Strange(), Inputs(args=(X,), source="test"))
    with pytest.raises(TraceError, match="no example inputs"):
        trace(Strange(), Inputs())


def test_a_tier_that_fails_is_passed_over_with_a_note():
    def broken(module, inputs, watch):
        raise RuntimeError("no\nluck")

    found = trace(nn.Linear(12, 2), Inputs(args=(X,)), [Tier("broken", broken), *TIERS])
    assert found.tier == TIERS[0].name and found.notes == ("broken was passed over: RuntimeError: no luck",)


def test_meta_modules_trace_too():
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 2))
    assert ends(trace(module, Inputs(args=(X,)))) == ({"0.weight"}, {"1.weight"})
