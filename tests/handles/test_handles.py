"""Handles: every kind of them gives its tensor bit for bit, says what it is before, and keeps nothing of it."""

from __future__ import annotations

import weakref
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import assert_same_bits, family, member, open_joint
from safetensors.torch import save_file

from surgery.core.bank import Bank
from surgery.core.generation import Generated, generated
from surgery.core.joining import join
from surgery.disk.untrusted import UnreadableError
from surgery.fitting.fit import fit
from surgery.fitting.trial import Trial
from surgery.handles.handle import CPU, Made, Resident, Shared
from surgery.handles.state import LazyState
from surgery.members.member import content_hash
from surgery.methods.hypermodules.bank import HypermoduleBank
from surgery.methods.hypermodules.opening import open_bank
from surgery.methods.rows.bank import exact_bank
from surgery.safetensors.reading import tensors_in_file
from surgery.safetensors.writing import write_aligned
from surgery.slots.collapse import collapse, collapsed
from surgery.storage.codecs import Decoded, Precision, decode, encode
from surgery.storage.keys import PlainKey
from surgery.storage.states import lazy_state_of, module_of, state_of
from surgery.storage.stored import deduplicate, store

DTYPES = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.bool,
    torch.complex64,
)
SHAPES = st.lists(st.integers(0, 7), max_size=3).map(tuple)


def drawn(shape, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(-500, 500, shape, generator=generator)
    return (numbers / 7).to(dtype) if dtype.is_floating_point or dtype.is_complex else numbers.to(dtype)


def check(handle, expected, keeps=False):
    """A handle says what its tensor is, gives it bit for bit, twice, and lets go of it."""
    assert (handle.shape, handle.dtype, handle.device) == (
        tuple(expected.shape),
        expected.dtype,
        expected.device,
    )
    assert handle.nbytes == expected.nbytes
    one, other = handle.read(), handle.read()
    assert_same_bits({"": one}, {"": expected})
    assert_same_bits({"": other}, {"": expected})
    gone = weakref.ref(one)
    del one, other
    assert keeps or gone() is None


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(DTYPES), SHAPES, st.integers(0, 99))
def test_resident_made_and_in_a_file(tmp_path_factory, dtype, shape, seed):
    tensor, folder = drawn(shape, dtype, seed), tmp_path_factory.mktemp("files")
    check(Resident(tensor), tensor, keeps=True)
    check(Made(shape, dtype, CPU, lambda: drawn(shape, dtype, seed)), tensor)
    save_file({"before": torch.ones(seed % 5), "wanted": tensor}, folder / "theirs.safetensors")
    write_aligned(folder / "ours.safetensors", {"before": torch.ones(seed % 5), "wanted": Resident(tensor)})
    for name in ("theirs", "ours"):
        handle = tensors_in_file(folder / f"{name}.safetensors")["wanted"]
        check(handle, tensor)
        if shape:
            start, stop = sorted((seed % (shape[0] + 1), seed // 7 % (shape[0] + 1)))
            check(handle.rows(start, stop), tensor[start:stop])


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(["native", "bfloat16", "int4/8", "int12/64"]), SHAPES, st.integers(0, 99))
def test_a_handle_of_a_stored_tensor_reads_what_decoding_gives(precision, shape, seed):
    encoded = encode(drawn(shape, torch.float32, seed), Precision.parse(precision))
    check(Decoded(encoded), decode(encoded), keeps=precision == "native" or encoded.precision.is_native)


@pytest.mark.parametrize("kind", ["tied", "convolutions"])
@pytest.mark.parametrize("state", ["joined", "opened", "trained", "diagonals"])
def test_handles_of_generated_weights_read_what_a_collapse_gives(kind, state):
    joint = join(family(kind, 2), block=(8, 8))
    if state != "joined":
        joint.open(3)
    for key in joint.dictionary:
        bank = joint.dictionary[key]
        if state == "diagonals" and isinstance(bank, HypermoduleBank):
            bank.add_diagonals()
            torch.nn.init.normal_(bank.diagonals, generator=torch.Generator().manual_seed(0))
        if state == "trained":
            with torch.no_grad():
                bank.rows[::2] *= 1.5
    joint.refresh()
    for p in joint.plan.placements:
        whole = joint.dictionary[p.bank].settled_blocks()
        part = joint.dictionary[p.bank].settled_blocks(p.start, p.stop)
        assert_same_bits({"": part}, {"": whole[p.start : p.stop]})
    handles, states = generated(joint.dictionary, joint.plan.placements), joint.collapse()
    for (name, site), handle in handles.items():
        check(handle, states[name][site])


def test_a_bank_that_generates_everything_in_one_go_does_so_once(monkeypatch):
    joint, calls = join([member("mlp")], block=(8, 8)), []
    expected = collapse(joint, "mlp")
    for bank in joint.dictionary.banks.values():
        cls, whole = type(bank), bank.settled_blocks()
    monkeypatch.setattr(cls, "settled_blocks", Bank.settled_blocks)
    monkeypatch.setattr(cls, "blocks", lambda self, *_: calls.append(1) or whole)
    state = collapsed(joint, "mlp")
    assert not calls
    assert_same_bits(state.resident(), expected)
    assert len(calls) == len(joint.dictionary.keys())


def test_a_state_of_handles_reads_like_one_of_tensors():
    joint = open_joint("tied")[0]
    lazy, resident = collapsed(joint, "tied"), collapse(joint, "tied")
    assert list(lazy) == list(resident) and len(lazy) == len(resident)
    assert_same_bits(dict(lazy), resident)
    assert content_hash(lazy) == content_hash(resident)
    assert resident["first.weight"] is resident["second.weight"]
    assert lazy.handles["first.weight"] is lazy.handles["second.weight"]
    extra = LazyState({"a": Resident(torch.ones(2)), "step": 3})
    assert extra["step"] == 3 and "a" in extra and "b" not in extra


def test_a_hash_holds_one_tensor_at_a_time():
    alive, most = weakref.WeakSet(), []

    def make(seed):
        tensor = drawn((50, 50), torch.float32, seed)
        alive.add(tensor)
        most.append(len(alive))
        return tensor

    state = {str(n): Made((50, 50), torch.float32, CPU, lambda n=n: make(n)) for n in range(9)}
    found = content_hash(LazyState(state))
    assert found == content_hash({str(n): drawn((50, 50), torch.float32, n) for n in range(9)})
    assert max(most) <= 2 and not alive  # the next one is read before the name lets go of the last


def test_what_handles_share_is_dropped_with_the_last_of_them():
    made = []
    shared = Shared(lambda: made.append(1) or torch.ones(3), users=2)
    for round in (1, 2):
        assert not shared.held
        gone = weakref.ref(shared.take())
        assert shared.held and gone() is not None
        shared.take()
        assert not shared.held and gone() is None and len(made) == round


def test_a_file_that_became_shorter_is_named(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(100)}, path)
    handle = tensors_in_file(path)["a"]
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UnreadableError, match=r"must have 400 bytes from byte \d+ on, but has 392"):
        handle.read()
    with pytest.raises(UnreadableError, match="by its header"):
        tensors_in_file(path)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 30),
    st.integers(1, 12),
    st.sampled_from([torch.float32, torch.float64]),
    st.integers(0, 99),
)
def test_an_exact_bank_takes_back_what_it_gave_up(count, width, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(count, width, generator=generator, dtype=dtype)
    blocks = base[torch.randint(count, (2 * count,), generator=generator)] * torch.tensor([1.0, -2.0])[
        torch.randint(2, (2 * count, 1), generator=generator)
    ].to(dtype)
    bank = exact_bank(blocks, (1, width), context=2)
    rows, place = bank.rows.detach().clone(), bank.rows
    pieces = lambda: ((start, blocks[start : start + 7]) for start in range(0, len(blocks), 7))  # noqa: E731
    take_back = bank.give_up(pieces)
    assert take_back is not None and not bank.rows.numel()
    take_back()
    assert bank.rows is place
    assert_same_bits({"": bank.rows}, {"": rows})


@pytest.mark.parametrize("change", ["trained", "opened", "unused"])
def test_a_bank_keeps_what_its_blocks_do_not_say(change):
    blocks = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    bank = exact_bank(blocks.clone(), (2, 2), context=2)
    if change == "trained":
        bank.rows.data.mul_(1 + 1e-6)
    elif change == "opened":
        bank = open_bank(bank, 2, torch.Generator().manual_seed(0))
    else:
        bank.rows.data = torch.cat([bank.rows.data, torch.ones(1, 4)])
    before = bank.rows.detach().clone()
    assert bank.give_up(lambda: [(0, blocks)]) is None
    assert torch.equal(bank.rows, before)


@pytest.mark.parametrize("target", [{"max_error": 0.05}, {"budget": 0.5}])
def test_a_fit_holds_the_originals_once(monkeypatch, target):
    """While members run, what was made of original weights is alive once, and the dictionary's rows are not."""
    joint = join(family("mlp", 3), block=(8, 8))
    generated_bytes = sum(t.nbytes for state in joint.collapse().values() for t in state.values())
    banks, alive, seen = list(joint.dictionary.banks.values()), weakref.WeakSet(), []
    read, error = Generated.read, Trial.error

    def counting(self):
        alive.add(tensor := read(self))
        return tensor

    def looking(self):
        seen.append((sum(t.nbytes for t in alive), sum(bank.rows.numel() for bank in banks)))
        return error(self)

    monkeypatch.setattr(Generated, "read", counting)
    monkeypatch.setattr(Trial, "error", looking)
    fit(joint, **target)
    assert seen and all(0 < held <= generated_bytes and not rows for held, rows in seen)
    assert not alive  # nor does the fitted model keep them


def test_a_fit_that_fails_gives_the_dictionary_back(monkeypatch):
    joint = join(family("mlp", 2), block=(8, 8))
    before = {key: t.detach().clone() for key, t in joint.dictionary.state_dict().items()}
    parameters = list(joint.dictionary.parameters())
    monkeypatch.setattr(Trial, "error", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fit(joint, max_error=0.05)
    assert_same_bits(joint.dictionary.state_dict(), before)
    assert all(a is b for a, b in zip(parameters, joint.dictionary.parameters(), strict=True))


@pytest.mark.parametrize("state", ["joined", "opened"])
def test_weights_are_the_same_piece_by_piece(monkeypatch, state):
    joint = join([*family("mlp", 3), member("convolutions")], block=(4, 4))
    if state == "opened":
        joint.open(3)
    with torch.no_grad():
        whole = joint.generate()
        monkeypatch.setattr("surgery.core.generation.FEWEST", 1)
        monkeypatch.setattr("surgery.util.memory.FRESH_MEMORY_BYTES", 1 << 12)
        pieces = joint.generate()
    assert_same_bits(pieces, whole)


def test_equal_tensors_that_are_stored_once_are_not_tied():
    tensor = drawn((64, 8), torch.float32, 0)
    stored = store(join([member("mlp")], block=(8, 8)))
    tensors = {PlainKey("mlp", name): encode(tensor, Precision.parse("int8/8")) for name in ("a", "b")}
    plan = replace(stored.plan, banks=(), placements=())
    stored = deduplicate(replace(stored, plan=plan, tensors=tensors, ties={}))
    assert stored.aliases
    state, lazy = state_of(stored, "mlp"), lazy_state_of(stored, "mlp")
    assert torch.equal(state["a"], state["b"]) and state["a"] is not state["b"]
    assert lazy.handles["a"] is not lazy.handles["b"]
    assert len(list(module_of(state).parameters())) == 2
