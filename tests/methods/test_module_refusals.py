"""Methods that replace modules where they cannot: bad settings, hostile artifacts, joins that fail half way."""

import copy
import pickle
import shutil
from dataclasses import replace

import pytest
import torch
from module_methods import NAME, Net, joined, layer, member, net, run, save_fitted, with_replacement
from torch import nn

import surgery
from surgery.core.module_method import ModuleSurgery
from surgery.core.registry import find_method
from surgery.core.tensor_method import TensorMethod
from surgery.errors import ArtifactError, ExportError, MissingMethodError, PlanError
from surgery.inputs.probes import outputs_over, probe_inputs, relative_error
from surgery.members.replacement import Replacement
from surgery.settings import methods as registry

pytestmark = pytest.mark.filterwarnings("error:.*saved as a live module.*")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A fitted joint model and its artifact."""
    return save_fitted(tmp_path_factory.mktemp("saved") / "joint")


class Held(Net):
    """Holds a layer in a list of its own."""

    def __init__(self):
        super().__init__()
        self.special = [self.layers[3]]


class Read(Net):
    """Reads the width of a layer."""

    def forward(self, x):
        return super().forward(x) * self.layers[3].in_features


class Scripted(Net):
    """Layers that are compiled."""

    def __init__(self):
        super().__init__()
        self.into = torch.jit.script(nn.Sequential(self.into, nn.ReLU()))


BAD = {
    "no such path": (
        Net,
        {"layer.3": "layers.1"},
        r"'net' has no module 'layer.3': did you mean 'layers.3'\?",
    ),
    "no such source": (
        Net,
        {"layers.3": "layers.11"},
        r"'net' has no module 'layers.11': did you mean 'layers.1'\?",
    ),
    "all of it": (Net, {"": "layers.1"}, "all of member 'net' cannot be replaced"),
    "inputs": (
        Net,
        {"layers.3": "into"},
        "must take its inputs, but with ScaledCopy in place of layers.3 .* shapes",
    ),
    "outputs": (Net, {"out": "layers.1"}, r"out of 'net' \(Linear\) gave float32 \[8, 5\], but .* \[8, 16\]"),
    "within": (Net, {"layers": "into", "layers.3": "layers.1"}, "layers.3 of 'net' is inside layers"),
    "a container": (Net, {"layers": "into"}, r"layers of 'net' \(ModuleList\) is not called"),
    "held": (Held, {"layers.3": "layers.1"}, "layers.3 of 'net' is also held by special"),
    "read": (
        Read,
        {"layers.3": "layers.1"},
        "reads a replaced module by attribute: .* no attribute 'in_features'",
    ),
    "settings": (
        Net,
        None,
        r"Settings of method scaled_copy are not valid: 'settings.copis' is not a known key, did you mean 'copies'\?$",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_changes_nothing(case):
    kind, copies, message = BAD[case]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = kind().eval()
    one, before = member(module), dict(module.named_modules())
    settings = {"copis": {}} if copies is None else {"copies": copies}
    with pytest.raises(PlanError, match=message) as caught:
        surgery.plan_modules([one], NAME, settings, block=(8, 8))
    assert len(str(caught.value).strip().split("\n")) == 1
    assert dict(module.named_modules()) == before


class Doubled(ModuleSurgery):
    """A second method for the same place, that fails where it is asked to."""

    name = "doubled"

    def plan(self, anatomies, request):
        return [Replacement("net", "layers.3", self.name)]

    def replace(self, place):
        raise RuntimeError("out of luck")


HOSTILE = {
    "unknown method": (
        {"method": "os", "package": "os"},
        MissingMethodError,
        "method 'os' of package 'os', .* not inst",
    ),
    "method of tensors": (
        {"method": "templates"},
        ArtifactError,
        "must replace modules, but it generates tensors",
    ),
    "a path for a name": ({"method": "../evil"}, ArtifactError, "must describe an artifact"),
    "a package's code": ({"package": "import os"}, ArtifactError, "must describe an artifact"),
    "settings": (
        {"settings": {"of": 3, "run": "rm"}},
        ArtifactError,
        "'scaled_copy': .*of.*'.*run' is not a known key",
    ),
    "no such path": (
        {"path": "layers.9"},
        ArtifactError,
        "cannot be built as it was saved: .* no module 'layers.9'",
    ),
    "no such source": ({"settings": {"of": "x" * 3000}}, ArtifactError, "cannot be built as it was saved"),
    "other shapes": ({"settings": {"of": "out"}}, ArtifactError, "of another shape|missing|unexpected"),
    "itself": ({"path": ""}, ArtifactError, "must describe an artifact"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_what_a_stranger_s_manifest_says_is_checked_before_anything_is_built(saved, tmp_path, case):
    values, kind, message = HOSTILE[case]
    folder = shutil.copytree(saved[1], tmp_path / "joint")
    with_replacement(folder, values)
    given = Net()
    with pytest.raises(kind, match=message) as caught:
        surgery.load(folder, modules={"net": given})
    assert len(str(caught.value)) < 4100 and type(layer(given, 3)) is nn.Linear


def test_two_methods_on_one_path_and_a_method_that_fails(monkeypatch, tmp_path):
    monkeypatch.setitem(registry.REGISTERED, "doubled", Doubled())
    module = net()
    one = member(module)
    mine = Replacement("net", "layers.3", NAME, {"of": "layers.1"})
    plan = surgery.make_plan([surgery.discover(one)], (8, 8))
    both = replace(plan, replacements=(mine, Replacement("net", "layers.3", "doubled")))
    with pytest.raises(
        PlanError, match="once only, but methods 'scaled_copy' and 'doubled' would do so twice"
    ):
        surgery.join([one], both)
    other = replace(both, replacements=(replace(mine, path="layers.2"), both.replacements[1]))
    with pytest.raises(PlanError, match=r"replace layers.3 of member 'net': RuntimeError: out of luck"):
        surgery.join([one], other)
    again = surgery.load(surgery.save(joined(), tmp_path / "joint"), modules={"net": Net()}).copy_member(
        "net"
    )
    with pytest.raises(PlanError, match="once only"):
        surgery.plan_modules([again], "doubled", block=(8, 8))
    assert all(type(layer) is nn.Linear for layer in module.layers)
    assert torch.equal(run(surgery.join([one], plan)["net"]), run(net()))


def test_a_join_that_fails_leaves_the_module_as_it_was(monkeypatch):
    module = net()
    one = member(module)
    plan = surgery.plan_modules([one], NAME, {"copies": {"layers.3": "layers.1"}}, block=(8, 8))

    def fail(*_):
        raise MemoryError("no room")

    monkeypatch.setattr("surgery.core.joining.exact_bank", fail)
    with pytest.raises(MemoryError):
        surgery.join([one], plan)
    assert type(layer(module, 3)) is nn.Linear and torch.equal(run(module), run(net()))


class Wrapped(ModuleSurgery):
    """What was there, with a trained shift."""

    name = "wrapped"

    def plan(self, anatomies, request):
        return [Replacement("net", "layers.3", self.name)]

    def replace(self, place):
        return Shifted(place.current)


class Shifted(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.shift = inner, nn.Parameter(torch.rand(16))

    def forward(self, x):
        return self.inner(x) + self.shift


class Twice(Net):
    """The last layer has a second name."""

    def __init__(self):
        super().__init__()
        self.again = self.layers[3]

    def forward(self, x):
        return super().forward(x) + self.again(x @ torch.ones(6, 16)).sum()


def test_a_module_may_stay_within_what_replaces_it_and_have_two_names(monkeypatch, tmp_path):
    monkeypatch.setitem(registry.REGISTERED, "wrapped", Wrapped())
    module = Twice().eval()
    before = copy.deepcopy(module)
    one = member(module)
    joint = surgery.join([one], surgery.plan_modules([one], "wrapped", block=(8, 8)))
    again = surgery.join([member(copy.deepcopy(before))], block=(8, 8))
    assert joint["net"].again is layer(joint["net"], 3) and not torch.equal(run(joint["net"]), run(before))
    for twin in (joint, copy.deepcopy(joint), pickle.loads(pickle.dumps(joint))):
        assert torch.equal(run(twin.original("net")), run(before))
    surgery.fit(joint)
    surgery.fit(again, max_error=0)
    probes = probe_inputs(again.members["net"], seed=0)
    measured = relative_error(outputs_over(before, probes), outputs_over(joint["net"], probes))
    assert joint.report.errors["net"] == pytest.approx(measured, rel=1e-4)
    loaded = surgery.load(surgery.save(joint, tmp_path / "joint"), modules={"net": Twice()})
    assert torch.equal(run(loaded["net"]), run(joint["net"]))
    with pytest.raises(ExportError, match="no ordinary form of Shifted: save the joint model"):
        joint.extract("net")


def test_methods_are_of_their_kind():
    with pytest.raises(PlanError, match="'templates' must replace modules, but it generates tensors"):
        surgery.plan_modules([member()], "templates")
    with pytest.raises(PlanError, match="'scaled_copy' must generate tensors, but it replaces modules"):
        find_method(NAME, TensorMethod)
