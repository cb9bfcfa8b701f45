"""Pieces of work side by side give what they give one after the other, and leave PyTorch's threads as they were."""

import threading
import time
from contextvars import ContextVar

import pytest
import torch

from surgery.storage.codecs import Statistics, decode, encode, grouped
from surgery.storage.codecs import integers as of_integers
from surgery.util.threads import side_by_side

some = ContextVar("some", default=0)


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("three_threads")
def test_pieces_run_at_the_same_time_with_one_thread_each_and_the_state_of_the_caller():
    meet = threading.Barrier(3, timeout=20)  # which no fewer than three at a time get past
    some.set(7)

    def work(number):
        meet.wait()
        torch.ones(2).sum()
        return (
            number, torch.get_num_threads(), torch.is_inference_mode_enabled(), torch.is_grad_enabled(), some.get()
        )  # fmt: skip

    with torch.inference_mode():
        assert side_by_side(work, range(6)) == [(n, 1, True, False, 7) for n in range(6)]
    with torch.no_grad():
        assert side_by_side(work, range(3)) == [(n, 1, False, False, 7) for n in range(3)]
    assert side_by_side(work, range(3)) == [(n, 1, False, True, 7) for n in range(3)]
    assert torch.get_num_threads() == 3
    seen = []
    later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert seen == [3]


@pytest.mark.usefixtures("three_threads")
def test_what_a_piece_raises_is_raised_and_what_has_not_begun_does_not_begin():
    begun = []

    def work(number):
        begun.append(number)
        if number == 1:
            raise ValueError(f"piece {number}")
        time.sleep(0.01)

    with pytest.raises(ValueError, match="piece 1"):
        side_by_side(work, range(300))
    assert len(begun) < 300 and torch.get_num_threads() == 3


def test_one_piece_or_one_thread_needs_no_other_thread():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert side_by_side(lambda n: threading.current_thread(), [0]) == [threading.current_thread()]
        torch.set_num_threads(1)
        assert side_by_side(lambda n: threading.current_thread(), [0, 1]) == 2 * [threading.current_thread()]
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize("fed", [False, True])
def test_codes_do_not_depend_on_the_number_of_threads(monkeypatch, fed):
    monkeypatch.setattr(of_integers, "CHUNK", 1 << 10)
    monkeypatch.setattr(of_integers, "FED_BACK", 1 << 10)
    inputs = torch.randn(300, 64)
    known = Statistics(inputs.T @ inputs / 300, 1) if fed else None
    weight = torch.randn(200, 64)
    side = [encode(weight, grouped(bits, 32), known) for bits in (2, 4, 10)]
    torch.set_num_threads(1)
    for each in side:
        alone = encode(weight, each.precision, known)
        assert all(torch.equal(alone.parts[name], part) for name, part in each.parts.items())
        assert torch.equal(decode(alone), decode(each))
