"""Tiers beyond the plain recorder: what they answer for data, what bounds do, and what is traced by itself."""

import gc
import time
from collections import Counter

import pytest
import tiny_transformers
import torch
import torch.nn.functional as F
from torch import nn
from zoo import NETWORKS, minilm

from surgery.anatomy.sites import discover
from surgery.inputs import inputs_for_part
from surgery.members.member import Inputs
from surgery.tracing import TABLE, TIERS, Bounds, trace
from surgery.tracing.crosscheck import crosscheck

META, STUBBED, REAL, LAZY, EXPORT = TIERS
X = torch.randn(2, 12, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Three linear maps, of which `choose` says which to apply."""

    def __init__(self, choose):
        super().__init__()
        self.choose = choose
        self.a, self.b, self.c = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, x):
        return self.c(self.choose(self, x))


def reached(found):
    return [use.parameter for use in found.uses if use.reached and use.role == "map"]


def by_shadow(net, x):
    """What decides depends on inputs alone, through masks and positions."""
    mask = torch.arange(x.shape[1], device=x.device) < 5
    count = int((x > 100).sum()) + mask.sum().item()
    return net.a(x) if count == 5 and mask[2] and not mask.all() else net.b(x)


def test_what_depends_on_inputs_alone_is_computed_and_not_assumed():
    net, inputs = Net(by_shadow), Inputs((X,))
    found = trace(net, inputs)
    assert found.tier == STUBBED.name and not any("assumed" in note for note in found.notes)
    assert reached(found) == ["a.weight", "c.weight"] == reached(trace(net, inputs, [REAL]))
    found.graph.lint()


@pytest.mark.parametrize(("shift", "expected"), [(0.0, "a.weight"), (200.0, "b.weight")])
def test_the_branch_follows_the_values_of_the_inputs(shift, expected):
    net = Net(lambda net, x: net.b(x) if (x > 100).any() else net.a(x))
    assert reached(trace(net, Inputs((X + shift,))))[0] == expected


def test_writing_in_place_keeps_or_forgets_what_is_known():
    def choose(net, x):
        known = torch.zeros(4, device=x.device)
        known[1:3] = 1.0
        chosen = net.a(x) if known.sum() == 2 else net.b(x)
        known[0] = chosen.mean()  # from here on it depends on weights
        return chosen if known.sum() > 0 else net.b(chosen)

    found = trace(Net(choose), Inputs((X,)), [STUBBED])
    assert reached(found)[0] == "a.weight"
    assert any(note.startswith("branch assumed: bool") for note in found.notes)


@pytest.mark.parametrize(
    "look",
    [
        lambda y: y.mean().item() > -1e9,
        lambda y: bool((y > 1e9).any()),
        lambda y: int(y.argmax()) >= 0,
        lambda y: float(y.sum()) < 1e9,
        lambda y: len(y.tolist()) == 2,
        lambda y: (y > 0).nonzero().shape[1] == 2,
        lambda y: torch.where(y > 0)[0].ndim == 1,
        lambda y: y[y > 0].ndim == 1,
        lambda y: torch.masked_select(y, y > 0).ndim == 1,
        lambda y: torch.unique(y).ndim == 1,
        lambda y: torch.allclose(y, y),
        lambda y: torch.repeat_interleave(y, (y[:, 0] > 0).long() + 1, dim=0).ndim == 2,
        lambda y: torch.bincount((y[:, 0] > 0).long(), minlength=2).ndim == 1,
    ],
)
def test_looking_at_data_that_depend_on_weights_is_assumed_and_noted(look):
    def choose(net, x):
        y = net.a(x)
        look(y)
        return net.b(y)

    found = trace(Net(choose), Inputs((X,)))
    assert found.tier == STUBBED.name
    assert reached(found) == ["a.weight", "b.weight", "c.weight"]
    assert any(note.startswith("branch assumed: ") for note in found.notes)


def test_where_the_first_assumption_fails_the_other_is_tried():
    def choose(net, x):
        if not (net.a(x) > -1e9).any():
            raise ValueError("never")
        return net.b(x)

    found = trace(Net(choose), Inputs((X,)), [STUBBED])
    assert reached(found) == ["a.weight", "b.weight", "c.weight"]


def test_minilm_is_traced_without_its_weights_and_without_assumptions():
    member = minilm()
    found = trace(member.module, member.inputs)
    assert found.tier in (META.name, STUBBED.name) and not any("assumed" in n for n in found.notes)
    assert len(set(reached(found))) == 37  # six in each of six layers, and the pooler


def test_modules_without_weights_are_traced_where_data_decide():
    def choose(net, x):
        return net.a(x) if net.a.weight.abs().sum() > 0 else net.b(x)

    with torch.device("meta"):
        net = Net(choose)
    found = trace(net, Inputs((X,)), [REAL, LAZY])
    assert found.tier == LAZY.name and set(reached(found)) == {"a.weight", "c.weight"}
    assert "weights were made up" in found.notes and net.a.weight.is_meta
    found.graph.lint()


def test_weights_made_when_used_are_let_go():
    gc.collect()
    gc.freeze()  # what is there before is not looked at
    with torch.device("meta"):
        net = nn.Sequential(*[nn.Linear(256, 256) for _ in range(40)])
    alive = []
    linear = F.linear

    class Count(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is linear:
                alive.append(sum(torch.is_tensor(o) and o.shape == (256, 256) for o in gc.get_objects()))
            return func(*args, **(kwargs or {}))

    with Count():
        found = trace(net, Inputs((torch.randn(2, 256),)), [LAZY])
    assert len(reached(found)) == 40
    assert max(alive) < 40 + 10  # the 40 without data, and few with


@pytest.mark.parametrize("tier", [META, STUBBED, REAL, EXPORT])
def test_a_trace_that_takes_too_long_is_given_up(tier):
    class Slow(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = nn.Linear(12, 12)

        def forward(self, x):
            for _ in range(1000):
                time.sleep(0.01)
                x = self.part(x)
            return x

    began = time.monotonic()
    found = trace(Slow(), Inputs((X,)), [tier], bounds=Bounds(seconds=0.3))
    assert time.monotonic() - began < 8  # the loop alone lasts 10 s
    assert found.tier == TABLE and "took more than 0.3 s" in found.notes[0]


@pytest.mark.slow
def test_a_trace_that_takes_too_much_memory_is_given_up():
    def choose(net, x):
        # 64 MiB each: too large to be memory that was freed before.
        kept = [torch.ones(1 << 24) for _ in range(40)]
        return net.a(x) + len(kept)

    found = trace(Net(choose), Inputs((X,)), [REAL], bounds=Bounds(memory=0.2))
    assert found.tier == TABLE and "0.2 GiB of memory" in found.notes[0]


class TwoTowers(nn.Module):
    def __init__(self):
        super().__init__()
        self.text = tiny_transformers.tiny("bert")
        self.picture = tiny_transformers.tiny("vit")

    def forward(self, input_ids):
        return self.text(input_ids)


def test_towers_that_were_not_reached_are_traced_by_themselves():
    net = TwoTowers().eval()
    inputs = Inputs((torch.arange(16).reshape(2, 8) + 5,))
    alone = trace(net, inputs)
    found = trace(net, inputs, inputs_for=inputs_for_part)
    assert not alone.parts and set(found.parts) == {"picture"}
    whole = trace(net.picture, inputs_for_part(net.picture))
    expected = {f"picture.{use.parameter}": use.view for use in whole.uses if use.role == "map"}
    got = {
        use.parameter: use for use in found.uses if use.parameter.startswith("picture.") and use.role == "map"
    }
    assert {name: use.view for name, use in got.items()} == expected
    assert [use.order for use in found.uses] == list(range(len(found.uses)))
    assert sum(use.first for use in got.values()) == 1 and not any(use.last for use in got.values())
    assert all(use.module.startswith("picture.") for use in got.values())
    assert any(note.startswith("picture was traced by itself") for note in found.notes)


@pytest.mark.parametrize("name", ["bert", "gpt2", "resnet18", "vit_tiny_patch16_224", "t5"])
def test_recorder_and_export_say_the_same(name):
    assert crosscheck(*NETWORKS[name]()) == {}


def test_the_crosscheck_sees_a_difference():
    net = Net(lambda net, x: net.b(x) if torch.compiler.is_exporting() else net.a(x))
    assert {"a.weight", "b.weight"} <= set(crosscheck(net, Inputs((X,))))


def test_uses_say_which_operations_led_to_them():
    class Derived(nn.Module):
        def __init__(self):
            super().__init__()
            self.log, self.matrix = nn.Parameter(torch.zeros(12)), nn.Parameter(torch.randn(6, 12))

        def forward(self, x):
            weight = self.matrix - self.matrix.mean(1, keepdim=True)
            return F.linear(x * (-torch.exp(self.log)), weight.view(6, 12))

    found = trace(Derived(), Inputs((X,)))
    ways = {use.parameter: use.through for use in found.uses}
    assert ways == {"log": ("exp", "neg"), "matrix": ("mean", "sub", "view")}


def test_a_table_that_is_read_by_index_is_private():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.out = nn.Parameter(torch.randn(7, 12)), nn.Linear(12, 3)

        def forward(self, x):
            index = torch.tensor([[0, 3], [1, 2]], device=x.device)
            return self.out(torch.einsum("bc,ijc->bijc", x, self.table[index]))

    uses = {use.parameter: use for use in trace(Positions(), Inputs((X,))).uses}
    assert (uses["table"].role, uses["table"].kind) == ("private", "embedding")
    assert "__getitem__" in uses["table"].reason


def test_no_parameter_of_a_mixture_of_experts_is_left_over():
    from zoo import member

    anatomy = discover(member("mixtral"))
    assert Counter(part.role for part in anatomy.left_alone if part.kind != "buffer")["skipped"] == 0
