"""Fits whose large tensors lie in files: what is made is the same, and memory is bounded."""

from __future__ import annotations

import copy
from importlib import import_module

import pytest
import torch
from torch import nn

import surgery
from surgery.anatomy.plan import Plan
from surgery.disk import aside
from surgery.errors import MemoryLimitError, OutputError, PlanError
from surgery.fitting import bound
from surgery.fitting.assembly import Assembler
from surgery.fitting.units import Arrangement, Unit
from surgery.handles.handle import Made
from surgery.handles.state import LazyState
from surgery.methods.siblings import differences
from surgery.storage.codecs import NATIVE, decode, encode_native

GIB = 2**30


def joined():
    """A model and a fine-tune of it."""
    torch.manual_seed(0)
    base = nn.Sequential(*(nn.Linear(48, 48) for _ in range(4)))
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for layer in tuned:
            layer.weight += 0.01 * torch.randn(48, 1) @ torch.randn(1, 48)  # pyright: ignore
    x = torch.randn(8, 48)
    return surgery.join(
        [surgery.load_member(net, name=name, inputs=x) for name, net in (("a", base), ("b", tuned))]
    )


@pytest.fixture
def rooms(monkeypatch):
    """Files that were taken room of, all of them small."""
    monkeypatch.setattr(aside, "FEWEST", 1024)
    taken, real = [], aside._room
    monkeypatch.setattr(aside, "_room", lambda folder, *rest: taken.append(folder) or real(folder, *rest))
    return taken


def weights(joint):
    return {(name, key): t for name in joint.names for key, t in joint.collapse(name).items()}


def test_what_is_made_is_the_same_and_the_folder_stays_empty(tmp_path, rooms):
    plain = surgery.fit(joined(), budget=0.4, device="cpu")
    assert not rooms
    filed = surgery.fit(joined(), budget=0.4, device="cpu", folder=tmp_path / "new" / "work")
    assert {tmp_path / "new" / "work"} == set(rooms) and not list((tmp_path / "new" / "work").iterdir())
    assert filed.report.errors == plain.report.errors
    expected = weights(plain)
    assert all(torch.equal(t, expected[key]) for key, t in weights(filed).items())


def test_files_are_for_what_does_not_fit(tmp_path, rooms, monkeypatch):
    monkeypatch.setattr(bound, "anonymous", lambda: GIB)
    surgery.fit(joined(), budget=0.4, device="cpu", memory="100GiB", folder=tmp_path)
    assert not rooms
    monkeypatch.setattr(bound, "ALL", 10**6)
    with pytest.raises(PlanError, match=r"`memory` is 2\.1 GB, .* give a `folder`"):
        surgery.fit(joined(), budget=0.4, device="cpu", memory="2GiB")
    surgery.fit(joined(), budget=0.4, device="cpu", memory="2GiB", folder=tmp_path)
    assert rooms
    with pytest.raises(PlanError, match=r"takes about .* `memory` is 1\.0 GB"):
        surgery.fit(joined(), budget=0.4, device="cpu", memory=10**9, folder=tmp_path)
    with pytest.raises(PlanError, match="`memory`"):
        surgery.fit(joined(), memory="much")


def test_a_fit_that_holds_more_leaves_the_members_as_they_were(tmp_path, monkeypatch):
    joint = joined()
    before = {key: t.clone() for key, t in weights(joint).items()}
    monkeypatch.setattr(bound, "anonymous", lambda: GIB)
    monkeypatch.setattr(bound, "EVERY", 1e-4)

    def grows_from_now_on(*args, **options):
        monkeypatch.setattr(bound, "anonymous", lambda: 3 * GIB)
        return False

    monkeypatch.setattr(import_module("surgery.fitting.fit"), "fits", grows_from_now_on)
    with pytest.raises(MemoryLimitError, match=r"`memory` is 2\.1 GB, but 3\.2 GB were held"):
        surgery.fit(joint, budget=0.4, device="cpu", memory="2GiB", folder=tmp_path)
    assert all(torch.equal(t, before[key]) for key, t in weights(joint).items())
    assert joint.report is None


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file"):
        surgery.fit(joined(), budget=0.4, folder=tmp_path / "file" / "in")


def test_what_relatives_share_is_put_aside_also_as_it_is(tmp_path, rooms):
    """An attempt without rounding keeps matrices that are made for it: together as large as the members."""
    again = Made((64, 64), torch.float32, torch.device("cpu"), lambda: torch.ones(64, 64))
    unit = Unit(LazyState({"shared": again}), {}, (NATIVE,), (0.0,), (0.0,))
    arrangement = Arrangement((unit,), 0.0, ())
    assembler = Assembler(Plan((), (), (), ()), {}, (unit,), (arrangement,))
    with aside.aside(tmp_path):
        kept = assembler._encode(unit, "shared", NATIVE)
        assert len(rooms) == 1
        assert torch.equal(decode(kept), torch.ones(64, 64))
        assert torch.equal(decode(differences._kept(encode_native(torch.ones(64, 64)))), torch.ones(64, 64))
        assert len(rooms) == 2  # private rows
    assert not list(tmp_path.iterdir())
