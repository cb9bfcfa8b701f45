"""Learning rates of members: from recipes and tasks to the optimizer's groups, refused where tasks contradict."""

from dataclasses import replace

import pytest
import training_nets

from surgery.errors import PlanError
from surgery.settings.recipe import Recipe
from surgery.training.checking import check_run
from surgery.training.loop.optimizers import make_optimizer

DOCUMENT = {
    "models": [
        {"model": "m.py:one", "name": "a", "lr": 0.01, "tasks": [{"data": "d.py:data"}]},
        {"model": "m.py:two", "name": "b", "tasks": [{"data": "d.py:data", "lr": 0.002}]},
    ]
}


def test_a_recipe_keeps_rates_that_are_given_and_says_nothing_of_others():
    found = Recipe.of({**DOCUMENT, "train": {}}).resolved()["models"]
    assert found[0]["lr"] == 0.01 and "lr" not in found[0]["tasks"][0]
    assert "lr" not in found[1] and found[1]["tasks"][0]["lr"] == 0.002
    assert "lr" not in Recipe.of({"models": [{"model": "timm:resnet18"}]}).resolved()["models"][0]


def test_private_parameters_of_a_member_learn_at_its_rate():
    joint, tasks = training_nets.build(), training_nets.tasks()
    tasks[1] = replace(tasks[1], lr=0.05)
    training = check_run(joint, tasks, {"optimizer": {"lr": 0.01}}, None, None, 0)[0]
    assert training.optimizer.rates == {"b": 0.05}
    groups = [g for g in make_optimizer(joint, training.optimizer).param_groups if g["role"] == "private"]
    rates = {id(p): g["lr"] for g in groups for p in g["params"]}
    for name, rate in (("a", 0.01), ("b", 0.05)):
        assert {rates[id(p)] for p in joint.private(name).values()} == {rate}


def test_without_rates_there_is_one_group_in_the_order_that_states_know():
    joint = training_nets.build()
    training = check_run(joint, training_nets.tasks(), {}, None, None, 0)[0]
    (group,) = [g for g in make_optimizer(joint, training.optimizer).param_groups if g["role"] == "private"]
    assert [id(p) for p in group["params"]] == [id(p) for p in joint.trained_private()]


def test_rates_that_contradict_or_are_of_nobody_are_named():
    joint, tasks = training_nets.build(), training_nets.tasks()
    tasks += [replace(tasks[0], name="again", lr=0.1)]
    config = {"optimizer": {"rates": {"nobody": 0.1}}}
    with pytest.raises(PlanError, match=r"must have one learning rate.*nobody"):
        check_run(joint, tasks, config, None, None, 0)
    with pytest.raises(PlanError, match="not above 0"):
        check_run(joint, [replace(tasks[0], lr=-1.0)], {}, None, None, 0)
