"""The mathematics of learned routes, and `Routed` in models of one's own: laws, and what is refused."""

import copy
import os
import pickle
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ended_runs import stopped_at
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import Started, forks
from safetensors.torch import load_file, save_file
from torch import nn

import surgery
from surgery.errors import PlanError, SurgeryWarning
from surgery.methods.routes import mathematics
from surgery.methods.routes.pictures import cluster, cosine
from surgery.training.distributed.fsdp import check_members
from surgery.training.loop.interruptions import Interrupted
from surgery.training.report.pictures import draw_run
from surgery.training.report.runlog import read_log
from surgery.training.tasks.streams import Batches

X = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))


def layers(count, width=6, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return [nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(count)]


# -- mathematics -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.03, 0.5, 0.8])
def test_samples_follow_bernoulli(p):
    generator = torch.Generator().manual_seed(1)
    logits = mathematics.bernoulli_logits(torch.full((40_000,), p))
    for temperature in (0.5, 50.0):  # which has no part in the samples
        z = mathematics.sampled(logits, mathematics.gumbel_noise(logits.shape, generator), temperature)
        assert set(z.unique().tolist()) <= {0.0, 1.0}
        on, count = float(z.sum()), len(z)
        chi_square = (on - count * p) ** 2 / (count * p * (1 - p))
        assert chi_square < 10.83  # one degree of freedom, 1 in 1,000


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 5), st.booleans())
def test_gradients_are_those_of_the_softened_surrogate(seed, count, rest):
    """Of each z on the side on which its other value lies, as the mean has a corner where one component is on."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, 2, generator=generator, dtype=torch.float64)
    noise = mathematics.gumbel_noise((count, 2), generator).double()
    outputs = list(torch.randn(count + rest, 3, generator=generator, dtype=torch.float64))

    def soft(given):
        return torch.softmax((given + noise) / 2.0, -1)[..., 0]

    def shares(z):
        mean = z / z.sum().clamp_min(1)
        return torch.cat([mean, (1 - z.sum()).clamp_min(0)[None]]) if rest else mean

    leaf = logits.clone().requires_grad_()
    z = mathematics.sampled(leaf, noise, 2.0)
    given_shares = (mathematics.shares_or_identity if rest else mathematics.shares_of_on)(z)
    assert torch.equal(given_shares, shares(z))
    mathematics.mixed(given_shares, outputs).sum().backward()
    hard, step = z.detach(), 1e-6
    slopes = torch.autograd.functional.jacobian(soft, logits)
    for i, j in np.ndindex(count, 2):
        moved = hard.clone()
        moved[i] += -step if hard[i] else step
        here, there = (mathematics.mixed(shares(each), outputs).sum() for each in (hard, moved))
        found = (there - here) / (moved - hard)[i] * slopes[i, i, j]
        torch.testing.assert_close(leaf.grad[i, j], found, rtol=1e-4, atol=1e-7)


@given(st.lists(st.floats(0.01, 0.99), min_size=1, max_size=8), st.floats(0.05, 1.0), st.floats(0.0, 0.5))
def test_the_penalty_is_0_below_the_budget_and_linear_above(probabilities, budget, more):
    p = torch.tensor(probabilities, dtype=torch.float64)
    excess = mathematics.budget_excess(p, budget)
    assert (excess == 0) == (p.mean() <= budget)
    above = mathematics.budget_excess(p + 1, budget)
    torch.testing.assert_close(
        mathematics.budget_excess(p + 1 + more, budget) - above, torch.tensor(more).double()
    )


def test_a_dendrogram_joins_what_is_alike():
    vectors = np.array([[1.0, 0, 0, 1], [0, 1, 1, 0], [1, 0, 0, 1], [0, 1, 1, 1]])
    order, merges = cluster(1 - cosine(vectors))
    assert {frozenset(order[:2]), frozenset(order[2:])} == {frozenset({0, 2}), frozenset({1, 3})}
    assert [merge[4] for merge in merges] == sorted(merge[4] for merge in merges) and len(merges) == 3


# -- Routed ----------------------------------------------------------------------------------------------------


def test_parallel_order_is_the_ordinary_sequential_model():
    parts = layers(4)
    assert torch.equal(surgery.Routed(parts, routing="parallel")(X), nn.Sequential(*parts)(X))


def test_permuted_order_is_by_hand_or_by_chance_and_the_same_for_one_seed():
    parts = layers(3)
    by_hand = surgery.Routed(
        parts, routing="permuted", tasks=("a", "b"), orders={"a": [2, 0, 1], "b": [1, 1, 0]}
    )
    by_hand.serve_task("a")
    assert torch.equal(by_hand(X), parts[1](parts[0](parts[2](X))))
    by_hand.serve_task("b")
    assert torch.equal(by_hand(X), parts[0](parts[1](parts[1](X))))
    tasks = tuple("abcdef")
    one, again, other = (
        surgery.Routed(parts, routing="permuted", tasks=tasks, seed=seed) for seed in (3, 3, 4)
    )
    orders = [[gates.likely() for gates in routed.depths()] for routed in (one, again, other)]
    assert orders[0] == orders[1] != orders[2]
    assert all(sorted(d[task][0] for d in orders[0]) == [0, 1, 2] for task in tasks)


@pytest.mark.parametrize("routing", ["soft", "gumbel"])
@pytest.mark.filterwarnings("ignore:All components")
def test_it_computes_the_equation(routing):
    parts, tasks = [layers(3), layers(3, seed=1)], ("a", "b")
    routed = surgery.Routed(parts[0] if routing == "soft" else parts, 2, routing=routing, tasks=tasks).eval()
    with torch.no_grad():
        for gates in routed.depths():
            gates.parameter.copy_(
                torch.randn(gates.parameter.shape, generator=torch.Generator().manual_seed(3))
            )
    for row, task in enumerate(tasks):
        routed.serve_task(task)
        y = X
        for d, gates in enumerate(routed.depths()):
            own, used = gates.parameter[row], parts[0] if routing == "soft" else parts[d]
            if routing == "soft":
                g = own.exp() / own.exp().sum()
            else:
                z = (own[:, 0] >= own[:, 1]).float()
                g = z / max(float(z.sum()), 1)
            y = sum(share * part(y) for share, part in zip(g, used, strict=True))
        torch.testing.assert_close(routed(X), y)


def test_soft_shares_are_equal_at_first():
    routed = surgery.Routed(layers(4), 2, routing="soft", identity=True)
    torch.testing.assert_close(routed.shares("")[1], torch.full((5,), 0.2))


@pytest.mark.parametrize("routing", ["soft", "gumbel"])
def test_permuting_components_permutes_g_and_nothing_else(routing):
    parts, order = layers(4), [2, 0, 3, 1]
    mixed = [parts[i] for i in order]
    one, other = (
        surgery.Routed(p if routing == "soft" else [p], 1, routing=routing).train() for p in (parts, mixed)
    )
    noise = torch.randn(4, 2, generator=torch.Generator().manual_seed(5)) * 2
    if routing == "gumbel":
        one.depths()[0].noise, other.depths()[0].noise = noise, noise[order]
    outputs = [routed(X) for routed in (one, other)]
    torch.testing.assert_close(*outputs)
    for output in outputs:
        output.square().sum().backward()
    gradients = [routed.depths()[0].parameter.grad for routed in (one, other)]
    torch.testing.assert_close(gradients[0][:, order], gradients[1])


def test_all_off_gives_zeros_and_a_warning_that_names_task_and_depth():
    routed = surgery.Routed([layers(2), layers(2)], routing="gumbel", tasks=("mood", "topic")).eval()
    with torch.no_grad():
        routed.depths()[1].logits[1] = torch.tensor([[-3.0, 0.0], [-1.0, 0.0]])
    routed.serve_task("mood")
    with warnings.catch_warnings():
        warnings.simplefilter("error", SurgeryWarning)
        assert routed(X).abs().sum() > 0
    routed.serve_task("topic")
    with pytest.warns(SurgeryWarning, match=r"depth 1 .*are off for task 'topic'"):
        assert torch.equal(routed(X), torch.zeros(5, 6))


def test_components_that_are_off_are_not_run():
    class Counted(nn.Linear):
        runs = 0

        def forward(self, x):
            self.runs += 1
            return super().forward(x)

    parts = [Counted(6, 6) for _ in range(3)]
    routed = surgery.Routed([parts], routing="gumbel")
    routed.train()(X)
    assert [part.runs for part in parts] == [1, 1, 1]  # all are evaluated while it is trained
    with torch.no_grad():
        routed.depths()[0].logits[0, 1] = torch.tensor([-1.0, 0.0])
    routed.eval()(X)
    assert [part.runs for part in parts] == [2, 1, 2]


def test_it_is_an_ordinary_module():
    routed = surgery.Routed(layers(3), 2, routing="soft", tasks=("a", "b"), dropout=0.1).eval()
    routed.serve_task("b")
    for twin in (copy.deepcopy(routed), pickle.loads(pickle.dumps(routed))):
        assert torch.equal(twin(X), routed(X))
    fresh = surgery.Routed(layers(3, seed=2), 2, routing="soft", tasks=("a", "b")).eval()
    fresh.load_state_dict(routed.state_dict())
    fresh.serve_task("b")
    assert torch.equal(fresh(X), routed(X))


@pytest.mark.parametrize(("arguments", "said"), [
    ({"components": layers(2), "routing": "gumbel"}, "a sequence of modules for each depth, found Sequential"),
    ({"components": [], "routing": "soft"}, "must be modules, found none"),
    ({"components": layers(2), "depth": 3, "routing": "parallel"}, "depth of 3 needs as many components, found 2"),
    ({"components": layers(2), "routing": "permuted", "orders": {"": [0, 1, 0]}}, "that of task '' has 3 entries"),
    ({"components": layers(2), "routing": "permuted", "orders": {"": [0, 7]}}, "that of task '' names 7"),
    ({"components": layers(2), "routing": "soft", "orders": {"": [0, 1]}}, "Orders need permuted routing"),
    ({"components": [layers(2)], "routing": "gumbel", "p_init": 1.0}, "p_init"),
    ({"components": layers(2), "routing": "soft", "component_budget": 0.5}, "component_budget need routing gumbel"),
])  # fmt: skip
def test_what_is_refused_when_it_is_made(arguments, said):
    with pytest.raises(PlanError, match=said):
        surgery.Routed(**arguments)


def test_components_that_do_not_fit_are_all_named_with_their_shapes():
    parts = [nn.Linear(6, 6), nn.Linear(6, 4), nn.Linear(5, 6)]
    routed = surgery.Routed(parts, 1, routing="soft")
    with pytest.raises(
        PlanError, match=r"0 gives \[5, 6\]; 1 gives \[5, 4\]; 2 gives an error: .*5x6 and 5x6"
    ):
        routed(X)


def test_a_task_without_a_route_is_refused():
    with pytest.raises(PlanError, match="Task 'humour' has no route: there are routes for mood, topic"):
        surgery.Routed(layers(2), tasks=("mood", "topic")).serve_task("humour")


# -- trained by surgery.train ----------------------------------------------------------------------------------

TASKS = ("one", "two", "three")
CONFIG = {"steps": 4, "burn_in": 0, "generations": 3, "final": 1, "save_seconds": 0, "optimizer": {"lr": 0.01},
          "evolution": {"change": "none", "codes": "ones"}}  # fmt: skip


class Net(nn.Module):
    def __init__(self, routing, **settings):
        super().__init__()
        parts = [layers(2, 16), layers(2, 16, 1)] if routing == "gumbel" else layers(3, 16)
        self.into = nn.Linear(6, 16)
        self.middle = surgery.Routed(parts, routing=routing, tasks=TASKS, **settings)
        self.out = nn.Linear(16, 2)

    def forward(self, x):
        return self.out(self.middle(torch.relu(self.into(x))))


def trained(routing, folder=None, method=None, alternate=False, **more):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Net(routing, **({"component_budget": 0.9, "rate": 3.0} if routing == "gumbel" else {}))
    member = surgery.load_member(net, name="net", inputs=X)
    joint = surgery.join([member], surgery.plan_modules([member], "routes", block=(8, 8))) if method else \
        surgery.join([member], block=(8, 8))  # fmt: skip
    x = torch.randn(32, 6, generator=torch.Generator().manual_seed(4))
    tasks = [
        surgery.Task(name, "net", Batches(x, (x[:, number] > 0).long(), 16), "cross_entropy",
                     validation=Batches(x, (x[:, number] > 0).long(), 16, shuffle=False))
        for number, name in enumerate(TASKS)
    ]  # fmt: skip
    config = {**CONFIG, "alternate": alternate}
    return joint, surgery.train(joint, tasks, config, folder=folder, cpu=True, **more)


@pytest.mark.parametrize(("routing", "alternate"), [("gumbel", False), ("gumbel", True), ("soft", False)])
def test_routes_of_ones_own_are_trained_hardened_logged_and_resumed(routing, alternate, tmp_path):
    joint, report = trained(routing, tmp_path / "whole", "routes", alternate)
    first, *lines, end = read_log(tmp_path / "whole" / "log.jsonl")
    assert first["method_names"] == ["hypermodules", "routes"]
    facts = first["methods"]["routes"]["routes"]["net:middle"]
    assert facts["tasks"] == list(TASKS) and facts["routing"] == routing
    shares = [line["methods"]["routes"]["shares"]["net:middle"] for line in lines]
    assert np.array(shares).shape == (4, 2, 3, 2) if routing == "gumbel" else (4, 3, 3, 3)
    assert shares[0] != shares[2] == shares[3]  # hard in the end, and no longer learned
    chosen = end["methods"]["routes"]["chosen"]["net:middle"]
    assert report.methods == {"routes": {"chosen": {"net:middle": chosen}}} and set(chosen) == set(TASKS)
    drawn = draw_run(tmp_path / "whole" / "log.jsonl")
    assert {"allocation.png", "routes.png", "likeness.png"} <= set(drawn)
    with stopped_at(6, 13):
        for again in (False, True):
            with pytest.raises(Interrupted):
                trained(routing, tmp_path / "parts", "routes", alternate, resume=again)
    resumed, same = trained(routing, tmp_path / "parts", "routes", alternate, resume=True)
    assert same.scores == report.scores and same.methods == report.methods
    one, other = (j["net"].state_dict() for j in (joint, resumed))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_net_with_routes_needs_no_method_in_the_plan(tmp_path):
    joint, report = trained("gumbel")
    assert set(report.methods) == {"routes"}
    surgery.save(joint, tmp_path / "joint")
    again = surgery.load(tmp_path / "joint", modules={"net": Net("gumbel", component_budget=0.5)})
    for task in TASKS:
        with joint.serving(task), again.serving(task):
            assert torch.equal(joint["net"](X), again["net"](X))


def test_tasks_and_routes_must_be_of_the_same_names():
    net = surgery.load_member(Net("soft"), name="net", inputs=X)
    joint = surgery.join([net], block=(8, 8))
    task = surgery.Task("one", "net", Batches(X, torch.zeros(5).long(), 5), "cross_entropy")
    with pytest.raises(PlanError, match=r"no task trains two, three of middle .*: correct `tasks`"):
        surgery.train(joint, [task], CONFIG, cpu=True)


def test_compiled_members_are_refused():
    net = surgery.load_member(Net("soft"), name="net", inputs=X)
    tasks = [surgery.Task(n, "net", Batches(X, torch.zeros(5).long(), 5), "cross_entropy") for n in TASKS]
    with pytest.raises(PlanError, match=r"set `train.compile` to false"):
        surgery.train(surgery.join([net], block=(8, 8)), tasks, {**CONFIG, "compile": True}, cpu=True)


def test_equal_tasks_are_drawn_at_distance_zero():
    likeness = cosine(
        np.tile(np.repeat([1.0, 0.0], 6), (4, 1))
    )  # six on: the product is above 1 by its rounding
    _, merges = cluster(1 - likeness)
    assert likeness.max() == 1.0
    assert min(height for *_, height in merges) >= 0


def test_members_in_parts_are_refused():
    joint = surgery.join([surgery.load_member(Net("soft"), name="net", inputs=X)], block=(8, 8))
    with pytest.raises(
        PlanError, match="Method routes needs whole members in every process, but FSDP cuts them"
    ):
        check_members(joint, SimpleNamespace(classes=()))


def in_parts(out):
    """Train as one of some processes."""
    joint, _ = trained("gumbel", alternate=True)
    state = {name: tensor.clone() for name, tensor in joint["net"].state_dict().items()}
    save_file(state, f"{out}/{os.environ.get('RANK', '0')}.safetensors")


@forks
def test_processes_sample_alike(tmp_path):
    Started(in_parts, str(tmp_path), ranks=2).succeed()
    one, other = (load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1))
    assert all(torch.equal(one[name], other[name]) for name in one)
    (tmp_path / "alone").mkdir()
    in_parts(tmp_path / "alone")
    alone = load_file(tmp_path / "alone" / "0.safetensors")
    for (
        name,
        tensor,
    ) in alone.items():  # the same samples: what is left is the order in which gradients are added
        torch.testing.assert_close(one[name], tensor, rtol=1e-3, atol=1e-4, msg=name)
