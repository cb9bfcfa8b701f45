"""Banks: exact starts, blocks equal up to a factor, opening for training."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.methods.hypermodules.opening import open_bank
from surgery.methods.rows.bank import RowsBank, codes, exact_bank
from surgery.methods.rows.duplicates import duplicates
from surgery.methods.rows.settling import retire_rare


def blocks_with_repeats(seed: int, count: int, width: int, dtype=torch.float32) -> torch.Tensor:
    """Random blocks of which many equal an earlier one times a power of two or -1, which float arithmetic keeps."""
    g = torch.Generator().manual_seed(seed)
    base = torch.randn(max(1, count // 2), width, generator=g, dtype=dtype)
    pick = torch.randint(len(base), (count,), generator=g)
    factor = torch.tensor([1.0, 1.0, 2.0, -1.0, 0.25], dtype=dtype)[torch.randint(5, (count,), generator=g)]
    return base[pick] * factor[:, None]


def slow_blocks(bank: RowsBank) -> torch.Tensor:
    """Eq. (5), one location and one basis block at a time."""
    k, c, out = bank.hypermodules, bank.context, []
    for psi, z in zip(bank.psi.tolist(), bank.contexts, strict=True):
        if psi < k:
            out.append(sum(z[j] * bank.rows[psi * c + j] for j in range(c)))
        else:
            out.append(z[0] * bank.rows[k * c + psi - k])
    return torch.stack(out)


@given(
    st.integers(0, 999),
    st.integers(1, 60),
    st.integers(1, 30),
    st.sampled_from([torch.float32, torch.float64]),
)
@settings(max_examples=80, deadline=None)
def test_exact_bank_gives_every_block_back_bit_for_bit(seed, count, width, dtype):
    blocks = blocks_with_repeats(seed, count, width, dtype)
    bank = exact_bank(blocks, (1, width))
    assert torch.equal(bank.blocks(), blocks)
    # Blocks of one number are all equal up to a factor; wider random ones are not.
    assert bank.singles <= max(1, count // 2) or width == 1


@given(st.integers(0, 999), st.integers(2, 40))
@settings(max_examples=50, deadline=None)
def test_duplicates_hold_bit_for_bit(seed, count):
    blocks = blocks_with_repeats(seed, count, 8)
    representative, factor = duplicates(blocks)
    assert torch.equal(factor[:, None] * blocks[representative], blocks)


def test_zero_and_negative_zero_blocks_are_kept_apart():
    blocks = torch.tensor([[0.0, 0.0], [-0.0, 0.0], [0.0, 0.0]])
    bank = exact_bank(blocks, (1, 2))
    assert torch.equal(torch.signbit(bank.settled_blocks()), torch.signbit(blocks))
    assert bank.singles == 2


@given(st.integers(0, 999), st.integers(1, 4), st.integers(1, 5), st.integers(1, 20))
@settings(max_examples=50, deadline=None)
def test_blocks_equal_the_slow_reference_with_gradients(seed, k, c, locations):
    g = torch.Generator().manual_seed(seed)
    singles = 3
    psi = torch.randint(k + singles, (locations,), generator=g)
    contexts = torch.randn(locations, c, generator=g, dtype=torch.float64)
    contexts[psi >= k, 1:] = 0
    bank = RowsBank(
        (2, 3), torch.randn(k * c + singles, 6, generator=g, dtype=torch.float64), psi, contexts, k
    )
    weight = torch.randn(locations, 6, generator=g, dtype=torch.float64)
    fast = torch.autograd.grad((bank.blocks() * weight).sum(), [bank.rows, bank.contexts])
    slow = torch.autograd.grad((slow_blocks(bank) * weight).sum(), [bank.rows, bank.contexts])
    torch.testing.assert_close(bank.blocks(), slow_blocks(bank))
    torch.testing.assert_close(fast, slow)
    used = torch.zeros(len(bank.rows), dtype=torch.bool).index_fill(0, bank.codes()[0].flatten(), True)
    assert bool((fast[0].abs().sum(1) > 0)[used].all())
    assert not fast[0][~used].any()


def test_codes_point_behind_the_hypermodules_for_single_rows():
    index, coefficient = codes(torch.tensor([1, 2]), torch.tensor([[0.5, 0.25], [3.0, 9.0]]), hypermodules=2)
    assert index.tolist() == [[2, 3], [4, 4]]
    assert coefficient.tolist() == [[0.5, 0.25], [3.0, 0.0]]


@pytest.mark.parametrize("scale", ["contexts", "rows"])
@pytest.mark.parametrize("context", [1, 2, 4, 7])
def test_opening_keeps_outputs_and_collapse_is_exact(context, scale):
    blocks = blocks_with_repeats(0, 50, 16) * 0.05
    blocks[3] *= 1e-4  # a small block among larger ones: rounding must not reach it
    bank = open_bank(exact_bank(blocks, (4, 4)), context, torch.Generator().manual_seed(0), scale=scale)
    assert bank.hypermodules == len(bank.rows) // context
    torch.testing.assert_close(bank.blocks(), blocks, rtol=0, atol=1e-6 * float(blocks.abs().max()))
    assert torch.equal(bank.settled_blocks(), blocks)


@pytest.mark.parametrize("context", [1, 4])
def test_with_the_scale_in_rows_a_step_of_adam_moves_weights_as_in_plain_training(context):
    blocks = torch.randn(40, 16, generator=torch.Generator().manual_seed(1)) * 0.02
    target = torch.randn(40, 16, generator=torch.Generator().manual_seed(2)) * 0.02
    moved = {}
    for scale in ("contexts", "rows"):
        bank = open_bank(exact_bank(blocks, (4, 4)), context, torch.Generator().manual_seed(0), scale=scale)
        optimizer = torch.optim.Adam([bank.rows], lr=1e-4)
        (bank.blocks() - target).square().sum().backward()
        optimizer.step()
        moved[scale] = float((bank.blocks() - blocks).detach().abs().mean())
    # |z| = 1: all c rows move by lr together, |z|_1 = sqrt(c).
    assert moved["rows"] == pytest.approx(1e-4 * context**0.5, rel=0.01)
    assert moved["contexts"] < 0.05 * moved["rows"]


def test_collapse_keeps_what_was_trained():
    blocks = torch.randn(10, 16) * 0.05
    bank = open_bank(exact_bank(blocks, (4, 4)), 4, torch.Generator().manual_seed(0))
    with torch.no_grad():
        bank.rows[:4] += 0.01
    settled = bank.settled_blocks()
    moved = int(bank.psi.argmin())
    torch.testing.assert_close(settled[moved], bank.blocks()[moved])
    rest = [i for i in range(10) if i != moved]
    assert torch.equal(settled[rest], blocks[rest])


@given(st.integers(0, 999), st.integers(1, 6), st.integers(1, 4), st.integers(1, 30))
@settings(max_examples=60, deadline=None)
def test_retiring_rare_hypermodules_keeps_blocks_and_the_size_bound(seed, k, c, locations):
    g = torch.Generator().manual_seed(seed)
    psi = torch.randint(k, (locations,), generator=g)
    bank = RowsBank(
        (2, 3), torch.randn(k * c, 6, generator=g), psi, torch.randn(locations, c, generator=g), k
    )
    retired = retire_rare(bank)
    torch.testing.assert_close(retired.blocks(), bank.blocks())
    own = int((retired.psi >= retired.hypermodules).sum())
    kept = retired.hypermodules
    assert bool((torch.bincount(retired.psi, minlength=kept)[:kept] >= c).all())
    assert kept * c * 6 + retired.singles * 6 <= locations * 6
    assert retired.singles <= own
