"""Tensors of mapped files: where they lie, until somebody writes to them."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from surgery.disk.mapped import Reader, files_of, places_of
from surgery.safetensors.writing import write_aligned
from surgery.util import alignment
from surgery.util.alignment import align_module, is_aligned

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="mappings are read from /proc")
NAMES = ("a", "b", "c")


@pytest.fixture
def file(tmp_path):
    tensors = {name: torch.randn(5, 33, dtype=torch.float32) for name in NAMES}
    write_aligned(tmp_path / "w.safetensors", tensors)
    return tmp_path / "w.safetensors"


def read(file):
    from safetensors import safe_open

    with safe_open(str(file), framework="pt") as opened:
        return [opened.get_tensor(name) for name in NAMES]


def test_a_mapped_tensor_is_read_again_from_its_place(file):
    tensors = read(file)
    places = places_of(tensors)
    reader = Reader(place.file for place in places.values())
    for tensor in tensors:
        again = reader.read(places[id(tensor)], tuple(tensor.shape), tensor.dtype)
        assert torch.equal(again, tensor) and again.untyped_storage().nbytes() == tensor.nbytes
    assert [each.path for each in files_of(tensors)] == [file]


def test_what_lies_in_memory_or_is_no_longer_as_in_its_file_has_no_place(file):
    tensors = read(file)
    apart = [torch.ones(4), tensors[0].clone(), tensors[1].t(), torch.empty(3, device="meta")]
    assert [id(each) in places_of(apart) for each in apart] == [False] * 4
    tensors[2][0, 0] = 7.0
    assert places_of(tensors) == {}


def test_a_file_that_was_replaced_has_no_places(file):
    tensors = read(file)
    file.with_name("other").write_bytes(b"another")
    file.with_name("other").replace(file)
    assert places_of(tensors) == {}


def test_a_large_mapped_module_is_aligned_when_it_first_runs(file, monkeypatch):
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    moved = (length + 8).to_bytes(8, "little") + data[8 : 8 + length] + b" " * 8 + data[8 + length :]
    file.write_bytes(moved)  # data begin 8 bytes further, as other writers have them
    monkeypatch.setattr(alignment, "MUCH", 1)
    module = nn.Linear(33, 5, bias=False)
    module.weight = nn.Parameter(read(file)[0])
    assert align_module(align_module(module)) is module and len(module._forward_pre_hooks) == 1
    assert not is_aligned(module.weight) and len(places_of([module.weight])) == 1
    module(torch.ones(1, 33))
    assert is_aligned(module.weight) and not places_of([module.weight])
