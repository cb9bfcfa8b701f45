"""The method of docs/add_a_method.md that replaces modules, written into a file and imported as a user's is."""

import importlib.util
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from artifacts import rewrite
from places import DOCS
from torch import nn

import surgery

PAGE = DOCS / "add_a_method.md"
NAME = "scaled_copy"
X = torch.randn(24, 6, generator=torch.Generator().manual_seed(3))


def page_code(first_line: str) -> str:
    """The code of the page that begins with a line."""
    found = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    return next(code for code in found if code.startswith(first_line))


def _imported():
    if NAME not in sys.modules:
        path = Path(tempfile.mkdtemp()) / f"{NAME}.py"
        path.write_text(page_code("# scaled_copy.py"))
        spec = importlib.util.spec_from_file_location(NAME, path)
        sys.modules[NAME] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[NAME])
    return sys.modules[NAME]


scaled_copy = _imported()


class Net(nn.Module):
    """Four layers of one structure in a row, between two others."""

    def __init__(self):
        super().__init__()
        self.into = nn.Linear(6, 16)
        self.layers = nn.ModuleList([nn.Linear(16, 16) for _ in range(4)])
        self.out = nn.Linear(16, 5)

    def forward(self, x):
        x = self.into(x)
        for layer in self.layers:
            x = torch.relu(layer(x)) + x
        return self.out(x)


def net(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net().eval()


def member(module=None, name="net"):
    inputs = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    return surgery.load_member(net() if module is None else module, name=name, inputs=inputs)


def joined(module=None, copies=None, **options):
    one = member(module)
    settings = {"copies": {"layers.3": "layers.1"} if copies is None else copies}
    return surgery.join([one], surgery.plan_modules([one], NAME, settings, block=(8, 8), **options))


def run(module, x=X):
    with torch.no_grad():
        return module(x)


def same(one, other) -> bool:
    """Whether two state dicts, which must have the same names in one order, have the same tensors."""
    assert list(one) == list(other)
    return all(torch.equal(one[key], other[key]) for key in one)


def layer(module, number) -> Any:
    return module.get_submodule(f"layers.{number}")


def save_fitted(folder):
    """A fitted joint model of a replaced layer, whose scale is no 1, and the artifact of it."""
    joint = joined()
    layer(joint["net"], 3).scale.data.fill_(0.75)
    surgery.save(surgery.fit(joint, max_error=0.8), folder)
    return joint, folder


def with_replacement(folder, values):
    """Let a manifest say something else of its only replacement."""
    rewrite(folder, lambda m: m["members"]["net"]["replacements"][0].update(values))
