"""Occupancy: a module serves one joint model; nothing keeps it occupied once that has let it go or is no more."""

import copy
import gc

import pytest
import torch
from artifacts import member, seeded, stack
from nets import assert_same_bits
from torch import nn

import surgery
from surgery.errors import PlanError
from surgery.members.member import Member
from surgery.members.occupancy import occupant

OTHER = r"is part of 'net' of another joint model;.* take an ordinary copy .* extract"


class Bare(nn.Module):
    """Without a linear map: all of it stays with the member."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        return self.norm(x)


def one(module=None, name="net"):
    return member(module or seeded(stack, 1), name, torch.zeros(2, 8))


def again(joined):
    return Member("again", joined.module, joined.inputs, joined.origin)


WAYS = {
    "the same member": lambda net: net,
    "the module under another name": again,
    "a part of it": lambda net: one(nn.Sequential(net.module[2]), "part"),
    "inside of another": lambda net: one(nn.Sequential(nn.Linear(8, 8), net.module), "outer"),
}


@pytest.mark.parametrize("make", [lambda: seeded(stack, 1), Bare])
@pytest.mark.parametrize("way", WAYS)
def test_a_module_of_a_joint_model_is_refused_and_nothing_changes(way, make):
    if make is Bare and way == "a part of it":
        pytest.skip("has no such part")
    net = one(make())
    joint = surgery.join([net])
    before, x = joint.collapse("net"), torch.randn(3, 8)
    expected = joint["net"](x)
    with pytest.raises(PlanError, match=OTHER):
        surgery.join([one(seeded(stack, 2), "free"), WAYS[way](net)])
    with pytest.raises(PlanError, match=OTHER):
        surgery.discover(WAYS[way](net))
    assert_same_bits(joint.collapse("net"), before)
    assert torch.equal(joint["net"](x), expected)


def test_extracting_gives_what_is_free_and_a_member_joined_anew_is_apart():
    joint = surgery.join([one()])
    before = joint.collapse("net")
    other = surgery.join([one(joint.extract("net"))])
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1)
    assert_same_bits(joint.collapse("net"), before)
    twin = copy.deepcopy(joint)
    assert occupant(twin["net"])[0] is twin and occupant(joint["net"])[0] is joint


def test_a_joint_model_that_lets_its_modules_go_or_is_no_more_occupies_nothing():
    net = one(Bare())
    joint = surgery.join([net])
    plan, dictionary, encoded, known = joint.plan, joint.dictionary, joint.encoded, joint.known
    joint.vacate()
    assert occupant(net.module) is None
    second = surgery.join([net])
    with pytest.raises(PlanError, match=OTHER):
        joint.occupy(plan, dictionary, encoded, known)
    del joint, second
    gc.collect()
    assert occupant(net.module) is None
    surgery.join([net])
    modules = [one().module for _ in range(3)]
    for module in modules:
        surgery.join([one(module)])
    gone = {id(part) for module in modules for part in module.modules()}
    del module, modules
    gc.collect()
    from surgery.members.occupancy import _occupants

    assert not any(key in gone and ref() is not None for key, (ref, *_) in _occupants.items())


def test_a_fit_lets_go_and_takes_over_again():
    joint = surgery.fit(surgery.join([one()]), max_error=0.05)
    assert occupant(joint["net"])[0] is joint
    with pytest.raises(PlanError, match=OTHER):
        surgery.join([one(joint["net"])])


def test_modules_given_to_load_and_verify_are_free_and_apart(tmp_path):
    joint = surgery.join([one(), one(seeded(stack, 2), "other")])
    surgery.save(joint, tmp_path / "joint")
    for call in (surgery.load, surgery.verify):
        with pytest.raises(PlanError, match=OTHER):
            call(tmp_path / "joint", modules={"net": joint["net"], "other": stack()})
    same = stack()
    with pytest.raises(PlanError, match="of 'other' is also part of 'net'"):
        surgery.load(tmp_path / "joint", modules={"net": same, "other": same})
    given = {"net": stack(), "other": stack()}
    loaded = surgery.load(tmp_path / "joint", modules=given)
    assert loaded["net"] is given["net"]
    with pytest.raises(PlanError, match=OTHER):
        surgery.load(tmp_path / "joint", modules=given)


def test_one_module_or_tensor_in_two_members_is_refused():
    relu = nn.ReLU()
    nets = [nn.Sequential(nn.Linear(8, 8), relu, nn.Linear(8, 8), nn.Linear(8, 8)).eval() for _ in range(2)]
    surgery.join([one(copy.deepcopy(nets[0]), "a"), one(copy.deepcopy(nets[1]), "b")], block=(8, 8))
    surgery.join([one(nets[0], "a"), one(nets[1], "b")], block=(8, 8))  # what has no tensors may be shared
    pair = [seeded(stack, 1), seeded(stack, 2)]
    pair[1][2].weight = pair[0][2].weight
    with pytest.raises(PlanError, match=r"2\.weight of 'b' is also 2\.weight of 'a'; .*deepcopy"):
        surgery.join([one(pair[0], "a"), one(pair[1], "b")])
    state = {key: t.clone() for key, t in pair[0].state_dict().items()}
    for module in pair:
        module.load_state_dict(state, assign=True)
    with pytest.raises(PlanError, match=r"0\.weight of 'b' is also 0\.weight of 'a'; .*0\.bias"):
        surgery.join([one(pair[0], "a"), one(pair[1], "b")])
    norm = nn.BatchNorm1d(8, affine=False)
    with pytest.raises(PlanError, match="1 of 'b' is also part of 'a'"):
        surgery.join([one(nn.Sequential(nn.Linear(8, 8), norm), name) for name in ("a", "b")])
    with pytest.raises(PlanError, match="needs its own name, but net is given more than once"):
        surgery.join([net := one(), net])


def test_a_tensor_that_a_member_of_another_joint_model_holds_is_refused():
    bare, other = Bare(), Bare()
    other.norm.weight = bare.norm.weight
    joint = surgery.join([one(bare)])
    with pytest.raises(PlanError, match=r"norm\.weight of 'b' is also of 'net' of another joint model"):
        surgery.join([one(other, "b")])
    del joint
    gc.collect()
    surgery.join([one(other, "b")])
