"""Training templates: mixtures learn, regularisers and hardening do what they say, and runs resume."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from stacked_nets import CONFIG, build, network, task

import surgery
from surgery.anatomy.sites import discover
from surgery.core import generation
from surgery.core.joining import join
from surgery.core.sizes import parameters_of_dictionary
from surgery.errors import PlanError
from surgery.methods.templates.bank import TemplateBank
from surgery.methods.templates.mixtures import Templates
from surgery.methods.templates.plan import plan_templates
from surgery.methods.templates.training import penalty, stacks_of
from surgery.settings.training import Evolution, TemplateSettings, Training
from surgery.training.loop.agreement import differences
from surgery.training.loop.interruptions import Interrupted
from surgery.training.loop.run import STATE
from surgery.training.loop.starting import start
from surgery.training.loop.state import read_state
from surgery.training.loop.trainer import Trainer
from surgery.training.report.pictures import draw_run
from surgery.training.report.runlog import read_log
from surgery.training.tasks.tasks import Task
from surgery.training.train import train


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    joint = build()
    return joint, train(joint, [task()], CONFIG, folder=folder, cpu=True), folder


def test_mixtures_learn_harden_and_are_logged(unbroken):
    joint, report, folder = unbroken
    first, *lines, end = read_log(folder / "log.jsonl")
    assert first["stacks"]["stack0"]["layers"] == [["net", f"{n}.into.weight"] for n in range(1, 5)]
    history = np.array([line["mixtures"]["stack0"] for line in lines])
    assert history.shape == (6, 4, 2)
    assert np.abs(history[3] - history[0]).max() > 0.05  # they were trained
    assert set(history[4].ravel()) == {0.0, 1.0} == set(history[5].ravel())
    assert (history[4].argmax(1) == history[3].argmax(1)).all()
    assert report.templates == {"stack0": 2} == end["templates"] and report.best >= 4
    assert report.hypermodules["4x4-float32"] > 0  # what lies outside the stack evolves as ever
    used = len(set(history[5].argmax(1)))
    numbers, whole = parameters_of_dictionary(joint)
    assert numbers < whole
    stored = {key: bank for key, bank in joint.dictionary.banks.items() if key.startswith("stack")}
    assert all(int((bank.coefficients != 0).any(0).sum()) == used for bank in stored.values())


def test_templates_are_exported_as_what_was_trained(unbroken, tmp_path):
    joint, _, _ = unbroken
    surgery.save(joint, tmp_path / "joint")
    loaded = surgery.load(tmp_path / "joint", modules={"net": network().module})
    x = torch.randn(5, 3)
    with torch.no_grad():
        torch.testing.assert_close(loaded["net"](x), joint["net"](x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(joint.extract("net")(x), joint["net"](x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mixing", ["linear", "softmax"])
def test_what_was_loaded_is_trained_on_as_templates(tmp_path, mixing):
    joint = build(hidden=400).open(templates=Templates(2, mixing))  # large enough to be stored so
    surgery.save(joint, tmp_path / "joint")
    loaded = surgery.load(tmp_path / "joint", modules={"net": network(hidden=400).module})
    x = torch.randn(5, 3)
    with torch.no_grad():
        expected = joint["net"](x)
    loaded.open(templates=None if mixing == "linear" else Templates(2, mixing))
    (banks,) = stacks_of(loaded).values()
    assert len({id(bank.contexts) for bank in banks.values()}) == 1
    assert all(bank.rows.shape[0] == 2 for bank in banks.values())
    with torch.no_grad():
        torch.testing.assert_close(loaded["net"](x), expected, rtol=1e-4, atol=1e-5)
    before = loaded.collapse("net")
    config = {
        **CONFIG,
        "final": 0,
        "evolution": {"start": "given"},
        "templates": {},
    }
    train(loaded, [task()], config, settings={"templates": 2, "mixture": mixing}, cpu=True)
    after = loaded.collapse("net")
    for part in ("into.weight", "out.weight"):
        assert not torch.equal(after[f"2.{part}"], before[f"2.{part}"])


def test_mixtures_are_drawn(unbroken):
    content = draw_run(unbroken[2] / "log.jsonl")["mixtures.png"]
    assert (
        len(np.unique(np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).reshape(-1, 3), axis=0)) > 8
    )


@pytest.mark.parametrize("step", [3, 11, 20, 21, 27])
def test_interrupted_at_any_step_and_resumed_it_ends_as_an_unbroken_run(
    unbroken, tmp_path, monkeypatch, step
):
    plain, count = Trainer.train_step, [0]

    def stop(self):
        count[0] += 1
        if count[0] == step:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGINT)
        plain(self)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "train_step", stop)
        with pytest.raises(Interrupted):
            train(build(), [task()], CONFIG, folder=tmp_path, cpu=True)
    assert (tmp_path / STATE).exists()
    joint = build()
    report = train(joint, [task()], CONFIG, folder=tmp_path, cpu=True, resume=True)
    expected, first, _ = unbroken
    assert report.best == first.best
    for key, tensor in expected.collapse("net").items():
        assert torch.equal(joint.collapse("net")[key], tensor), key


@pytest.mark.parametrize(
    ("settings", "templates", "mixtures"),
    [
        ({}, True, True),
        ({"learn": False}, True, False),
        ({"freeze": True}, False, True),
        ({"mixture": "one-hot", "start": "cyclic"}, True, False),
    ],
)
def test_what_is_frozen_stays(settings, templates, mixtures):
    mixture = settings.pop("mixture", None)
    joint, twin = build(mixture=mixture), build(mixture=mixture)
    config = {**CONFIG, "final": 0, "templates": {"start": "sequential", **settings}}
    start(twin, Training(templates=TemplateSettings(**{"start": "sequential", **settings})), 0)
    train(joint, [task()], {**config, "stopping": {"keep": "last"}}, cpu=True)
    for name, banks in stacks_of(joint).items():
        for key, bank in banks.items():
            before = stacks_of(twin)[name][key]
            assert torch.equal(bank.rows, before.rows) != templates
            assert torch.equal(bank.contexts, before.contexts) != mixtures


@pytest.mark.parametrize("start_by", ["uniform", "random", "sequential", "cyclic", "progressive", "fit"])
def test_a_deeper_model_has_no_more_templates(start_by):
    joint = build(layers=9)
    start(joint, Training(templates=TemplateSettings(start=start_by)), 0)
    for banks in stacks_of(joint).values():
        for bank in banks.values():
            assert bank.rows.shape[0] == 2 and bank.locations == 9 and bank.mixing == "softmax"
            torch.testing.assert_close(bank.coefficients.sum(1), torch.ones(9))


@pytest.mark.parametrize(("start_by", "one"), [("cyclic", [0, 1, 2, 0]), ("sequential", [0, 0, 1, 2])])
def test_a_signature_is_that_of_each_member(start_by, one):
    members = [network(), surgery.load_member(network().module, name="twin", inputs=torch.zeros(2, 3))]
    with torch.no_grad():
        members[1].module[1].into.weight.mul_(2)  # not the same layers
    joint = join(members, plan_templates([discover(each) for each in members], (4, 4), 2, templates=3))
    start(joint, Training(templates=TemplateSettings(start=start_by)), 0)
    for banks in stacks_of(joint).values():
        chosen = next(iter(banks.values())).coefficients.argmax(1).tolist()
        assert chosen == one * 2


def test_the_penalty_draws_mixtures_to_signatures_and_templates_together():
    joint = build()
    settings = TemplateSettings(start="random", entropy=1.0, attraction=1.0, sure=0.7)
    start(joint, Training(templates=settings), 0)
    (banks,) = stacks_of(joint).values()
    first = next(iter(banks.values()))
    before = first.coefficients.max(1).values.mean()
    optimizer = torch.optim.SGD([first.contexts, *(bank.rows for bank in banks.values())], lr=0.5)
    values = []
    for _ in range(30):
        optimizer.zero_grad()
        value = penalty(joint, settings)
        value.backward()
        optimizer.step()
        values.append(float(value.detach()))
    assert values[-1] < 0.5 * values[0] and bool(first.coefficients.max(1).values.mean() > before)
    assert penalty(joint, TemplateSettings()) is None


def test_distillation_is_from_the_member_as_it_was_given():
    one = network()
    x = torch.randn(32, 3, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        wanted = one.module(x)
    joint = join([one], plan_templates([discover(one)], (4, 4), 2))
    config = {
        "steps": 100, "generations": 2, "final": 0, "templates": {"count": 2, "mixing": "linear"},
        "evolution": {"codes": "ones", "change": "none"}, "optimizer": {"lr": 0.01},
    }  # fmt: skip
    distil = Task("distil", "net", [(x, None)], loss="distillation", validation=[(x, None)])
    report = train(joint, [distil], config, cpu=True)
    with torch.no_grad():
        error = float((joint["net"](x) - wanted).square().mean() / wanted.square().mean())
    assert report.scores["distil"].loss == pytest.approx(error, rel=1e-3)
    assert 1e-6 < error < 0.2  # two templates are not four layers, but come near


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(ValidationError, match="needs final generations"):
        Training(final=0, templates=TemplateSettings(harden=True))
    for wrong in ({"harden": True}, {"entropy": 0.1}, {"attraction": 0.1}):
        with pytest.raises(PlanError, match="found linear ones"):
            train(build(mixture="linear"), [task()], {"templates": wrong}, cpu=True)
    with pytest.raises(PlanError, match="codes to contexts or ones"):
        start(build(), Training(evolution=Evolution(start="given", codes="diagonals")), 0)


@pytest.mark.parametrize("mixing", ["softmax", "linear"])
def test_a_stack_in_one_product_is_what_its_tensors_are_one_by_one(mixing, monkeypatch):
    """As devices do it, with every gradient, also where some weights have none."""
    joint = build().open(templates=Templates(3, mixing, start="uniform"))
    unused = ("net", "2.into.weight")

    def generated():
        weights = joint.generate()
        assert unused in weights
        used = {key: weight for key, weight in weights.items() if key != unused}
        sum((weight.sin() * (n + 1)).sum() for n, (_, weight) in enumerate(sorted(used.items()))).backward()
        gradients = {name: p.grad.clone() for name, p in joint.named_parameters() if p.grad is not None}
        joint.zero_grad()
        return weights, gradients

    one_by_one = generated()
    monkeypatch.setattr(generation, "_joins", lambda device: True)

    def blocks(self, *args):
        raise AssertionError("templates are not asked for tensor by tensor")

    monkeypatch.setattr(TemplateBank, "blocks", blocks)
    for found, wanted in zip(generated(), one_by_one, strict=True):
        assert found.keys() == wanted.keys()
        for key, tensor in wanted.items():
            torch.testing.assert_close(found[key], tensor)


def trained(config, **options):
    joint = build(templates=options.pop("planned", None))
    train(joint, [task()], config, cpu=True, **options)
    return joint.collapse("net")


@pytest.mark.parametrize("mixture", ["linear", None])
def test_settings_of_the_plan_of_a_run_and_their_former_names_are_one(mixture):
    plain = {**CONFIG, "generations": 1, "final": 0, "templates": {"start": "random"}}
    given = {"templates": 2, **({"mixture": mixture} if mixture else {})}
    former = {"count": 2, **({"mixing": mixture} if mixture else {}), "start": "random"}
    found = [
        trained(plain, settings=given),
        trained({**plain, "templates": former}),
        trained(plain, planned=2, settings={"mixture": mixture} if mixture else None),
    ]
    for key, tensor in found[0].items():
        assert torch.equal(tensor, found[1][key]) and torch.equal(tensor, found[2][key]), key
    with pytest.raises(
        PlanError, match=r"settings\.templates has two values, 3 and, .*train\.templates\.count, 2"
    ):
        trained({"templates": {"count": 2}}, settings={"templates": 3})
    with pytest.raises(
        PlanError, match=r"'settings\.templats' is not a known key.*; 'train\.stps'|'train\.stps'.*templats"
    ):
        trained({"stps": 1}, settings={"templats": 3})


def test_a_run_goes_on_by_the_settings_that_it_began_with(tmp_path):
    """States of versions that recorded `train.templates.count` and `mixing` too."""
    config = {**CONFIG, "generations": 1, "final": 0, "templates": {"start": "random"}}
    train(build(), [task()], config, folder=tmp_path, cpu=True)
    terms = read_state(tmp_path / "state.safetensors")[1]["plan"]
    (said,) = {tuple(each.items()) for each in terms["banks"].values()}
    assert dict(said) == {"templates": 2, "mixture": "softmax"}
    old = {
        **terms,
        "train": {**terms["train"], "templates": {"count": 2, "mixing": "softmax", "start": "random"}},
    }
    del old["banks"]
    new = {**terms, "train": {**terms["train"], "templates": {"start": "random"}}}
    assert differences(new, old) == ""
    other = {**new, "banks": {key: {"templates": 3, "mixture": "linear"} for key in new["banks"]}}
    for before in (old, new):
        said = differences(other, before)
        assert said == "settings.templates was 2 and is 3; settings.mixture was softmax and is linear"
    assert differences({**new, "banks": {}}, new) == (
        "settings.templates was 2 and is None; settings.mixture was softmax and is None"
    )
