"""A bound on memory: written in any unit, estimated before anything is written, measured while a run goes on."""

from __future__ import annotations

import math
import time

import pytest
from command_line import surgery
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.random_llamas import llama, make_folder
from surgery.errors import MemoryLimitError, PlanError
from surgery.fitting import bound
from surgery.settings.resources import Resources
from surgery.util import progress

GIB = 2**30


@pytest.mark.parametrize(
    ("text", "found"),
    [("8GiB", 8 * GIB), ("8 gib", 8 * GIB), ("1.5GB", 1_500_000_000), ("512", 512), (7, 7), ("3kB", 3000)],
)
def test_memory_is_given_in_any_unit_of_bytes(text, found):
    assert Resources.of({"memory": text}).memory == found


@pytest.mark.parametrize("text", ["much", "-1GB", "0", "8 XiB", "GiB", 0, "99999999TiB"])
def test_what_is_no_size_is_said(text):
    with pytest.raises(PlanError, match="`memory`"):
        Resources.of({"memory": text})


def test_what_fits_in_memory_in_files_or_not_at_all(monkeypatch):
    monkeypatch.setattr(bound, "anonymous", lambda: GIB)
    elements = [100 << 20] * 4
    assert bound.fits(elements, 100 * GIB)
    assert not bound.fits(elements, 4 * GIB)
    assert bound.fits(elements, 2 * GIB, lossless=True)
    with pytest.raises(
        PlanError, match=r"104,857,600 elements takes about 2.2 GB .* `memory` is 2.1 GB"
    ) as raised:
        bound.fits(elements, 2 * GIB)
    asked = Resources.of({"memory": str(raised.value).split("`memory=")[1].split("`")[0]}).memory
    assert not bound.fits(elements, asked)  # what is advised is enough
    with pytest.raises(PlanError):
        bound.fits(elements, asked - 2**21)


MEASURED = [  # size, how many, MiB before a fit and at its peak, with what it makes in files: docs/results.md
    ("0.03", 2, 552, 868),
    ("0.1", 2, 527, 609),
    ("0.1", 3, 505, 733),
    ("1.1", 2, 453, 995),
    ("1.1", 3, 560, 1274),
]


@pytest.mark.parametrize(("size", "members", "before", "peak"), MEASURED)
def test_estimates_are_no_less_than_what_was_measured_and_at_most_twice(size, members, before, peak):
    elements = [math.prod(tensor.shape) for tensor in llama(size)[1]] * members
    estimate = before + bound.taken(elements) / 2**20
    assert peak <= estimate <= 2 * peak


@given(st.lists(st.integers(1, 1 << 30), max_size=8), st.integers(1, 1 << 30))
def test_one_more_tensor_takes_no_less(elements, more):
    assert bound.taken(elements) <= bound.taken([*elements, more])


def test_a_run_that_holds_more_ends_at_its_next_step(monkeypatch):
    held = [10]
    monkeypatch.setattr(bound, "anonymous", lambda: held[0])
    monkeypatch.setattr(bound, "EVERY", 0.001)
    done = []
    with (
        pytest.raises(MemoryLimitError, match=r"`memory` is 100 B, but 200 B were held .*: Fitting"),
        bound.within(100),
        progress.task("Fitting") as work,
    ):
        work.advance()
        done.append(1)
        held[0] = 200
        time.sleep(0.1)
        held[0] = 10  # a peak between two steps counts
        work.advance()
        done.append(2)
    assert done == [1]
    with bound.within(None), progress.task("Fitting") as work:
        work.advance()


def test_the_command_line_says_it_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(bound, "RUNNING", 10**12)
    for seed, name in enumerate("ab"):
        make_folder(tmp_path / name, "fast", seed)
    given = ("merge", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "joint", "-q", "--device", "cpu")
    code, _, said = surgery(*given, "--memory", "500GB")
    assert code == 2 and said.startswith(
        "surgery: A fit of members whose largest tensor has 8,192 elements"
    ), said
    assert "--memory is 500.0 GB; give --memory " in said and not (tmp_path / "joint").exists()
    code, _, said = surgery(*given, "--memory", "lots")
    assert code == 2 and "--memory" in said, said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_what_is_too_little_to_load_members_says_how_much_a_merge_takes(tmp_path):
    for seed, name in enumerate("ab"):
        make_folder(tmp_path / name, "fast", seed)
    given = ("merge", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "joint", "-q", "--device", "cpu")
    code, _, said = surgery(*given, "--memory", "1MB")
    assert code != 0 and "were held (the last step was: Loading members)" in said, said
    enough = said.split("so give --memory ")[1].split(" or more")[0]
    code, _, said = surgery(*given, "--memory", enough, "--dry-run")
    assert code == 0, said
