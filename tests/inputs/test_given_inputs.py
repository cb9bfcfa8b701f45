"""Example inputs: a task's data where it has some; given ones that do not run are refused in one sentence."""

import logging

import numpy as np
import pytest
import torch
from command_line import surgery as command
from torch import nn

import surgery
from surgery.errors import LoadError, PlanError
from surgery.pipeline.train import prepare_training, train_recipe
from surgery.settings.recipe import Recipe
from surgery.util.quiet import quiet, torch_silent

SOURCE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x, scale):
        return self.last(self.middle(self.first(x).relu()).relu()) * scale

def net():
    return Net()

def with_inputs():
    return Net(), {"x": torch.zeros(5, 6), "scale": torch.ones(5, 1)}

def data(batch, width=6):
    with open("reads.txt", "a") as stream:
        stream.write("once ")
    x = torch.randn(32, width)
    batches = [({"x": part, "scale": torch.ones(len(part), 1)}, part[:, :3].argmax(1)) for part in x.split(batch)]
    return {"train": batches, "validation": batches[:1]}

def once(batch):
    yield from data(batch)["train"]

def nothing(batch):
    return {"train": []}
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(SOURCE)
    return tmp_path


def recipe(model="mine.py:net", data="mine.py:data", **options):
    task = {"data": data, "batch": 8, "metric": "accuracy", "options": options}
    return Recipe.of({
        "models": [{"name": "net", "model": model, "tasks": [task]}],
        "parameters": {"block": "8x8", "context": 1},
        "train": {"steps": 2, "generations": 1},
        "out": "out",
    })  # fmt: skip


def test_a_factory_without_inputs_takes_those_of_its_task_which_are_read_once(here):
    prepared = prepare_training(recipe())
    (member,) = prepared.members
    assert {name: tuple(t.shape) for name, t in member.inputs.kwargs.items()} == {
        "x": (2, 6),
        "scale": (2, 1),
    }
    assert member.inputs.source == "first batch of mine.py:data"
    assert [site.name for site in prepared.anatomies[0].sites] == ["middle.weight"]
    assert prepared.anatomies[0].tier.startswith("recorder")
    (here / "reads.txt").unlink()
    train_recipe(recipe(), cpu=True)
    assert (here / "reads.txt").read_text() == "once "


def test_a_factorys_own_inputs_and_a_timm_models_data(here):
    (member,) = prepare_training(recipe("mine.py:with_inputs")).members
    assert member.inputs.kwargs["x"].shape == (5, 6)
    np.savez(here / "pictures.npz", inputs=np.random.rand(6, 3, 64, 64).astype("f"), targets=np.arange(6) % 3)
    made = recipe("timm:test_resnet.r160_in1k?pretrained=false&num_classes=3", "pictures.npz")
    assert prepare_training(made).members[0].inputs.args[0].shape == (2, 3, 64, 64)


def test_data_that_do_not_run_are_refused_with_what_was_given(here, capfd):
    with pytest.raises(LoadError) as caught:
        prepare_training(recipe(width=5))
    said = str(caught.value)
    assert "example inputs of 'net' (first batch of mine.py:data) must run in Net" in said
    assert "mat1 and mat2" in said and "x float32 [8, 5], scale float32 [8, 1]" in said
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("data", "said"), [("once", "can be iterated over only once"), ("nothing", "have no batch")]
)
def test_data_that_show_no_inputs_are_blamed_themselves(here, data, said):
    with pytest.raises(PlanError, match=rf"data mine\.py:{data} of member 'net' .*{said}: return a list"):
        prepare_training(recipe(data=f"mine.py:{data}"))


def test_data_that_can_be_read_once_are_left_to_training_where_inputs_are_given(here):
    assert prepare_training(recipe("mine.py:with_inputs", "mine.py:once")).members[0].inputs.kwargs


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        (torch.zeros(2, 5), r"raised RuntimeError.*given were float32 \[2, 5\]"),
        ((torch.zeros(2, 6).long(),), r"given were int64 \[2, 6\]"),
        ({"y": torch.zeros(2, 6)}, r"unexpected keyword argument 'y'; given were y float32 \[2, 6\]"),
        ((), "given were no arguments"),
        (((torch.zeros(1), None), None), r"given were \(float32 \[1\], None\), None"),
    ],
)
def test_given_inputs_that_do_not_run_are_refused_and_nothing_else_is_said(inputs, said, capfd):
    net = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    with pytest.raises(LoadError, match=said):
        surgery.load_member(net, name="net", inputs=inputs)
    assert capfd.readouterr() == ("", "")


def test_a_try_draws_no_random_numbers():
    before = torch.get_rng_state()

    class Noisy(nn.Linear):
        def forward(self, x):
            return super().forward(x + torch.randn_like(x))

    surgery.load_member(Noisy(3, 5), name="noisy", inputs=torch.zeros(2, 3))
    state = torch.get_rng_state()
    torch.set_rng_state(before)
    Noisy(3, 5)
    assert torch.equal(torch.get_rng_state(), state)


def test_inspect_with_inputs_of_a_factory_that_has_none(here):
    np.savez(here / "batch.npz", x=np.zeros((3, 6), "f"), scale=np.ones((3, 1), "f"))
    code, shown, _ = command("inspect", "mine.py:net", "--inputs", "batch.npz", "--json")
    assert code == 0 and '"inputs": "batch.npz"' in shown and '"middle.weight"' in shown
    np.savez(here / "bad.npz", x=np.zeros((3, 5), "f"), scale=np.ones((3, 1), "f"))
    code, shown, said = command("inspect", "mine.py:net", "--inputs", "bad.npz")
    assert (code, shown) == (2, "") and said.count("\n") == 1
    assert "(bad.npz) must run in Net" in said and "float32 [3, 5]" in said


def test_torchs_log_is_kept_off_the_screen_and_comes_back(capfd):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x):
            if torch.compiler.is_compiling() or x.device.type == "meta":
                raise RuntimeError("not here")
            return self.b(self.a(x))

    member = surgery.load_member(Odd(), name="odd", inputs=torch.zeros(2, 4))
    surgery.discover(member)
    with torch_silent(), quiet():
        logging.getLogger("torch._dynamo").error("hidden")
    assert capfd.readouterr() == ("", "")
    logging.getLogger("torch._dynamo").error("shown")
    assert "shown" in capfd.readouterr().err
