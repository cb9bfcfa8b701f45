"""Training on: what a start separates, and that an artifact's members go on with their alignment."""

import json

import pytest
import torch
from command_line import surgery as command
from training_nets import CONFIG, build, net, tasks

import surgery
from surgery.methods.hypermodules.bank import HypermoduleBank
from surgery.methods.hypermodules.opening import open_rest
from surgery.methods.hypermodules.starts import take_over
from surgery.settings.training import Evolution, Training
from surgery.training.loop.starting import start
from surgery.training.train import train

KEY, SMALL = "8x8-float32", "4x4-float32"
EAGER = {"fraction": 0.5, "challengers": 2, "alpha": 0.9, "contexts": "fitted"}


def twins():
    """Two members of equal weights."""
    made = []
    for name in ("a", "b"):
        torch.manual_seed(0)
        made.append(surgery.load_member(net(2), name=name, inputs=torch.zeros(2, 4)))
    return surgery.join(made, block=(8, 8), context=2)


@pytest.mark.parametrize(("kind", "modules"), [("own", 16), ("given", 8)])
@pytest.mark.parametrize("codes", ["contexts", "ones"])
def test_a_start_separates_what_is_equal_or_leaves_it_shared(kind, modules, codes):
    joint = twins()
    before, x = joint.collapse(), torch.randn(5, 4)
    expected = joint["b"](x)
    start(joint, Training(evolution=Evolution(start=kind, codes=codes)), seed=0)
    bank = joint.dictionary[KEY]
    assert bank.hypermodules == modules == len(set(bank.psi.tolist()))
    torch.testing.assert_close(joint["b"](x), expected, rtol=1e-5, atol=1e-6)
    for name, state in joint.collapse().items():
        assert all(torch.equal(tensor, before[name][key]) for key, tensor in state.items())


def test_opening_the_rest_changes_no_block():
    generator = torch.Generator().manual_seed(0)
    psi = torch.tensor([0, 2, 1, 3, 0, 2])
    contexts = torch.randn(6, 2, generator=generator)
    contexts[psi >= 2, 1] = 0
    bank = HypermoduleBank((2, 3), torch.randn(2 * 2 + 2, 6, generator=generator), psi, contexts, 2)
    opened = open_rest(bank, generator)
    assert (opened.hypermodules, opened.singles, opened.context) == (4, 0, 2)
    torch.testing.assert_close(opened.blocks(), bank.blocks(), rtol=1e-5, atol=1e-6)
    assert torch.equal(opened.rows[:4], bank.rows[:4]) and torch.equal(opened.psi, bank.psi)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    joint = build(dropout=0.0, block=(4, 4), context=1)
    train(joint, tasks(), {**CONFIG, "generations": 10, "evolution": EAGER}, cpu=True)
    return surgery.save(joint, tmp_path_factory.mktemp("first") / "joint"), joint


def test_an_alignment_is_taken_over_from_an_artifact(artifact):
    folder, trained = artifact
    loaded = surgery.load(folder, modules={"a": net(2), "b": net(1)})
    kept = loaded.dictionary[SMALL].hypermodules
    assert kept  # the run shared, or this test shows nothing
    members = [
        surgery.load_member(loaded.extract(name), name=name, inputs=torch.zeros(2, 4)) for name in "ab"
    ]
    joint = surgery.join(members, block=(4, 4), context=1)
    take_over(joint, loaded)
    start(joint, Training(evolution=Evolution(start="given")), seed=0)
    now, then = joint.dictionary[SMALL], trained.dictionary[SMALL]
    together = (now.psi[:, None] == now.psi) & (now.psi < kept)[:, None]
    assert bool((then.psi[:, None] == then.psi)[together].all())
    assert int(together.sum()) > int((now.psi < kept).sum())
    assert now.singles == 0 and now.context == 1
    x = torch.randn(9, 4)
    for name in "ab":
        torch.testing.assert_close(joint[name](x), trained[name].eval()(x), rtol=1e-4, atol=1e-5)
    report = train(joint, tasks(), {**CONFIG, "evolution": {"start": "given"}}, cpu=True)
    assert report.hypermodules[SMALL] <= now.hypermodules


def test_surgery_train_goes_on_with_a_folder(tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def net():\n"
        "    torch.manual_seed(0)\n"
        "    parts = [nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2)]\n"
        "    return nn.Sequential(*parts), torch.zeros(2, 4)\n"
        "def data(batch=8, seed=0):\n"
        "    x = torch.randn(32, 4, generator=torch.Generator().manual_seed(1))\n"
        "    y = (x.sum(1) > 0).long()\n"
        "    return {'train': [(x[:16], y[:16])] * 2, 'validation': [(x[16:], y[16:])]}\n"
    )
    (tmp_path / "recipe.yaml").write_text(
        "models:\n"
        "  - {name: a, model: 'own.py:net', tasks: [{data: 'own.py:data'}]}\n"
        "  - {name: b, model: 'own.py:net', tasks: [{data: 'own.py:data'}]}\n"
        "parameters: {block: 4x4, context: 1}\n"
        "train:\n  {steps: 5, generations: 6, final: 1,\n"
        "  evolution: {fraction: 0.5, challengers: 2, alpha: 0.9, contexts: fitted}}\n"
    )
    monkeypatch.chdir(tmp_path)
    first = command("train", "recipe.yaml", "--out", "one", "--cpu", "--json")
    assert first[0] == 0, first[2]
    modules = json.loads(first[1])["hypermodules"]["4x4-float32"]
    assert modules < 32
    second = command(
        "train", "one", "--out", "two", "--cpu", "--json", "--trust-remote-code", "--set",
        "train.evolution.change=none",
    )  # fmt: skip
    assert second[0] == 0, second[2]
    # What too few locations shared was stored as the blocks themselves, so there can be more, not anew 32.
    assert json.loads(second[1])["hypermodules"]["4x4-float32"] < 32
