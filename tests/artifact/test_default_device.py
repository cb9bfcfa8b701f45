"""A default device that a caller chose is for his own tensors: artifacts are read and exported as without one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import resident_bodies as bodies
import torch
from safetensors.torch import load_file
from torch.utils._pytree import tree_leaves

import surgery


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("artifacts")


@pytest.fixture
def elsewhere() -> Iterator[torch.device]:
    torch.set_default_device("meta")  # where nothing can be computed; a GPU refuses the CPU's tensors
    yield torch.device("meta")
    torch.set_default_device(None)


@pytest.mark.parametrize("resident", [None, "packed", "shared"])
@pytest.mark.parametrize("kind", bodies.CASES)
def test_loads(kind, resident, folder, elsewhere):
    torch.set_default_device(None)
    out, made, x = bodies.saved(kind, folder)
    architectures, name = made(), next(iter(made()))
    wanted = bodies.run(surgery.load(out, modules=made())[name], x)
    how = {} if resident is None else {"resident": resident}
    torch.set_default_device(elsewhere)
    joint = surgery.load(out, modules=architectures, **how)
    tensors = [each for member in joint.names for each in joint[member].parameters()]  # made when asked for
    assert tensors and all(each.device.type == "cpu" for each in tensors)
    assert joint.activate(name) if resident else joint.collapse(name)
    torch.set_default_device(None)
    for mine, theirs in zip(tree_leaves(bodies.run(joint[name], x)), tree_leaves(wanted), strict=True):
        assert torch.equal(mine, theirs)


def test_exports(folder, elsewhere, tmp_path):
    torch.set_default_device(None)
    out, _, _ = bodies.saved("family", folder)
    wanted = load_file(surgery.export(out, "m1", tmp_path / "one") / "model.safetensors")
    torch.set_default_device(elsewhere)
    plan = surgery.plan_export(out, "m1")
    found = load_file(surgery.export(out, "m1", tmp_path / "two") / "model.safetensors", device="cpu")
    torch.set_default_device(None)
    assert plan.nbytes == sum(each.nbytes for each in wanted.values())
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
