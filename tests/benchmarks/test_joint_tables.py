"""The command of joint training's tables: rates are chosen by validation, whole seeds count, groupings are compared."""

import json
from types import SimpleNamespace

import pytest

from benchmarks.joint_runs import WIDTHS, Runs, changes_of, crossmodal_job, known_method
from benchmarks.joint_tables import (
    FACTORS,
    RATES,
    TUNING,
    _scaled,
    always_of,
    best_alone,
    best_factors,
    joint_sets,
    measured,
    share_of_all,
    share_of_sites,
    show_crossmodal,
    sizes,
    sweep_of,
    verdicts,
)
from benchmarks.recipe_runs import members_of
from benchmarks.synthetic import rand_index

MEMBERS = members_of("crossmodal_small")


def entry(job, loss):
    scores = {name: {"loss": loss, "metric": None} for name in job["members"]}
    return {"scores": scores, "tests": scores, "numbers": [3, 4], "seconds": 1.0}


def test_rates_and_factors_of_least_validation_loss_are_measured(tmp_path):
    path, lines = tmp_path / "results.jsonl", []
    for name in MEMBERS:
        for rate in RATES:
            job = crossmodal_job("single", [name], TUNING, {name: rate})
            lines.append((job, 2.0 if rate == 3e-3 else 3.0))
    rates = dict.fromkeys(MEMBERS, 3e-3)
    results = [(job, entry(job, x)) for job, x in lines]
    for factor in FACTORS:  # the first member likes the highest, the others the lowest
        job = _scaled("order", MEMBERS, TUNING, rates, factor)
        result = entry(job, factor)
        result["scores"] = {**result["scores"], MEMBERS[0]: {"loss": 1 / factor, "metric": None}}
        results.append((job, result))
    path.write_text("".join(json.dumps({"job": job, "result": x}) + "\n" for job, x in results))
    runs = Runs(path, 1, 1.0)
    assert best_alone(runs, MEMBERS, [TUNING]) == rates
    best = best_factors(runs, "order", MEMBERS, rates, [TUNING])
    assert list(best.values()) == [max(FACTORS), min(FACTORS), min(FACTORS)]
    options = SimpleNamespace(
        methods=["single", "order"], tuning=1, seeds=2, first=10, factors=FACTORS, recipe="crossmodal_small"
    )
    assert "no run is there" in show_crossmodal(runs, options)
    for method in options.methods:
        for job in measured(runs, method, MEMBERS, [TUNING], 10):
            runs.found[json.dumps(job, sort_keys=True)] = entry(job, 1.5)
    table = show_crossmodal(runs, options)
    assert "factors of order: lenet 3, lstm 0.3, deepbind 0.3" in table
    assert table.count("| single |") == len(MEMBERS)


def test_what_is_not_as_ever_is_part_of_what_identifies_a_run(tmp_path):
    options = SimpleNamespace(fast=False, device="cpu", recipe="crossmodal_small", changes=[])
    assert always_of(options) == {}
    options.device, options.recipe, options.changes = "cuda", "pair.yaml", ["train.steps=2"]
    assert always_of(options) == {"device": "cuda", "recipe": "pair.yaml", "changes": ["train.steps=2"]}
    job = crossmodal_job("hard", MEMBERS, 10, dict.fromkeys(MEMBERS, 1e-3))
    runs = Runs(tmp_path / "results.jsonl", 1, 1.0, always_of(options))
    runs.found[json.dumps({**job, **always_of(options)}, sort_keys=True)] = entry(job, 1.0)
    assert runs.of(job) is not None
    assert Runs(tmp_path / "none.jsonl", 1, 1.0).of(job) is None


def test_groupings_are_compared_beyond_chance():
    assert rand_index([1, 1, 2, 2, 3], [7, 7, 8, 8, 9]) == 1.0
    assert rand_index([1, 2, 1, 2], [1, 1, 2, 2]) == pytest.approx(-0.5)
    from sklearn.metrics import adjusted_rand_score

    one, other = [0, 0, 1, 2, 2, 2, 1, 0], [1, 1, 1, 2, 2, 0, 0, 0]
    assert rand_index(one, other) == pytest.approx(adjusted_rand_score(other, one))


def test_prices_and_smaller_nets_are_methods():
    for method in ("price=0.1", "smaller=0.4", "hard", "atoms=100", "rewards=0.3"):
        assert known_method(method) == method
    for wrong in ("price=-1", "atoms=0", "atoms=0.5", "smaller=0", "smaller=2", "unknown", "price=much"):
        with pytest.raises(ValueError, match=r"a method is|could not convert"):
            known_method(wrong)
    assert changes_of("price=0.1", MEMBERS)[0]["train"] == {
        "evolution": {"price": 0.1, "fraction": None, "alpha": None},
        "stopping": {"best": "regret"},
    }
    assert changes_of("own=0.1", MEMBERS)[0]["train"] == {
        "evolution": {"price": 0.1, "fraction": None, "alpha": None},
        "stopping": {"best": "member"},
    }
    assert changes_of("rewards=0.1", MEMBERS)[0]["train"]["evolution"]["judge"] == "rewards"
    assert changes_of("atoms=100", MEMBERS)[0]["parameters"] == {"context": 100}
    change, own = changes_of("smaller=0.25", ["lstm"])
    assert own == ["models.0.model=surgery_recipes.nets:word_model?words=2000&width=32"]
    assert change["train"]["evolution"] == {"codes": "ones", "change": "none"}
    assert joint_sets(["single", "smaller=0.4", "price=0.1"], MEMBERS) == [
        *(("smaller=0.4", (name,)) for name in MEMBERS),
        ("price=0.1", MEMBERS),
    ]
    assert sweep_of("price=0.3") == "price=0.1" and sweep_of("hard") == "hard"


def test_widths_have_the_share_of_the_sites_parameters_that_is_asked_for():
    for share in (0.4, 0.65):
        for name, width in WIDTHS.items():
            sites, all_of_it = sizes(name, width)
            own = sizes(name, round(width * share**0.5))
            assert own[0] / sites == pytest.approx(share, abs=0.04)
            assert share_of_sites(f"smaller={share}", [name]) == own[0] / sites
            assert own[0] + own[1] < sites + all_of_it
    assert share_of_all("price=0.1", MEMBERS, 1.0) == 1.0
    assert share_of_all("price=0.1", MEMBERS, 0.5) > share_of_all("smaller=0.5", MEMBERS, 0.5)


def test_a_verdict_names_who_is_worse_and_who_is_clearly_better():
    def row(method, members, task, mean, p):
        return {"method": method, "members": members, "task": task, "mean": mean, "p against single": p}

    rows = [row("single", name, name, 0.5, None) for name in MEMBERS]
    rows += [
        row("price=0.1", "+".join(MEMBERS), name, mean, p)
        for name, mean, p in zip(MEMBERS, (0.4, 0.5, 0.6), (0.01, None, 0.04), strict=True)
    ]
    (line,) = verdicts(rows, MEMBERS)
    assert line == (
        "price=0.1: mean no worse than alone in lenet, lstm; p < 0.05: lenet better, deepbind worse"
    )
