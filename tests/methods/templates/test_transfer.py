"""Transfer: templates of a trained joint model serve a new task."""

from dataclasses import replace

import pytest
import torch
from nets import made
from stacked_nets import network, task
from torch import nn

import surgery
from surgery.anatomy.sites import discover
from surgery.core.joining import join
from surgery.core.sizes import parameters_trained
from surgery.errors import LoadError, PlanError
from surgery.methods.templates.plan import plan_templates
from surgery.methods.templates.training import stacks_of
from surgery.methods.templates.transfer import candidates, transfer
from surgery.pipeline.trial import begin_from_source, best_of, load_source
from surgery.settings.training import TemplateSettings, Training
from surgery.training.tasks.tasks import Task
from surgery.training.train import train

MIXED = {"start": "random", "sure": 0.6}


def joined(*members, templates=3):
    return join(members, plan_templates([discover(each) for each in members], (4, 4), 2, templates=templates))


def source():
    """Two members of one architecture, trained a little on templates that they share."""
    members = []
    for name, seed in (("one", 1), ("other", 2)):
        member = network()
        with torch.no_grad():
            for p in member.module.parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)))
        members.append(surgery.load_member(member.module, name=name, inputs=member.inputs.args))
    joint = joined(*members)
    data = task().data
    tasks = [Task(name, name, data, "cross_entropy") for name in ("one", "other")]
    config = {"steps": 4, "generations": 2, "final": 0, "templates": MIXED, "optimizer": {"lr": 0.02}}
    train(joint, tasks, config, cpu=True)
    return joint


@pytest.fixture(scope="module")
def states():
    return source().collapse()


@pytest.mark.parametrize("like", ["one", "other"])
def test_a_new_member_begins_as_the_source_s(states, like):
    joint = joined(network())
    transfer(joint, states, like, TemplateSettings(), seed=0)
    state = joint.collapse("net")
    for key, tensor in states[like].items():
        torch.testing.assert_close(state[key], tensor, rtol=1e-4, atol=1e-5)
    (banks,) = stacks_of(joint).values()
    assert all(bank.rows.shape[0] == 3 and bank.locations == 4 for bank in banks.values())


def test_a_head_of_another_shape_stays_new(states):
    one = network()
    one.module[6] = nn.Linear(16, 5)
    head = one.module[6].weight.detach().clone()
    joint = joined(one)
    transfer(joint, states, "one", TemplateSettings(), seed=0)
    state = joint.collapse("net")
    assert torch.equal(state["6.weight"], head)
    torch.testing.assert_close(state["0.weight"], states["one"]["0.weight"])


def test_only_mixtures_norms_and_head_are_trained(states):
    joint = joined(network())
    settings = TemplateSettings(freeze=True, lr=0.3)
    transfer(joint, states, "one", settings, seed=0)
    rows = {key: bank.rows.detach().clone() for b in stacks_of(joint).values() for key, bank in b.items()}
    before = {key: tensor.clone() for key, tensor in joint.collapse("net").items()}
    config = Training(
        steps=4, generations=2, final=0, templates=settings, freeze=("re:0\\..*", "re:5\\..*"),
        evolution={"codes": "ones", "change": "none"}, optimizer={"lr": 0.02}, stopping={"keep": "last"},
    )  # fmt: skip
    report = train(joint, [task()], config, cpu=True)
    for banks in stacks_of(joint).values():
        for key, bank in banks.items():
            assert torch.equal(bank.rows, rows[key])
    after = joint.collapse("net")
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert "1.into.weight" in changed and "1.norm.weight" in changed and "6.weight" in changed
    assert not {"0.weight", "0.bias", "5.bias"} & changed
    # 4 layers x 3 templates, 4 norms of 24, a head of 34, and the one site outside stacks.
    assert report.trained == parameters_trained(joint) == 12 + 4 * 24 + 34 + 16 * 8


def test_the_best_source_is_found_by_trying_each(states, tmp_path):
    spoilt = {key: tensor * 0 if key.startswith("1.") else tensor for key, tensor in states["other"].items()}
    spoilt |= {key: torch.full_like(tensor, 9.0) for key, tensor in spoilt.items() if key.startswith("0.")}
    config = Training(steps=10, templates=TemplateSettings())
    for order in (("one", "other"), ("other", "one")):
        given = {name: {"one": states["one"], "other": spoilt}[name] for name in order}
        joint = joined(network())
        assert best_of(joint, [task()], config, given, order, seed=0, cpu=True) == "one"
    folder = surgery.save(source(), tmp_path / "source")
    with pytest.raises(Exception, match="modules="):  # live modules cannot be built from an artifact alone
        load_source(str(folder), trust=False)
    with pytest.raises(LoadError, match=r"source .*nowhere does not exist"):
        load_source(str(tmp_path / "nowhere"), trust=False)


def test_a_task_that_adapts_is_not_tried(states):
    given, joint = source(), joined(network())
    adapting = [replace(task(), loss="moments")]
    config = Training(steps=4, templates=TemplateSettings())
    with pytest.raises(
        PlanError, match=r"Task signs adapts without labels.*templates\.like, one of one, other"
    ):
        begin_from_source(joint, adapting, config, given, seed=0, cpu=True)
    named = config.model_copy(update={"templates": TemplateSettings(like="other")})
    assert begin_from_source(joint, adapting, named, given, seed=0, cpu=True).templates.like == "other"
    with pytest.raises(PlanError, match="must be one of one, other, found 'third'"):
        third = config.model_copy(update={"templates": TemplateSettings(like="third")})
        begin_from_source(joint, adapting, third, given, seed=0, cpu=True)


def test_as_many_templates_as_layers_are_the_layers(states):
    joint = joined(network(), templates=8)  # two members of four layers
    settings = TemplateSettings(sure=0.8)
    transfer(joint, states, "other", settings, seed=0)
    (banks,) = stacks_of(joint).values()
    mixtures = next(iter(banks.values())).coefficients
    assert mixtures.argmax(1).tolist() == [4, 5, 6, 7]
    torch.testing.assert_close(mixtures.max(1).values, torch.full((4,), 0.8))
    for key, tensor in joint.collapse("net").items():
        torch.testing.assert_close(states["other"][key], tensor, rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_is_refused(states):
    other = made(
        "net", nn.Sequential(nn.Linear(3, 8), *(nn.Linear(8, 8) for _ in range(3))), torch.zeros(2, 3)
    )
    with pytest.raises(PlanError, match="missing or of another shape"):
        candidates(joined(other), states)
    joint = joined(network())
    with pytest.raises(PlanError, match="must be one of one, other"):
        transfer(joint, states, "third", TemplateSettings(), seed=0)
    with pytest.raises(PlanError, match=r"settings\.templates=K"):
        transfer(joined(network(), templates=None), states, "one", TemplateSettings(), seed=0)
    with pytest.raises(PlanError, match="'stem' matches none"):
        train(joined(network()), [task()], {"freeze": ["stem"]}, cpu=True)
