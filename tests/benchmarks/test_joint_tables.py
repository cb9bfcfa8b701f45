"""The command of joint training's tables: rates are chosen by validation, whole seeds count, groupings are compared."""

import json
from types import SimpleNamespace

import pytest

from benchmarks.joint_tables import (
    FACTORS,
    RATES,
    TUNING,
    Runs,
    _scaled,
    best_alone,
    best_factor,
    crossmodal_job,
    measured,
    show_crossmodal,
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
    for factor in FACTORS:
        lines.append((_scaled("order", MEMBERS, TUNING, rates, factor), 1.0 / factor))
    path.write_text("".join(json.dumps({"job": job, "result": entry(job, x)}) + "\n" for job, x in lines))
    runs = Runs(path, 1, 1.0)
    assert best_alone(runs, MEMBERS, [TUNING]) == rates
    assert best_factor(runs, "order", MEMBERS, rates, [TUNING]) == max(FACTORS)
    options = SimpleNamespace(methods=["single", "order"], tuning=1, seeds=2)
    assert "no seed is complete" in show_crossmodal(runs, options)
    for job in measured(runs, options.methods, MEMBERS, [TUNING], 0):
        runs.found[json.dumps(job, sort_keys=True)] = entry(job, 1.5)
    table = show_crossmodal(runs, options)
    assert "factor of order, lenet+lstm+deepbind: 3" in table and table.count("| single |") == len(MEMBERS)


def test_groupings_are_compared_beyond_chance():
    assert rand_index([1, 1, 2, 2, 3], [7, 7, 8, 8, 9]) == 1.0
    assert rand_index([1, 2, 1, 2], [1, 1, 2, 2]) == pytest.approx(-0.5)
    from sklearn.metrics import adjusted_rand_score

    one, other = [0, 0, 1, 2, 2, 2, 1, 0], [1, 1, 1, 2, 2, 0, 0, 0]
    assert rand_index(one, other) == pytest.approx(adjusted_rand_score(other, one))
