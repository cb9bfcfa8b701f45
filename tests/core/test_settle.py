"""Settling: what stays in the dictionary pays, whatever the shapes, blocks, dtypes and repetitions."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import assert_same_bits, member
from torch import nn

from surgery.anatomy.plan import make_plan, place
from surgery.anatomy.sites import Anatomy, Site
from surgery.core.dictionary import index_dtype
from surgery.core.joining import join
from surgery.core.settle import settle
from surgery.geometry.views import CanonicalView
from surgery.members.member import Inputs, Member, Origin
from surgery.methods.rows.bank import RowsBank
from surgery.methods.rows.settling import retire_rare
from surgery.storage.stored import revive, store

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


class Stack(nn.Module):
    """Matrices that are sites by decree: no forward is ever run."""

    def __init__(self, tensors):
        super().__init__()
        self.weights = nn.ParameterList(tensors)


def stacked(name, tensors):
    """A member whose every matrix is a site, with its anatomy."""
    module = Stack(tensors)
    sites = tuple(
        Site(
            name, key, (key,), "linear", tuple(t.shape), str(t.dtype).removeprefix("torch."),
            CanonicalView.of("o i -> 1 o i", tuple(t.shape)), i,
        )
        for i, (key, t) in enumerate(module.state_dict().items())
    )  # fmt: skip
    return Member(name, module, Inputs(), Origin("module", name, "Stack")), Anatomy(name, "", "", sites, ())


def matrices(seed, shapes, dtype, repeat, factor):
    """Random matrices of which some share blocks: tiles of one another, times a factor."""
    g = torch.Generator().manual_seed(seed)
    made = []
    for number, shape in enumerate(shapes):
        fresh = torch.randn(shape, generator=g).to(dtype)
        if number and repeat[number % len(repeat)]:
            old = made[int(torch.randint(len(made), (1,), generator=g))]
            rows, columns = min(shape[0], old.shape[0]), min(shape[1], old.shape[1])
            fresh[:rows, :columns] = old[:rows, :columns] * factor
        made.append(fresh)
    return made


def original_bytes(members):
    return sum(t.numel() * t.element_size() for m in members for t in m.module.state_dict().values())


@given(
    seed=st.integers(0, 999),
    shapes=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=6),
    block=st.tuples(st.integers(1, 8), st.integers(1, 20)),
    dtype=st.sampled_from(DTYPES),
    repeat=st.lists(st.booleans(), min_size=1, max_size=4),
    factor=st.sampled_from([1.0, 2.0, -1.0, 0.3]),
    opened=st.sampled_from([0, 0, 1, 3]),
    trained=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_what_is_stored_is_never_larger_than_the_members(
    seed, shapes, block, dtype, repeat, factor, opened, trained
):
    tensors = matrices(seed, shapes, dtype, repeat, factor)
    half = len(tensors) // 2
    pairs = [stacked(name, part) for name, part in (("a", tensors[:half]), ("b", tensors[half:])) if part]
    members, anatomies = zip(*pairs, strict=True)
    sites = [site for anatomy in anatomies for site in anatomy.sites]
    whole, before = original_bytes(members), {m.name: dict(m.module.state_dict()) for m in members}
    joint = join(members, place([m.name for m in members], ((site, block) for site in sites), 1))
    if opened:
        joint.open(opened)
    if trained:
        with torch.no_grad():
            for p in joint.dictionary.parameters():
                p.mul_(1.25)
    stored = store(joint)
    assert stored.nbytes <= whole
    if not trained:
        empty = [
            stacked(name, [torch.zeros_like(t) for t in state.values()])[0] for name, state in before.items()
        ]
        again = revive(empty, stored)
        for name in before:
            assert_same_bits(again.collapse(name), before[name])


def test_identical_members_share_everything():
    members = [member("mlp", name) for name in ("a", "b", "c")]
    one = original_bytes(members[:1])
    stored = store(join(members, block=(8, 8)))
    small = sum(t.numel() * t.element_size() for t in members[0].module.parameters() if t.nbytes < 512)
    index = sum(bank.locations * 2 for bank in stored.plan.banks)
    # What is left beside one member: the index, and tensors too small for an alias of their own.
    assert stored.nbytes <= one + index + 2 * small


def test_sites_that_share_a_part_of_their_blocks_are_kept_where_that_pays():
    g = torch.Generator().manual_seed(0)
    first, alone = torch.randn(64, 64, generator=g), torch.randn(64, 64, generator=g)
    mixed = torch.cat([first[:48], torch.randn(16, 64, generator=g)])
    one, anatomy = stacked("a", [first, alone, mixed])
    joint = join([one], make_plan([anatomy], (8, 8)))
    settled = settle(joint)
    assert [p.site.name for p in settled.plan.placements] == ["weights.0", "weights.2"]
    assert [name for _, name in settled.plain] == ["weights.1"]
    bank = settled.banks["8x8-float32"]
    assert (bank.singles, bank.locations) == (80, 128)
    assert store(joint).nbytes == (64 * 64 * 2 + 16 * 64) * 4 + 128


def test_an_untrained_bank_stores_like_a_closed_one():
    made = {}
    for context in (0, 4):
        joint = join([member("mlp", "a"), member("mlp", "b")], block=(8, 8))
        made[context] = store(joint.open(context) if context else joint)
    assert made[0].plan == made[4].plan
    for key, encoded in made[0].tensors.items():
        assert_same_bits(made[4].tensors[key].parts, encoded.parts)


@given(st.integers(0, 999), st.integers(1, 4), st.integers(1, 6))
@settings(max_examples=40, deadline=None)
def test_a_repeated_block_is_stored_exactly_however_often_it_occurs(seed, context, times):
    tile = torch.randn(4, 4, generator=torch.Generator().manual_seed(seed))
    one, anatomy = stacked("a", [tile.repeat(2, times), tile.repeat(times, 3)])
    joint = join([one], make_plan([anatomy], (4, 4))).open(context)
    before = joint.collapse("a")
    stored = store(joint)
    empty, _ = stacked("a", [torch.zeros_like(t) for t in before.values()])
    assert_same_bits(revive([empty], stored).collapse("a"), before)
    assert all(bank.context == 1 for bank in stored.plan.banks)


def test_opening_records_the_context_and_leaves_hypermodules_alone():
    joint = join([member("mlp", "a")], block=(8, 8)).open(3)
    assert [bank.context for bank in joint.plan.banks] == [3]
    rows = joint.dictionary["8x8-float32"].rows
    joint.open(5)
    assert joint.dictionary["8x8-float32"].rows is rows
    assert [bank.context for bank in joint.plan.banks] == [3]


def test_settling_does_not_change_the_joint_model():
    joint = join([member("tied"), member("mlp")], block=(8, 8)).open(2)
    before = {name: {k: t.clone() for k, t in joint.collapse(name).items()} for name in joint}
    plan, rows = joint.plan, [p.clone() for p in joint.dictionary.parameters()]
    settle(joint)
    assert joint.plan is plan
    assert all(torch.equal(p, q) for p, q in zip(joint.dictionary.parameters(), rows, strict=True))
    for name, state in before.items():
        assert_same_bits(joint.collapse(name), state)


@given(st.integers(0, 999), st.integers(1, 5), st.integers(1, 4), st.integers(1, 30), st.integers(0, 4))
@settings(max_examples=40, deadline=None)
def test_retiring_handles_banks_that_have_single_rows_already(seed, k, c, locations, singles):
    g = torch.Generator().manual_seed(seed)
    psi = torch.randint(k + singles, (locations,), generator=g)
    contexts = torch.randn(locations, c, generator=g)
    contexts[psi >= k, 1:] = 0
    bank = RowsBank((2, 3), torch.randn(k * c + singles, 6, generator=g), psi, contexts, k)
    retired = retire_rare(bank)
    torch.testing.assert_close(retired.blocks(), bank.blocks())
    own = psi >= k  # a single row and its factor come back bit for bit, as one product did
    assert torch.equal(retired.settled_blocks()[own], bank.settled_blocks()[own])
    uses = torch.bincount(retired.psi[retired.psi < retired.hypermodules], minlength=retired.hypermodules)
    assert bool((uses >= c).all())


def test_the_index_takes_the_smallest_type():
    assert [index_dtype(n) for n in (1, 256, 257, 65536, 65537)] == [
        torch.uint8, torch.uint8, torch.uint16, torch.uint16, torch.int32,
    ]  # fmt: skip
    for count in (256, 257, 65536):
        assert int(torch.tensor(count - 1).to(index_dtype(count)).long()) == count - 1
