"""Methods that replace modules: one from outside the package, as docs/add_a_method.md has it, through everything."""

import copy
import json
import pickle

import pytest
import torch
import yaml
from command_line import surgery as command
from ended_runs import stopped_at
from module_methods import NAME, X, joined, layer, member, net, page_code, run, same, scaled_copy
from torch import nn

import surgery
from surgery.artifact.verify import verify
from surgery.errors import PlanError, TrainingError
from surgery.inputs.probes import outputs_over, probe_inputs, relative_error
from surgery.members.replacement import Replacement
from surgery.pipeline.train import prepare_again, rejoin, train_recipe
from surgery.training.loop.interruptions import Interrupted
from surgery.training.tasks.streams import Batches
from surgery.training.tasks.task_losses import losses_of
from surgery.training.tasks.tasks import as_batch

pytestmark = pytest.mark.filterwarnings("error:.*saved as a live module.*")

TRAINING = {
    "steps": 3, "burn_in": 1, "generations": 2, "final": 0, "save_seconds": 0,
    "optimizer": {"lr": 0.02, "schedule": "constant", "warmup": 0},
}  # fmt: skip


def bits(joint):
    return {name: value for name, value in joint.state_dict().items()}


# -- planned and joined ----------------------------------------------------------------------------------------


def test_a_plan_shows_replacements_and_leaves_the_module_as_it_was():
    module = net()
    before = copy.deepcopy(module)
    plan = surgery.plan_modules([member(module)], NAME, {"copies": {"layers.3": "layers.1"}}, block=(8, 8))
    assert plan.replacements == (Replacement("net", "layers.3", NAME, {"of": "layers.1"}, NAME),)
    assert "layers.3 of 'net': replaced by scaled_copy" in repr(plan)
    assert type(layer(module, 3)) is nn.Linear and same(module.state_dict(), before.state_dict())
    owners = [p.site.owners for p in plan.placements]
    assert owners == [
        ("layers.0.weight",), ("layers.1.weight", "layers.3.other.weight"), ("layers.2.weight",),
    ]  # fmt: skip
    assert "layers.3.scale" in {each.name for each in plan.left_alone}


def test_by_default_the_nearest_layer_of_one_structure_is_copied():
    plan = surgery.plan_modules([member()], NAME, block=(8, 8))
    assert [(each.path, each.settings) for each in plan.replacements] == [("layers.3", {"of": "layers.2"})]


def test_a_replaced_member_computes_what_the_method_says():
    joint, expected = joined(), net()
    expected.layers[3] = scaled_copy.ScaledCopy(expected.layers[1])
    assert torch.equal(run(joint["net"]), run(expected))
    assert torch.equal(run(joint.original("net")), run(net()))
    assert "1 module replaced" in repr(joint)
    layer(joint["net"], 3).scale.data.fill_(0.5)
    assert torch.equal(run(joint.original("net")), run(net()))


def test_replacements_are_made_in_their_order_each_with_those_before_it():
    copies = {"layers.1": "layers.0", "layers.3": "layers.1", "layers.2": "layers.0"}
    joint = joined(copies=copies)
    layers = joint["net"].layers
    assert layers[3].other is layers[1] and layers[1].other is layers[2].other is layers[0]
    assert torch.equal(run(joint.original("net")), run(net()))


def test_copies_pickles_states_and_moves():
    joint = joined()
    layer(joint["net"], 3).scale.data.fill_(0.7)
    expected = run(joint["net"])
    for twin in (copy.deepcopy(joint), pickle.loads(pickle.dumps(joint))):
        assert torch.equal(run(twin["net"]), expected)
        assert torch.equal(run(twin.original("net")), run(net()))
    fresh = joined(net(1))
    fresh.load_state_dict(joint.state_dict())
    assert torch.equal(run(fresh["net"]), expected)
    joint.to(torch.float64)
    assert (
        run(joint["net"], X.double()).dtype == run(joint.original("net"), X.double()).dtype == torch.float64
    )
    joint.to(torch.float32)
    assert torch.equal(run(joint["net"]), expected)
    module = copy.deepcopy(fresh["net"])
    assert torch.equal(run(module), expected) and isinstance(layer(module, 3), scaled_copy.ScaledCopy)


def test_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"member": member()}
    exec(page_code("import surgery\n\nplan = surgery.plan_modules"), names)
    assert names["joint"].report.met and surgery.verify("joint", modules={"net": net()}).files == {}


# -- fitted and trained ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [{}, {"max_error": 0.8}])
def test_errors_are_measured_against_the_member_as_it_was(target):
    joint = joined()
    probes = probe_inputs(joint.members["net"], seed=0)
    surgery.fit(joint, **target)
    measured = relative_error(outputs_over(net(), probes), outputs_over(joint["net"], probes))
    assert joint.report.errors["net"] == pytest.approx(measured, rel=1e-4)
    words = "1 module replaced by scaled_copy"
    assert measured > 0.1 and joint.report.met
    assert joint.report.target == (f"max-error 0.8 with {words}" if target else words)
    assert joint.report.saved["precision"] == 0 or target
    assert joint.members["net"].replaced[0].original is None
    whole = [p.numel() for p in net().parameters()]
    assert joint.report.original_bytes == {"net": 4 * sum(whole)} and joint.report.parameters["net"] == sum(
        whole
    )
    assert joint.report.saved["replacing"] == 4 * (16 * 16 + 16 - 1)
    assert sum(joint.report.saved.values()) == 4 * sum(whole) - joint.report.stored_bytes


def test_a_fit_that_fails_leaves_the_joint_model_as_it_was():
    joint = joined()
    before = bits(joint)
    unmet = (
        r"An error of {} cannot be met with 1 module replaced by scaled_copy: in the members' precision the "
    )
    unmet += (
        r"output of net moves by 0\.\d+. Change the `settings` of the method, or use a larger `max_error`."
    )
    for target, words in (
        (
            {"budget": 1e-6},
            "A budget of 1e-06 cannot be met with 1 module replaced by scaled_copy: the smallest",
        ),
        ({"max_error": 0.01}, unmet.format(r"0\.01")),
        ({"max_error": 0}, unmet.format(0)),
    ):
        with pytest.raises(PlanError, match=words):
            surgery.fit(joint, **target)
        assert same(bits(joint), before) and torch.equal(run(joint.original("net")), run(net()))
        assert joint.report is None


def tasks(weight=0.5):
    y = (X.sum(1) > 0).long()
    return [
        surgery.Task(
            "classes", "net", Batches(X, y, 8), {"cross_entropy": 1.0, "distillation": weight}, "accuracy",
            validation=Batches(X, y, 8, shuffle=False),
        )
    ]  # fmt: skip


def test_distillation_is_from_the_member_as_it_was():
    joint = joined()
    task = surgery.Task("as before", "net", Batches(X, X, 24), "distillation")
    loss = losses_of(joint, [task])["as before"]
    surgery.train(joint, [task], {**TRAINING, "generations": 0}, cpu=True)
    assert float(loss(run(net()), as_batch((X, None)))) == 0
    assert float(loss(run(joint["net"]), as_batch((X, None)))) > 0


def test_an_interrupted_run_ends_as_an_unbroken_one(tmp_path):
    unbroken = joined()
    surgery.train(unbroken, tasks(), TRAINING, cpu=True)
    scale = float(layer(unbroken["net"], 3).scale)
    assert scale != 1.0 and unbroken.members["net"].replaced[0].original is None
    with stopped_at(5), pytest.raises(Interrupted):
        surgery.train(joined(), tasks(), TRAINING, folder=tmp_path, cpu=True)
    other = joined(copies={"layers.3": "layers.2"})
    with pytest.raises(TrainingError, match="replaced modules"):
        surgery.train(other, tasks(), TRAINING, folder=tmp_path, resume=True, cpu=True)
    resumed = joined()
    surgery.train(resumed, tasks(), TRAINING, folder=tmp_path, resume=True, cpu=True)
    assert same(resumed.collapse("net"), unbroken.collapse("net"))


# -- by recipes ------------------------------------------------------------------------------------------------


def recipe(tmp_path, **more):
    (tmp_path / "own.py").write_text(
        "import torch\nfrom module_methods import net\n"
        "def make():\n    return net(), (torch.linspace(-1, 1, 48).reshape(8, 6),)\n"
        "def data():\n    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))\n"
        "    y = (x.sum(1) > 0).long()\n    return [(x[:8], y[:8]), (x[8:], y[8:])]\n"
    )
    task = {"data": f"{tmp_path}/own.py:data", "loss": {"cross_entropy": 1.0, "distillation": 1.0}}
    settings = {"copies": {"layers.3": "layers.1"}}
    model = {
        "model": f"{tmp_path}/own.py:make",
        "name": "net",
        **({"tasks": [task]} if "train" in more else {}),
    }
    given = {"models": [model], "method": NAME, "settings": settings, "parameters": {"block": "8x8"}}
    return {**given, "out": f"{tmp_path}/joint", **more}


def test_a_merge_by_recipe_and_its_dry_run(tmp_path):
    document = recipe(tmp_path, select={"skip": ["layers.3.scale"]})
    document["parameters"] |= {"max_error": 0.8}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(document))
    code, said, _ = command("merge", "--config", str(tmp_path / "recipe.yaml"), "--dry-run")
    assert code == 0 and "layers.3" in said and "of: layers.1" in said and not (tmp_path / "joint").exists()
    code, said, _ = command("merge", "--config", str(tmp_path / "recipe.yaml"), "--dry-run", "--json")
    assert code == 0 and json.loads(said)["replacements"][0]["settings"] == {"of": "layers.1"}
    code, said, _ = command("merge", "--config", str(tmp_path / "recipe.yaml"))
    assert code == 0 and "replacing" in said and "1.1 kB" in said
    joint = surgery.merge(surgery.Recipe.of(document), overwrite=True)
    again = surgery.load(tmp_path / "joint", trust_remote_code=True)
    assert torch.equal(run(again["net"]), run(joint["net"])) and joint.report.met
    assert joint.recipe.target == ("max_error", 0.8)
    wrong = surgery.Recipe.of({**document, "out": None, "settings": {"copies": {"layers.9": "layers.1"}}})
    with pytest.raises(PlanError, match=r"'net' has no module 'layers.9': did you mean"):
        surgery.merge(wrong)


@pytest.mark.parametrize("parameters", [{"max_error": 0.01}, {"max_error": 0}, {"budget": 0.001}])
def test_a_bound_that_cannot_be_met_is_refused_and_nothing_is_written(tmp_path, parameters):
    document = recipe(tmp_path)
    document["parameters"] |= parameters
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(document))
    code, _, said = command("merge", "--config", str(tmp_path / "recipe.yaml"))
    assert code == 2 and "cannot be met with 1 module replaced by scaled_copy: " in " ".join(said.split())
    assert not (tmp_path / "joint").exists()


def test_a_merge_without_target_makes_what_settings_fix(tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe(tmp_path)))
    code, said, _ = command("merge", "--config", str(tmp_path / "recipe.yaml"), "--dry-run")
    words = "1 module replaced by scaled_copy"
    assert code == 0 and f"Would be fitted: {words}, everything else as it is" in " ".join(said.split())
    code, said, _ = command("merge", "--config", str(tmp_path / "recipe.yaml"))
    assert code == 0 and f"Target {words}: met" in " ".join(said.split())
    again = surgery.load(tmp_path / "joint", trust_remote_code=True)
    place = {f"layers.{i}": f"layers.{1 if i == 3 else i}" for i in range(4)}
    before = net().state_dict()
    for path, source in place.items():
        assert torch.equal(again.collapse("net")[f"{path}.weight"], before[f"{source}.weight"])
    assert again.recipe.parameters.given() == []
    assert verify(tmp_path / "joint", origins=True, trust_remote_code=True).ok


def test_a_recipe_trains_and_what_it_made_is_trained_further(tmp_path):
    train = {"steps": 2, "generations": 1, "burn_in": 0, "optimizer": {"lr": 0.01}}
    joint, report = train_recipe(surgery.Recipe.of(recipe(tmp_path, train=train)), cpu=True)
    assert joint.members["net"].replaced and report.generations
    folder, given = tmp_path / "joint", surgery.Recipe.of(recipe(tmp_path, train=train, out=None))
    again = rejoin(folder, given, own=True, trust_remote_code=True)
    assert [each.path for each in again.members["net"].replaced] == ["layers.3"]
    assert torch.equal(run(again["net"]), run(joint["net"]))
    further, _ = train_recipe(given, joint=again, cpu=True)
    assert not same(further.collapse("net"), joint.collapse("net"))
    assert prepare_again(folder, given, trust_remote_code=True).plan.replacements == ()
