"""Tensors that are put into files: values, shapes and strides stay, files end with them, and a full disk is said."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.disk import aside as module
from surgery.disk.aside import aside, empty_aside, is_aside, put_aside, stack_aside
from surgery.disk.claims import ASIDE, claim
from surgery.errors import LoadError, OutputError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="files are mapped so on Linux alone")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(module, "FEWEST", 1)


@settings(max_examples=50, deadline=None)
@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    dtype=st.sampled_from(
        [torch.float32, torch.bfloat16, torch.uint8, torch.int64, torch.float64, torch.bool]
    ),
    data=st.data(),
)
def test_values_and_layout_stay(tmp_path_factory, shape, dtype, data):
    order = data.draw(st.permutations(range(len(shape))))
    tensor = torch.randint(0, 2, shape).to(dtype).permute(order)
    with aside(tmp_path_factory.mktemp("aside")):
        kept = put_aside(tensor)
    assert kept.equal(tensor)
    assert kept.stride() == tensor.stride()
    assert kept.dtype == dtype
    assert kept.data_ptr() % 64 == 0
    kept.fill_(1)  # the caller's own


def test_values_that_a_view_changes_are_kept_as_they_are_seen(tmp_path):
    seen = torch.tensor([1 + 2j, 3 - 4j]).conj()
    with aside(tmp_path):
        assert put_aside(seen).equal(seen) and put_aside(seen.imag).equal(seen.imag)


def test_what_is_written_in_pieces_is_whole(tmp_path, monkeypatch):
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda handle, content, at: write(handle, content[:1001], at))
    with aside(tmp_path):
        assert put_aside(torch.arange(1000)).equal(torch.arange(1000))


def test_nothing_of_it_is_left(tmp_path):
    with aside(tmp_path):
        kept = put_aside(torch.arange(1000))
        assert kept.data_ptr() != torch.arange(1000).data_ptr()
    assert not list(tmp_path.iterdir())
    assert kept.equal(torch.arange(1000))
    before = os.stat(tmp_path).st_nlink, len(os.listdir("/proc/self/fd"))
    with aside(tmp_path):
        many = [put_aside(torch.arange(1000)) for _ in range(50)]
    assert len(os.listdir("/proc/self/fd")) == before[1]  # a file that is mapped needs no handle
    del many


def test_what_cannot_lie_in_a_file_stays(tmp_path):
    views = torch.zeros(4, 6)[:, ::2], torch.zeros(1, 3).expand(4, 3), torch.zeros(3).to_sparse()
    learns = torch.nn.Parameter(torch.zeros(3))
    with aside(tmp_path):
        for each in (*views, learns, torch.zeros(2, device="meta")):
            assert put_aside(each) is each
    assert put_aside(views[0]) is views[0]
    assert not is_aside()
    with aside(None):
        assert not is_aside()


def test_a_full_disk_is_said(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with (
        aside(tmp_path),
        pytest.raises(OutputError, match=r"4,000 bytes more cannot be had there \(No space left"),
    ):
        put_aside(torch.zeros(1000))
    assert not list(tmp_path.iterdir())


def test_a_file_has_no_name_while_it_is_written_and_one_that_a_kill_left_is_removed(tmp_path, monkeypatch):
    seen, write = [], os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda *given: seen.append([*tmp_path.iterdir()]) or write(*given))
    with aside(tmp_path):
        put_aside(torch.zeros(1000))
    assert seen == [[]]
    (tmp_path / ".out.surgery").mkdir()
    (tmp_path / ".out.surgery" / f"{ASIDE}0123456789abcdef").write_bytes(bytes(1000))
    with claim(tmp_path / "out"):
        pass
    assert not list(tmp_path.iterdir())


def test_what_lies_in_a_file_that_was_cut_off_is_said(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(bytes(1 << 15))
    mapped = torch.from_file(str(path), False, 1 << 15, dtype=torch.uint8)
    os.truncate(path, 10)
    with aside(tmp_path), pytest.raises(LoadError, match="A file was cut off while"):
        put_aside(mapped)
    assert [each.name for each in tmp_path.iterdir()] == ["weights"]


@pytest.mark.parametrize("inside", [True, False])
def test_a_stack_is_that_of_pytorch(tmp_path, inside):
    parts = [torch.randn(3, 4).T for _ in range(3)]
    with aside(tmp_path if inside else None):
        found = stack_aside(3, iter(parts))
        assert found.equal(torch.stack(parts))
        assert found.is_contiguous()
        assert empty_aside((2, 3), parts[0]).shape == (2, 3)


PASSING = """
import sys
from contextlib import nullcontext

import torch

from surgery.disk.aside import aside


def ordinary_memory():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))


with aside(sys.argv[1]) if sys.argv[2] == "aside" else nullcontext():
    torch.ones(8 << 20)  # the C library learns that tensors of 32 MB end
    stay, before = [], ordinary_memory()
    for _ in range(40):  # ends between tensors that stay, as moments do between what is found of them
        passing = torch.ones(1 << 20)
        stay.append(torch.ones(1 << 10))
        passing = torch.ones((1 << 20) + 64 * len(stay))
        stay.append(torch.ones(1 << 10))
    del passing
    print((ordinary_memory() - before) / 1024)
"""


def test_memory_of_tensors_that_pass_goes_back(tmp_path):
    held = {
        way: float(
            subprocess.run(
                [sys.executable, "-c", PASSING, tmp_path, way], check=True, capture_output=True, text=True
            ).stdout
        )
        for way in ("aside", "as ever")
    }
    assert held["aside"] < 3, held  # MiB: of 40 tensors of 4, none is there any more
