"""Members that stay packed on another device: one that lies in ordinary memory and refuses the CPU's tensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import resident_bodies as bodies
import torch
from other_device import allocated, elsewhere, peak
from torch import nn


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("artifacts")


pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is at hand: tests/test_device.py")


@pytest.mark.parametrize(
    "how, way, cache",
    [("load", "packed", 0), ("to", "shared", 0), ("to", "shared", 1 << 20), ("module", "packed", 0)],
)
@pytest.mark.parametrize("kind", bodies.CASES)
def test_moved_members_compute(kind, how, way, cache, folder: Path, monkeypatch):
    # What PyTorch does on a GPU, where it puts weights into one piece of memory.
    monkeypatch.setattr(
        nn.RNNBase, "flatten_parameters", lambda own: [w.data_ptr() for w in own._flat_weights]
    )
    bodies.moved_members_compute(kind, way, cache, how, elsewhere(), folder, allocated)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casts_stay_packed(dtype, folder: Path):
    bodies.casts_stay_packed(dtype, elsewhere(), folder)


def test_members_take_turns(folder: Path):
    bodies.members_take_turns(elsewhere(), folder)


def test_what_is_extracted_trains(folder: Path):
    bodies.extracted_trains(torch.device("cpu"), folder)  # gradients need a device's own queue


def test_one_weight_at_a_time(folder: Path):
    bodies.one_weight_at_a_time(elsewhere(), folder, peak)
