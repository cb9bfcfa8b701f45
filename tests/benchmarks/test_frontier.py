"""The frontier's peers against slow references written from their papers, and its main path on tiny families."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from benchmarks.frontier.families import Batch
from benchmarks.frontier.packing import MORE, TASK, Grid, Mask, Package, Plain, leaf_bytes, pack, read, unpack
from benchmarks.frontier.peers.base import allocate
from benchmarks.frontier.peers.bitdelta import signs_of
from benchmarks.frontier.peers.grids import (
    codes_of,
    feed_back,
    groups_of,
    half_quadratic,
    middle_of,
    min_max,
    round_to,
    search_scale,
)
from benchmarks.frontier.peers.shared import factor, roots
from benchmarks.frontier.peers.tall import mask_of
from benchmarks.frontier.peers.ultradelta import prune_by_value, rates_by_variance
from benchmarks.frontier.scene import Scene, second_moments, weighted


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moment(width, seed=0):
    """Second moments of inputs that are far from independent."""
    x = drawn(4 * width, width, seed=seed) @ (drawn(width, width, seed=seed + 1) + 2 * torch.eye(width))
    return x.T @ x / len(x)


# Packing


@given(st.sampled_from((2, 3, 4, 8, 16, 32, 64, 256)), st.integers(1, 70), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_codes_come_back_from_the_bytes_that_their_levels_need(levels, count, seed):
    codes = torch.randint(levels, (count,), generator=torch.Generator().manual_seed(seed)).byte().numpy()
    packed = pack(codes, levels)
    assert (unpack(packed, levels, count) == codes).all()
    assert packed.nbytes == (-(-count // 5) if levels == 3 else -(-count * (levels - 1).bit_length() // 8))


def test_a_package_is_what_its_file_holds(tmp_path):
    shared = {"w": round_to(drawn(6, 10), 16, 4), f"w{MORE}": min_max(drawn(6, 10, seed=1), 8, None)}
    masks = {"v": round_to(drawn(4, 8), 256, 0), f"v{TASK}": round_to(drawn(4, 8, seed=2), 16, 0)}
    low = factor(drawn(6, 10, seed=3), None)
    product = round_to(low[0][:, :2].T.contiguous(), 8, 4), round_to(low[1][:2].contiguous(), 8, 4)
    from benchmarks.frontier.packing import Product

    private = {
        "a": {"w": Product(*product, (6, 10)), "v": Mask(drawn(4, 8) > 1), "n": Plain(torch.arange(3))},
        "b": {
            "w": Grid((drawn(6, 10) > 2).byte(), torch.ones(1, 1), 2, 0, (6, 10), sparse=True),
            "n": Plain(drawn(3)),
        },
    }
    package = Package({**shared, **masks}, private)
    nbytes = package.write(tmp_path / "family")
    found, wanted = read(tmp_path / "family").states(), package.states()
    assert nbytes == (tmp_path / "family").stat().st_size
    assert nbytes > sum(
        leaf_bytes(x) for leaves in (package.shared, *private.values()) for x in leaves.values()
    )
    assert list(found) == ["a", "b"]
    for member, state in wanted.items():
        assert set(found[member]) == set(state) == {"w", "v", "n"}
        assert all(torch.equal(found[member][name], state[name]) for name in state)
    base = shared["w"].value() + shared[f"w{MORE}"].value()
    torch.testing.assert_close(wanted["a"]["w"], base + product[0].value().T @ product[1].value())
    torch.testing.assert_close(
        wanted["a"]["v"], masks["v"].value() + (drawn(4, 8) > 1) * masks[f"v{TASK}"].value()
    )


# Rounding


@pytest.mark.parametrize("levels", [2, 3, 4, 16])
def test_scales_are_searched_group_by_group(levels):
    """Against a loop over groups and scales."""
    matrix, group = drawn(3, 10), 4
    grid = round_to(matrix, levels, group)
    reach = 1 if levels == 3 else levels / 2
    for row in range(3):
        for start in range(0, 10, group):
            piece = matrix[row, start : start + group]
            found = (grid.value()[row, start : start + group] - piece).square().sum()
            if levels == 2:
                padded = torch.nn.functional.pad(piece, (0, group - len(piece)))
                wanted = (piece.sign() * padded.abs().mean().bfloat16().float() - piece).square().sum()
                torch.testing.assert_close(found, wanted, rtol=0.02, atol=1e-5)
                continue
            for step in torch.linspace(1 / 3, 1.05, 16).tolist():
                scale = (step * piece.abs().max() / reach).bfloat16().float()
                low, high = (-1, 1) if levels == 3 else (-levels // 2, levels // 2 - 1)
                error = ((piece / scale).round().clamp(low, high) * scale - piece).square().sum()
                assert found <= error + 1e-6


def test_weights_decide_where_a_scale_is_exact():
    groups = drawn(5, 1, 8)
    heavy = torch.ones(8)
    heavy[3] = 1e6
    scale = search_scale(groups, 8, heavy)
    error = (codes_of(groups, scale, 8) - middle_of(8)) * scale - groups
    plain = (codes_of(groups, search_scale(groups, 8), 8) - middle_of(8)) * search_scale(groups, 8) - groups
    assert error[..., 3].square().sum() <= plain[..., 3].square().sum()


def test_min_max_reaches_from_the_least_to_the_largest_element():
    matrix = drawn(4, 6)
    low, step = matrix.min(), (matrix.max() - matrix.min()) / 7
    wanted = ((matrix - low) / step).round() * step + low
    torch.testing.assert_close(min_max(matrix, 8, None).value(), wanted, rtol=0.02, atol=0.02)


def test_half_quadratic_finds_the_zero_that_a_slow_loop_finds():
    """HQQ, Eq. (4) to (8), one group at a time."""
    matrix, levels, p = drawn(3, 8), 4, 0.7
    grid = half_quadratic(matrix, levels, 8)
    assert grid.zero is not None
    start = min_max(matrix, levels, 8)
    assert (grid.value() - matrix).abs().mean() <= (start.value() - matrix).abs().mean() * 1.01
    inverse = [(levels - 1) / float(row.max() - row.min()) for row in matrix]
    zero = [-float(row.min()) * s for row, s in zip(matrix, inverse, strict=True)]
    best, least, beta = zero, float("inf"), 10.0
    for _ in range(20):
        errors, after = [], []
        for row, s, z in zip(matrix.tolist(), inverse, zero, strict=True):
            terms = []
            for w in row:
                code = min(max(float(torch.tensor(w * s + z).round()), 0), levels - 1)
                error = w - (code - z) / s
                size = abs(error) - abs(error) ** (p - 1) / beta if error else 0.0
                shrunk = max(size, 0.0) * (1 if error > 0 else -1)
                errors.append(abs(error))
                terms.append(code - (w - shrunk) * s)
            after.append(sum(terms) / len(terms))
        if sum(errors) / len(errors) >= least:
            break
        best, least, zero, beta = zero, sum(errors) / len(errors), after, beta * 1.01
    torch.testing.assert_close(grid.zero.flatten(), torch.tensor(best), rtol=1e-4, atol=1e-4)


def test_half_quadratic_agrees_with_the_package():
    package = pytest.importorskip("hqq.core.optimize")
    matrix, levels = drawn(16, 64), 8
    low, high = matrix.amin(1, keepdim=True), matrix.amax(1, keepdim=True)
    scale = (levels - 1) / (high - low)
    codes, found_scale, zero = package.optimize_weights_proximal_legacy(
        matrix, scale, -low * scale, [0, levels - 1], axis=1, device="cpu"
    )[:3]
    grid = half_quadratic(matrix, levels, 0)
    assert grid.zero is not None
    theirs = (codes.float() - zero.float()) / found_scale.float()
    ours = (grid.codes.float() - grid.zero) * grid.scale
    assert (ours - matrix).abs().mean() == pytest.approx(float((theirs - matrix).abs().mean()), rel=0.01)


@pytest.mark.parametrize("group", [0, 4])
def test_error_feedback_is_that_of_a_column_by_column_elimination(group):
    """GPTQ against its definition: round a column, put what is left into the others, take it out of the Hessian."""
    matrix, h, levels = drawn(3, 10), moment(10), 8
    grid = feed_back(matrix, h, levels, group)
    left = matrix.double().clone()
    damped = h.double() + 0.01 * h.double().diagonal().mean() * torch.eye(10)
    rounded = torch.zeros_like(left)
    for k in range(10):
        size = group or 10
        if k % size == 0:
            scale = search_scale(left[:, k : k + size].float(), levels).double()
        code = codes_of(left[:, k : k + 1].float(), scale.float(), levels).double()
        rounded[:, k : k + 1] = (code - middle_of(levels)) * scale
        rest = torch.linalg.inv(damped[k:, k:])  # of the columns that are not rounded yet
        error = (left[:, k] - rounded[:, k]) / rest[0, 0]
        left[:, k:] -= error.unsqueeze(1) * rest[0].unsqueeze(0)
    torch.testing.assert_close(grid.value().double(), rounded, rtol=1e-4, atol=1e-4)


@given(st.integers(0, 20), st.sampled_from((3, 8, 16)), st.sampled_from((0, 4)))
@settings(max_examples=20, deadline=None)
def test_error_feedback_with_an_identity_hessian_is_plain_rounding(seed, levels, group):
    matrix = drawn(4, 12, seed=seed)
    plain = round_to(matrix, levels, group)
    assert torch.equal(feed_back(matrix, torch.eye(12), levels, group).codes, plain.codes)


@pytest.mark.parametrize("order", [False, True])
def test_error_feedback_moves_outputs_less(order):
    matrix, h = drawn(24, 32), moment(32)
    fed = feed_back(matrix, h, 8, 0, order=order).value() - matrix
    plain = round_to(matrix, 8, 0).value() - matrix
    assert weighted(fed, h) < 0.7 * weighted(plain, h)


# Differences


@given(st.integers(0, 20), st.integers(1, 6))
@settings(max_examples=20, deadline=None)
def test_whitened_factors_are_the_best_of_their_rank(seed, rank):
    """What is left is the tail of the spectrum, and no more than any other factors of that rank leave."""
    difference, h = drawn(8, 6, seed=seed), moment(6, seed)
    left, right, energy = factor(difference, h)
    error = difference - left[:, :rank] @ right[:rank]
    torch.testing.assert_close(weighted(error, h), energy[rank:].sum(), rtol=1e-3, atol=1e-3)
    plain = factor(difference, None)
    other = difference - plain[0][:, :rank] @ plain[1][:rank]
    assert weighted(error, h) <= weighted(other, h) * 1.001 + 1e-4
    torch.testing.assert_close(left @ right, difference, rtol=1e-3, atol=1e-3)  # full rank is exact


def test_roots_of_a_singular_moment_are_finite():
    x = drawn(3, 8)
    root, back = roots(x.T @ x)
    assert root.isfinite().all() and back.isfinite().all()
    torch.testing.assert_close(root @ back, torch.eye(8), rtol=1e-3, atol=1e-3)


def test_signs_have_the_scale_that_is_nearest():
    """BitDelta, Eq. (3): the mean of absolute values."""
    difference = drawn(5, 7)
    codes, scale = signs_of(difference)
    signs = codes.float() * 2 - 1
    errors = [
        float((difference - other * signs).square().sum()) for other in (scale, 0.9 * scale, 1.1 * scale)
    ]
    assert errors[0] == min(errors) and scale == difference.abs().mean()
    assert torch.equal(signs, difference.sign())


def test_masks_keep_what_is_nearer_to_the_common_vector():
    own, every = drawn(4, 5), drawn(4, 5, seed=1)
    for weight in (0.2, 1.0):
        wanted = [
            [abs(a) >= weight * abs(b - a) for a, b in zip(*rows, strict=True)]
            for rows in zip(own.tolist(), every.tolist(), strict=True)
        ]
        assert mask_of(own, every, weight).tolist() == wanted


@given(st.floats(0.1, 0.9), st.integers(0, 5))
@settings(max_examples=20, deadline=None)
def test_pruning_takes_the_same_share_of_each_value(rate, seed):
    codes = torch.randint(4, (40, 50), generator=torch.Generator().manual_seed(seed)).byte()
    pruned = prune_by_value(codes, rate, 2, torch.Generator().manual_seed(seed))
    kept = [float((pruned == value).sum() / (codes == value).sum()) for value in (0, 1, 3)]
    assert max(kept) - min(kept) < 0.01
    already = float((codes == 2).double().mean())
    assert float((pruned == 2).double().mean()) == pytest.approx(max(rate, already), abs=0.01)
    assert ((pruned == codes) | (pruned == 2)).all()


def test_rates_of_pruning_fall_with_variance_and_have_the_mean_that_was_asked():
    differences = {
        name: scale * drawn(10, 10, seed=n)
        for n, (name, scale) in enumerate({"a": 3, "b": 1, "c": 2}.items())
    }
    rates = rates_by_variance(differences, 0.8, 0.1)
    assert rates["b"] > rates["c"] > rates["a"]
    assert sum(rates.values()) / 3 == pytest.approx(0.8)


# What methods see, and how bytes are shared out


def test_second_moments_are_those_of_each_part_s_inputs():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.lstm = nn.Embedding(7, 6), nn.LSTM(6, 5, batch_first=True)
            self.conv, self.out = nn.Conv1d(5, 4, 1), nn.Linear(5, 3)

        def forward(self, ids):
            return self.out(self.lstm(self.table(ids))[0])

    net, ids = Net().eval(), torch.randint(7, (70, 4), generator=torch.Generator().manual_seed(0))
    found = second_moments(net, Batch(torch.zeros(70), (), {"ids": ids}))
    with torch.no_grad():
        x = net.table(ids)
        hidden = net.lstm(x)[0]
    mean = lambda t: t.reshape(-1, t.shape[-1]).T @ t.reshape(-1, t.shape[-1]) / t[..., 0].numel()  # noqa: E731
    assert set(found) == {"table.weight", "lstm.weight_ih_l0", "lstm.weight_hh_l0", "out.weight"}
    torch.testing.assert_close(found["table.weight"], torch.bincount(ids.flatten(), minlength=7) / 280)
    torch.testing.assert_close(found["lstm.weight_ih_l0"], mean(x))
    torch.testing.assert_close(found["lstm.weight_hh_l0"], mean(hidden[:, :-1]))
    torch.testing.assert_close(found["out.weight"], mean(hidden))


def test_second_moments_of_a_convolution_price_its_errors():
    conv, pictures = nn.Conv2d(2, 3, 3, stride=2, padding=1, bias=False), drawn(5, 2, 8, 8)
    h = second_moments(nn.Sequential(conv), Batch(torch.zeros(5), (pictures,)))["0.weight"]
    error = drawn(3, 2, 3, 3)
    moved = nn.functional.conv2d(pictures, error, stride=2, padding=1)
    torch.testing.assert_close(
        weighted(error.flatten(1), h), moved.square().sum(1).mean(), rtol=1e-4, atol=1e-4
    )


@given(
    st.lists(
        st.lists(st.tuples(st.integers(1, 9), st.floats(0, 9)), min_size=1, max_size=4),
        min_size=1,
        max_size=4,
    )
)
@settings(max_examples=80, deadline=None)
def test_an_allocation_fits_wherever_one_can(options):
    smallest = sum(min(nbytes for nbytes, _ in each) for each in options)
    assert allocate(options, smallest - 1) is None
    last = None
    for budget in (smallest, smallest + 3, 100):
        chosen = allocate(options, budget)
        assert chosen is not None
        assert sum(each[k][0] for each, k in zip(options, chosen, strict=True)) <= budget
        last = sum(each[k][1] for each, k in zip(options, chosen, strict=True))
    assert last == pytest.approx(sum(min(error for _, error in each) for each in options))


def test_seconds_of_a_setting_count_what_others_made_once(monkeypatch):
    from types import SimpleNamespace

    clock = [0.0]
    monkeypatch.setattr("benchmarks.frontier.scene.time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def work():
        clock[0] += 5

    scene = Scene({}, None)
    slow = lambda: scene.once("slow", work)  # noqa: E731
    outer = lambda: scene.once("outer", lambda: (slow(), slow()))  # noqa: E731
    _, first = scene.timed(lambda: (outer(), slow()))
    _, second = scene.timed(outer)
    assert first == second == 5


def test_groups_are_runs_of_a_row():
    groups = groups_of(torch.arange(10.0).view(2, 5), 2)
    assert groups.tolist() == [[[0, 1], [2, 3], [4, 0]], [[5, 6], [7, 8], [9, 0]]]


# The main path


@pytest.fixture
def run(capsys, tmp_path):
    from benchmarks.frontier.__main__ import main

    threads = torch.get_num_threads()

    def go(*arguments):
        main(["--fast", "--json", "--threads", "1", "--cache", str(tmp_path), *arguments])
        return json.loads(capsys.readouterr().out)

    yield go
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_the_frontier_of_a_tiny_family(run, tmp_path):
    table, plot = tmp_path / "t.csv", tmp_path / "t.png"
    options = ("--sizes", "0.4", "--finalists", "2", "--members", "2")
    document = run("--methods", "surgery", "rounding", *options, "--csv", str(table), "--plot", str(plot))
    rows = document["results"]
    assert [row["method"] for row in rows] == ["rounding", "surgery", "surgery, calibrated"]
    for row in rows:
        assert row["of fp32"] <= 0.4 and 0 < row["error"] <= row["worst error"] < 1
        assert min(row["load s"], row["make s"], row["one more"]) > 0
    assert len(table.read_text().splitlines()) == 1 + len(rows)
    assert plot.read_bytes().startswith(b"\x89PNG")
    again = run("--methods", "rounding", "mean + low rank", "TVQ", *options)
    assert again["verdicts"][0].endswith("trained in 0 s (0: from the cache)")
    assert again["results"][0]["error"] == rows[0]["error"]


@pytest.mark.parametrize("name", ["sentiment", "mhc", "noise"])
def test_families_have_members_data_and_scores(name, tmp_path):
    from benchmarks.frontier.families import make_family
    from benchmarks.frontier.measure import Judge

    family = make_family(name, tmp_path, 0, fast=True)
    again = make_family(name, tmp_path, 0, fast=True)
    judge = Judge(family)
    same = judge.judge(again.states, "test")
    assert same.error == 0 and set(same.errors) == set(family.states) and len(family.states) >= 2
    assert set(judge.scores()) == set(family.states)
    other = make_family(name, tmp_path, 1, fast=True)
    assert judge.judge(other.states, "validation").error > 0
    for task in family.tasks.values():
        assert len(task.calibration) and len(task.validation) and len(task.test)
