"""Banks that were read from an artifact rest: not in memory, and there, bit for bit, for whoever asks for them."""

import copy
import pickle

import artifacts
import nets
import pytest
import torch

import surgery
from surgery.anatomy.sites import discover
from surgery.methods.templates.plan import plan_templates
from surgery.storage.stored import store

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


def lossless():
    return artifacts.pair(), X


def halves():
    return artifacts.pair(torch.bfloat16), X.bfloat16()


def hypermodules():
    return surgery.fit(artifacts.pair(), hypermodules=4, block=(8, 8), context=2), X


def members(count=3):
    base = nets.family("mlp", count)
    return base, base[0].inputs.args[0]


def siblings():
    found, x = members()
    return surgery.fit(surgery.join(found), budget=0.3), x


def templates():
    found, x = members(1)
    return surgery.fit(
        surgery.join(found, plan_templates([discover(each) for each in found])), templates=2
    ), x


MADE = [lossless, halves, hypermodules, siblings, templates]


@pytest.fixture(scope="module", params=MADE, ids=lambda make: make.__name__)
def folder(request, tmp_path_factory):
    """An artifact of some kind, architectures of its members, and inputs."""
    joint, x = request.param()
    modules = {name: joint.extract(name) for name in joint.names}
    place = surgery.save(joint, tmp_path_factory.mktemp(request.param.__name__) / "joint")
    return place, modules, x


@pytest.fixture
def load(folder):
    place, modules, _ = folder
    return lambda: surgery.load(place, modules=copy.deepcopy(modules))


def awake(load):
    """The same joint model with all banks in memory, as they are made at once."""
    joint = load()
    joint.dictionary.banks.wake()
    assert not joint.dictionary.resting()
    return joint


def outputs(joint, x):
    with torch.no_grad():
        return {name: joint[name](x) for name in joint.names}


def same(one, other):
    nets.assert_same_bits(one, other)
    assert all(torch.equal(nets.bits(one[key]), nets.bits(other[key])) for key in one)


def test_nothing_that_is_done_without_gradients_makes_a_bank(folder, load, tmp_path):
    joint, x = load(), folder[2]
    assert joint.dictionary.resting() == joint.dictionary.keys()
    expected = awake(load)
    same(outputs(joint, x), outputs(expected, x))
    assert repr(joint) == repr(expected) and joint.report == expected.report
    assert (
        not joint.train().eval().training
        and copy.deepcopy(joint).dictionary.resting() == joint.dictionary.keys()
    )
    for name in joint.names:
        same(joint.collapse(name), expected.collapse(name))
        same(joint[name].state_dict(), expected[name].state_dict())
        joint.extract(name)
    surgery.save(joint, tmp_path / "again")
    assert artifacts.contents(tmp_path / "again") == artifacts.contents(folder[0])
    assert joint.dictionary.resting() == joint.dictionary.keys()


@pytest.mark.parametrize(
    "way", ["parameters", "state_dict", "open", "step", "copy", "pickle", "double", "deepcopy"]
)
def test_whoever_asks_gets_the_bank_that_was_stored(load, way, folder):
    joint, expected = load(), awake(load)
    if way == "open":
        joint, expected = joint.open(2, seed=1), expected.open(2, seed=1)
    elif way == "step":
        for each in (joint, expected):
            with each.step():
                losses = [each[name](folder[2]).float().square().sum() for name in each.names]
                torch.stack(losses).sum().backward()
        same(*({n: p.grad for n, p in each.dictionary.named_parameters()} for each in (joint, expected)))
    elif way == "copy":
        joint.dictionary = copy.copy(joint.dictionary)
    elif way == "pickle":
        joint = pickle.loads(pickle.dumps(joint))
    elif way == "double":
        joint, expected = joint.double(), expected.double()
    elif way == "deepcopy":
        joint = copy.deepcopy(joint)
    same(dict(joint.dictionary.named_parameters()), dict(expected.dictionary.named_parameters()))
    assert not joint.dictionary.resting()
    same(joint.state_dict(), expected.state_dict())
    assert [p.requires_grad for p in joint.parameters()] == [p.requires_grad for p in expected.parameters()]
    same(
        outputs(joint, folder[2].to(next(iter(joint.bodies.parameters())))),
        outputs(expected, folder[2].to(next(iter(expected.bodies.parameters())))),
    )


def test_what_was_changed_does_not_rest_again(load, folder):
    joint = load()
    key = next(iter(joint.dictionary))
    with torch.no_grad():
        next(joint.dictionary[key].parameters()).mul_(2)
    before = store(joint), joint.collapse(), repr(joint)
    assert not joint.dictionary.rests(key) and before
    assert joint.recipe is None or not joint.recipe.parameters.given()
    assert joint.report is None
    again = copy.deepcopy(joint)
    assert not again.dictionary.rests(key)
    for name in joint.names:
        same(again.collapse(name), joint.collapse(name))
    joint.refresh()
    same(outputs(joint, folder[2]), outputs(again, folder[2]))


def test_a_fit_of_what_was_loaded_is_that_of_banks_in_memory(load):
    if "siblings" not in {bank.method for bank in load().plan.banks}:
        pytest.skip("one kind is enough")
    found, expected = surgery.fit(load(), budget=0.25), surgery.fit(awake(load), budget=0.25)
    assert found.report == expected.report
    for name in found.names:
        same(found.collapse(name), expected.collapse(name))
