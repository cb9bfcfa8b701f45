"""An exact start whose rows stay in the members' files: the same bank as one that holds them, block by block."""

from __future__ import annotations

import pickle
import sys
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from nets import assert_same_bits
from torch import nn

import surgery
from surgery.anatomy.plan import Placement
from surgery.anatomy.sites import Site
from surgery.core.generation import to_blocks
from surgery.core.joining import join
from surgery.disk.mapped import Reader, places_of
from surgery.errors import LoadError
from surgery.geometry.blocks import BlockGrid
from surgery.geometry.views import CanonicalView
from surgery.members.member import Inputs, Member, Origin
from surgery.methods.rows.bank import RowsBank, exact_bank
from surgery.methods.rows.referred import ReferredRows
from surgery.methods.rows.settling import settle_rows
from surgery.methods.rows.sources import SiteBlocks
from surgery.safetensors.writing import write_aligned

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="mappings are read from /proc")

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def mapped(path, tensors):
    """Tensors as a library maps them from a file."""
    from safetensors import safe_open

    write_aligned(path, tensors)
    with safe_open(str(path), framework="pt") as file:
        return {name: file.get_tensor(name) for name in tensors}


def weights_with_repeats(seed, shapes, dtype):
    """Random weights in which blocks of 2x3 repeat, are multiples of one another, zero, or have ties of both signs."""
    generator = torch.Generator().manual_seed(seed)
    pool = torch.randint(-3, 4, (4, 2, 3), generator=generator).double() / 4
    pool[0, 0, 0], pool[0, 1, 1] = 0.75, -0.75
    found = []
    for rows, columns in shapes:
        tiles = pool[torch.randint(len(pool), (rows, columns), generator=generator)]
        factors = torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0])[
            torch.randint(5, (rows, columns), generator=generator)
        ]
        own = torch.rand(rows, columns, generator=generator) < 0.4
        tiles = torch.where(own[..., None, None], torch.randn(tiles.shape, generator=generator), tiles)
        weight = (tiles * factors[..., None, None]).transpose(1, 2).reshape(rows * 2, columns * 3)
        found.append(weight[: rows * 2 - seed % 2].contiguous().to(dtype))  # an edge that fills no block
    return found


def placed(weights):
    placements, start = [], 0
    for number, weight in enumerate(weights):
        out, into = weight.shape
        view = CanonicalView.of("o i -> 1 o i", (out, into))
        dtype = str(weight.dtype).removeprefix("torch.")
        site = Site("m", f"w{number}", (f"w{number}",), "linear", (out, into), dtype, view, number)
        placements.append(Placement(site, "bank", BlockGrid(1, out, into, 2, 3), start))
        start = placements[-1].stop
    return placements


def both_banks(path, weights):
    """The bank that refers to a file, and the one that holds all blocks."""
    found = list(mapped(path, {f"w{i}": weight for i, weight in enumerate(weights)}).values())
    places, placements = places_of(found), placed(weights)
    source = SiteBlocks(
        placements, [places[id(each)] for each in found], Reader(p.file for p in places.values())
    )
    blocks = torch.cat([to_blocks(w, p) for w, p in zip(weights, placements, strict=True)])
    return ReferredRows((2, 3), source), exact_bank(blocks, (2, 3)), placements


SHAPES = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=4)


@settings(max_examples=30, deadline=None, phases=(Phase.generate,))
@given(st.integers(0, 10**6), SHAPES, st.sampled_from(DTYPES))
def test_it_is_the_bank_that_holds_all_blocks(tmp_path_factory, seed, shapes, dtype):
    weights = weights_with_repeats(seed, shapes, dtype)
    bank, held, placements = both_banks(tmp_path_factory.mktemp("files") / "w.safetensors", weights)
    count = held.locations
    assert (bank.locations, bank.singles, bank.dtype) == (count, held.singles, held.dtype)
    with torch.no_grad():
        for start, stop in ((0, count), (count // 3, count // 2 + 1), (count - 1, count)):
            for generate in ("settled_blocks", "portable_blocks"):
                mine, theirs = (getattr(each, generate)(start, stop) for each in (bank, held))
                assert_same_bits({"": mine}, {"": theirs})
            assert torch.equal(
                bank.blocks(start, stop), held.blocks(start, stop)
            )  # whose sums turn -0.0 into 0.0
    settled = [settle_rows(each, placements, dtype.itemsize) for each in (bank, held)]
    assert settled[0][1] == settled[1][1]
    if settled[0][1]:
        assert_same_bits(settled[0][0].state(), settled[1][0].state())
    assert not bank.made
    assert_same_bits(bank.state(), held.state())
    assert bank.made


def net(file, dtype=torch.float32):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).to(
        dtype
    )
    module[2].weight.data[8:] = module[2].weight.data[:8]
    if file is not None:
        for name, tensor in mapped(file, module.state_dict()).items():
            path, _, attribute = name.rpartition(".")
            setattr(module.get_submodule(path), attribute, nn.Parameter(tensor))
    return module.eval()


def joined(file, dtype=torch.float32):
    inputs = Inputs((torch.randn(3, 8, generator=torch.Generator().manual_seed(1)).to(dtype),))
    joint = join([Member("a", net(file, dtype), inputs, Origin("module", "net", "net"))], block=(4, 4))
    bank = joint.dictionary[joint.plan.banks[0].key]
    assert isinstance(bank, ReferredRows) == (file is not None)
    return joint, bank, inputs.args[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_joint_model_of_mapped_weights_is_the_same_model(tmp_path, dtype):
    joint, bank, x = joined(tmp_path / "w.safetensors", dtype)
    other, _, _ = joined(None, dtype)
    with torch.no_grad():
        assert torch.equal(joint["a"](x), other["a"](x))
    assert_same_bits(joint.collapse("a"), other.collapse("a"))
    assert_same_bits(dict(joint["a"].state_dict()), dict(other["a"].state_dict()))
    assert not bank.made
    for each in (joint, other):
        with each.step():
            each["a"](x).sum().backward()
    mine, theirs = (dict(each.named_parameters()) for each in (joint, other))
    assert_same_bits({n: p.grad for n, p in mine.items()}, {n: p.grad for n, p in theirs.items()})
    assert bank.made


def test_what_is_known_stays_known_when_rows_are_made(tmp_path):
    joint, bank, x = joined(tmp_path / "w.safetensors")
    assert joint.known.original == {"a"}
    assert bank.rows.shape[1] == 16 and bank.made
    assert joint.known.original == {"a"} and not joint.known.stale
    with torch.no_grad():
        bank.rows.add_(1)
    assert joint.known.stale == {"a"}
    with torch.no_grad():
        assert not torch.equal(joint["a"](x), net(None)(x))


def test_slots_are_written_to_without_touching_the_file(tmp_path):
    joint, _, x = joined(tmp_path / "w.safetensors")
    before = (tmp_path / "w.safetensors").read_bytes()
    weight = joint["a"][2].weight
    weight.data[0, 0] += 1
    with pytest.raises(surgery.PlanError, match="share rows"):
        joint["a"](x)
    joint.refresh()
    with torch.no_grad():
        assert torch.equal(joint["a"](x), net(None)(x))
    assert (tmp_path / "w.safetensors").read_bytes() == before


def test_what_was_written_to_before_it_was_joined_is_no_file(tmp_path):
    module = net(tmp_path / "w.safetensors")
    with torch.no_grad():
        module[2].weight[3, 3] = 7
    inputs = Inputs((torch.ones(1, 8),))
    joint = join([Member("a", module, inputs, Origin("module", "net", "net"))], block=(4, 4))
    assert joint.collapse("a")["2.weight"][3, 3] == 7


def test_copies_moves_and_states_are_those_of_a_bank_with_rows(tmp_path):
    joint, bank, x = joined(tmp_path / "w.safetensors")
    expected = net(None)(x)
    assert joint.to("cpu") is joint and not bank.made
    copied = deepcopy(joint)
    assert not bank.made
    with torch.no_grad():
        assert torch.equal(copied["a"](x), expected)
    assert torch.equal(deepcopy(bank).rows, bank.rows)
    joint.freeze(joint.plan.placements, False)
    again = pickle.loads(pickle.dumps(joint))
    assert type(again.dictionary[joint.plan.banks[0].key]) is RowsBank
    assert not any(p.requires_grad for p in again.dictionary.parameters())
    joint.freeze(joint.plan.placements, True)
    again = deepcopy(joint)
    again.load_state_dict(joint.state_dict())
    with torch.no_grad():
        assert torch.equal(again["a"](x), expected)
    assert joint.double()["a"](x.double()).dtype == torch.float64


def test_rows_that_are_as_in_the_file_are_given_up(tmp_path):
    _, bank, _ = joined(tmp_path / "w.safetensors")
    assert bank.give_up(lambda: ()) is None
    rows = bank.rows.detach().clone()
    take_back = bank.give_up(lambda: ())
    assert take_back is not None and not bank.made
    take_back()
    assert torch.equal(bank.rows, rows)
    bank.rows.data[0, 0] += 1
    assert bank.give_up(lambda: ()) is None


def test_a_file_that_changes_is_named(tmp_path):
    joint, _, _ = joined(tmp_path / "w.safetensors")
    data = (tmp_path / "w.safetensors").read_bytes()
    (tmp_path / "w.safetensors").write_bytes(data[:-64])
    with pytest.raises(LoadError, match=r"w\.safetensors must stay as it is .* was written to"):
        joint.collapse("a")
    (tmp_path / "w.safetensors").unlink()
    with pytest.raises(LoadError, match="is gone"):
        joint.collapse("a")


def test_placements_know_their_own_file(tmp_path):
    weights = weights_with_repeats(3, [(2, 2), (3, 1)], torch.float32)
    bank, _, placements = both_banks(tmp_path / "w.safetensors", weights)
    for p, weight in zip(placements, weights, strict=True):
        found = bank.held(p)
        assert found is not None and torch.equal(found, weight)
        lent = dict((each.site.name, tensor) for each, tensor in bank.lent())[p.site.name]
        lent.zero_()
        found = bank.held(replace(p))
        assert found is not None and torch.equal(found, weight)
