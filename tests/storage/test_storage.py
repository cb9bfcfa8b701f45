"""Storing and reviving: nothing is lost, nothing grows, and what did not change keeps its bytes."""

import copy

import pytest
import torch
from nets import OWN, assert_same_bits, member, run, sibling
from torch import nn

from surgery.core.joining import join
from surgery.fitting.fit import fit
from surgery.members.member import Member
from surgery.storage.codecs import NATIVE, encode
from surgery.storage.keys import PlainKey
from surgery.storage.stored import adopt, deduplicate, revive, store

KINDS = (*OWN, "bert", "gpt2", "t5", "llama", "mixtral")


def zeroed(joint):
    """Members of the same architectures with other weights."""
    empty = []
    for one in joint.members.values():
        module = joint.extract(one.name)
        with torch.no_grad():
            for tensor in (*module.parameters(), *module.buffers()):
                tensor.zero_()
        empty.append(Member(one.name, module, one.inputs, one.origin))
    return empty


def assert_same_stored(found, expected):
    assert found.plan == expected.plan
    assert (found.aliases, found.ties) == (expected.aliases, expected.ties)
    assert found.tensors.keys() == expected.tensors.keys()
    for key, encoded in expected.tensors.items():
        again = found.tensors[key]
        assert (again.precision, again.shape, again.dtype) == (
            encoded.precision,
            encoded.shape,
            encoded.dtype,
        )
        assert_same_bits(again.parts, encoded.parts)


def joint_of(how, kind):
    """A joint model of a network, its twin and a sibling, in one of the ways in which it can be stored."""
    base = member(kind)
    joint = join([base, member(kind, "twin"), sibling(base, "sibling", 0.01, 1)], block=(8, 8))
    if how == "opened":
        joint.open(2)
    elif how == "trained":
        joint.open(2)
        with torch.no_grad():
            for p in joint.parameters():
                p.mul_(1.01)
    elif how == "fitted":
        fit(joint, max_error=0.03)
    elif how == "hypermodules":
        fit(joint, hypermodules=20, block=(8, 8), context=2)
    return joint


@pytest.mark.parametrize("how", ["joined", "opened", "trained", "fitted", "hypermodules"])
@pytest.mark.parametrize("kind", ["mlp", "tied", "lstm", "bfloat16", "float16"])
def test_store_revive_store_is_identical(kind, how):
    joint = joint_of(how, kind)
    stored = store(joint)
    again = revive(zeroed(joint), stored)
    assert_same_stored(store(again), stored)
    for name in joint:
        if how in ("opened", "trained"):
            continue  # these hold rows finer than what is stored of them
        assert_same_bits(again.collapse(name), joint.collapse(name))
        with torch.no_grad():
            for one, other in zip(
                run(again[name], joint.members[name]), run(joint[name], joint.members[name]), strict=True
            ):
                torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_a_revived_member_is_the_original_bit_for_bit(kind):
    original = {key: t.clone() for key, t in member(kind).module.state_dict().items()}
    joint = join([member(kind)], block=(8, 8))
    again = revive(zeroed(joint), store(joint))
    assert_same_bits(again.collapse(kind), original)
    extracted = again.extract(kind)
    assert_same_bits(extracted.state_dict(), original)
    ties = joint.owners[kind].values()
    named = dict(extracted.named_parameters(remove_duplicate=False))
    for names in ties:
        assert len({id(named[name]) for name in names if name in named}) <= 1


def test_a_fitted_model_that_was_trained_is_stored_as_it_is_and_the_rest_in_its_form():
    joint = fit(join([base := member("mlp"), sibling(base, "s", 0.02, 1)]), max_error=0.05)
    before = store(joint)
    with torch.no_grad():
        for p in joint.parameters():
            if len(p) > 2:  # not the last biases
                p.mul_(1.01)
    after, live = store(joint), joint.collapse()
    assert after.plan == before.plan
    kept = {key for key, each in before.tensors.items() if after.tensors[key] is each}
    assert kept and all(each.precision.is_native for key, each in after.tensors.items() if key not in kept)
    again = revive(zeroed(joint), after)
    for name in joint:
        assert_same_bits(again.collapse(name), live[name])


def test_opening_what_was_fitted_or_revived_can_be_stored_and_collapses_to_the_same():
    base = member("mlp")
    joint = fit(join([base, member("mlp", "twin")], block=(8, 8)), max_error=0)
    assert joint.plan.placements
    before, closed = {name: joint.collapse(name) for name in joint}, store(joint)
    joint.open(4)
    stored = store(joint)
    assert stored.nbytes == closed.nbytes
    again = revive(zeroed(joint), stored)
    for name, state in before.items():
        assert_same_bits(again.collapse(name), state)


def test_members_that_share_a_stored_tensor_can_be_trained_apart():
    joint = join([member("mlp", "a"), member("mlp", "b")])
    stored = store(joint)
    assert stored.aliases
    again = revive(zeroed(joint), stored)
    before = again.collapse("b")
    with torch.no_grad():
        for p in again.private("a").values():
            p.add_(1)
    assert_same_bits(again.collapse("b"), before)


def test_adopting_gives_new_weights_in_place_and_forgets_what_was_derived():
    joint = join([member("caching")])
    module = joint["caching"]
    other = store(join([member("caching", seed=1)]))
    with torch.no_grad():
        run(module, joint.members["caching"])
        adopt(joint, other)
        assert joint["caching"] is module
        wanted = run(member("caching", seed=1).module, joint.members["caching"])
        assert torch.equal(run(module, joint.members["caching"])[0], wanted[0])


def test_odd_tensors_are_kept():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.line = nn.Linear(8, 8)
            self.scalar = nn.Parameter(torch.tensor(0.5))
            self.register_buffer("flags", torch.tensor([True, False] * 600))
            self.register_buffer("whole", torch.arange(600))
            self.register_buffer("nothing", torch.zeros(0, 3))
            self.register_buffer("waves", torch.randn(80, dtype=torch.complex64))
            self.register_buffer("special", torch.tensor([float("nan"), float("inf"), -0.0]))

        def forward(self, x):
            return self.line(x) * self.scalar

    one = member("mlp")
    odd = Member("odd", Odd(), type(one.inputs)((torch.randn(2, 8),)), one.origin)
    original = copy.deepcopy(odd.module.state_dict())
    joint = join([odd, one])
    stored = store(joint)
    again = revive(zeroed(joint), stored)
    assert_same_bits(again.collapse("odd"), original)
    assert_same_stored(store(again), stored)


def test_only_tensors_equal_byte_for_byte_are_stored_once():
    zero, negative = torch.zeros(300), -torch.zeros(300)
    stored = store(join([member("mlp")]))
    tensors = {
        PlainKey("mlp", n): encode(t, NATIVE)
        for n, t in {"a": zero, "b": zero.clone(), "c": negative, "d": zero.view(20, 15)}.items()
    }
    found = deduplicate(type(stored)(stored.plan, tensors))
    assert dict(found.aliases) == {PlainKey("mlp", "b"): PlainKey("mlp", "a")}


@pytest.mark.parametrize("count", [1, 1 << 8, 257, 1 << 16, (1 << 16) + 1, 1 << 31])
def test_every_type_that_numbers_hypermodules_is_read_again(count):
    from surgery.core.dictionary import index_dtype
    from surgery.methods.rows.parts import INDICES

    assert index_dtype(count) in INDICES and torch.iinfo(index_dtype(count)).max >= count - 1
