"""Recipes of learned routes run by their commands, and their nets and tasks are what they say."""

import numpy as np
import pytest
import torch
from command_line import surgery as command
from stand_ins import digits_in
from surgery_recipes.ordered import ORDERS, Ordered
from surgery_recipes.routed import Digits, Regression, related
from surgery_recipes.uci import TABLES, uci

import surgery
from surgery.errors import LoadError, PlanError


def tables_in(folder):
    """Forty rows of every table, in the form of the package."""
    draw = np.random.default_rng(0)
    for table in TABLES:
        rows = [f"{draw.normal():.3f}, A{draw.integers(3)},{draw.integers(9)}, {n % 3}\n" for n in range(40)]
        (folder / f"{table}.dat").write_text("".join(rows), encoding="utf-8")
    return [f"--set=models.0.tasks.{n}.options.folder={folder}" for n in range(len(TABLES))]


DATA = {"four_mnist": digits_in, "soft_order": tables_in}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["four_mnist", "gumbel_pairs", "gumbel_related", "soft_order"])
def test_recipes_run_by_their_commands(name, tmp_path):
    changes = DATA[name](tmp_path) if name in DATA else []
    out = tmp_path / "joint"
    code, said, error = command("train", name, "--out", out, "--fast-dev-run", "--cpu", *changes)
    assert code == 0, error or said
    joint = surgery.load(out, trust_remote_code=True)
    inputs = joint.members["net"].inputs
    tasks = [task.name for task in surgery.Recipe.of(joint.recipe).models[0].tasks]
    outputs = {}
    for task in tasks:
        with joint.serving(task), torch.no_grad():
            outputs[task] = joint["net"].eval()(*inputs.args)
    assert len(tasks) == {"gumbel_related": 2, "soft_order": 7}.get(name, 4)
    assert len({output.sum().item() for output in outputs.values()}) > 1  # each has a head of its own


@pytest.mark.parametrize("net", [Digits, Regression])
def test_each_task_apart_uses_components_that_no_other_does(net):
    made = net(("a", "b"), "apart")
    used = [[set(gates.likely()[task]) for gates in made.routed.depths()] for task in ("a", "b")]
    hard = [[set(gates.hard[task]) for gates in made.routed.depths()] for task in ("a", "b")]
    assert all(a | b == {0, 1, 2, 3} and not a & b for a, b in zip(*hard, strict=True))
    assert all(len(on) == 4 for each in used for on in each)  # by probabilities, which do not count
    shared = net(("a", "b"), "shared")
    assert all(set(gates.hard["a"]) == {0, 1, 2, 3} for gates in shared.routed.depths())


def test_related_tasks_are_as_related_as_they_should_be():
    w = {
        (task, rho): related(task, rho, seed=5)["train"].weights
        for task in range(4)
        for rho in (0.0, 0.6, 1.0)
    }
    for rho in (0.0, 0.6, 1.0):
        for pair in (0, 2):
            assert abs(float(w[pair, rho] @ w[pair + 1, rho]) - rho) < 1e-5
        assert abs(float(w[0, rho] @ w[2, rho])) < 1e-5 and abs(float(w[1, rho] @ w[3, rho])) < 1e-5
    data = related(0, batch=8)
    data["train"].set_epoch(3)
    (x, y), (again, _) = next(iter(data["train"])), next(iter(data["train"]))
    data["train"].set_epoch(4)
    assert torch.equal(x, again) and not torch.equal(x, next(iter(data["train"]))[0])
    at = x.double() @ data["train"].weights.double()
    wanted = at + sum(torch.sin(i * at + (i - 1) ** 2) for i in range(1, 7))
    assert (y - wanted).abs().max() < 0.5  # five deviations of the noise


@pytest.mark.parametrize("order", ORDERS)
def test_orders_are_what_they_say(order):
    core = Ordered(("a", "b", "c"), order, seed=2).core
    used = {task: [gates.likely()[task][0] for gates in core.depths()] for task in ("a", "b", "c")}
    if order == "parallel":
        assert set(map(tuple, used.values())) == {(0, 1, 2, 3)}
    if order == "permuted":
        assert (
            all(sorted(each) == [0, 1, 2, 3] for each in used.values())
            and len(set(map(tuple, used.values()))) > 1
        )
    if order == "single":
        assert sorted(sum(used.values(), [])) == list(range(12))  # noqa: RUF017
    if order == "soft":
        assert all(torch.equal(gates.table(), torch.full((3, 4), 0.25)) for gates in core.depths())


def test_tables_have_one_width_and_no_example_in_two_parts(tmp_path):
    tables_in(tmp_path)
    parts = uci("iris", batch=64, folder=str(tmp_path))
    (train, _), (held, _), (tested, target) = (next(iter(parts[k])) for k in ("train", "validation", "test"))
    assert train.shape == (20, 64) and held.shape == (8, 64) and tested.shape == (12, 64)
    assert set(target.tolist()) <= {0, 1, 2} and not train[:, 5:].any()  # 1 + 3 + 1 features, then none
    torch.testing.assert_close(train[:, :5].mean(0), torch.zeros(5), rtol=0, atol=1e-5)
    other = uci("iris", batch=64, folder=str(tmp_path), split=1)["test"]
    assert not torch.equal(next(iter(other))[0], tested)
    (tmp_path / "wine.dat").write_text("1, 2, 3\n1, 2\n", encoding="utf-8")
    with pytest.raises(LoadError, match=r"wine\.dat must hold rows of one length"):
        uci("wine", folder=str(tmp_path))


def test_what_there_is_not_is_refused():
    with pytest.raises(PlanError, match=r"one of australian, .*found 'hepatitis'"):
        uci("hepatitis")
    with pytest.raises(PlanError, match="one of soft, parallel, permuted, single, found 'mixed'"):
        Ordered(("a",), "mixed")
    with pytest.raises(PlanError, match="one of gumbel, shared, apart, found 'alone'"):
        Regression(("a",), "alone")
    with pytest.raises(PlanError, match="found -1 and 1"):
        related(-1)
