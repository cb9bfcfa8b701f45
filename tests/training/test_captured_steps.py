"""Steps that are captured as CUDA graphs: what they need, and what tells batches apart; test_device.py runs them."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from training_nets import CONFIG, build, tasks

import surgery
from surgery.core.moves import Moves
from surgery.errors import PlanError
from surgery.settings.training import Training
from surgery.training.loop.captured import _form, captured_of, refusals
from surgery.training.loop.trainer import Trainer
from surgery.training.tasks.tasks import Batch
from surgery.training.train import start, train

STEADY = {**CONFIG, "optimizer": {"lr": 0.01}}


def test_settings_that_change_in_every_step_are_refused_together():
    wrong = {"optimizer": {"schedule": "cosine", "warmup": 3}, "mixed_precision": "fp16", "compile": True}
    with pytest.raises(PlanError) as error:
        train(build(), tasks(), {**CONFIG, **wrong, "checkpointing": True, "capture": True})
    for need in ("schedule constant", "warmup 0", "no or bf16", "compile off", "checkpointing off"):
        assert need in str(error.value)
    assert Training(capture=True).capture and not Training().capture


def test_a_run_on_the_cpu_is_not_captured():
    with pytest.raises(PlanError, match="`capture` needs a run on a CUDA device, found cpu: leave it out"):
        train(build(), tasks(), {**STEADY, "capture": True}, cpu=True)


def trainer_of(**changes):
    joint, config = build(), Training.model_validate({**STEADY, **changes})
    start(joint, config, 0)
    return Trainer(joint, tasks(), config, 0, Accelerator(cpu=True))


def test_what_cannot_be_captured_is_named_together():
    class Counts(Moves):
        def before_step(self):
            pass

    trainer = trainer_of(evolution={"normalise": True})
    trainer.moves = (*trainer.moves, Counts("counts", trainer))
    trainer.accelerator = SimpleNamespace(
        device=torch.device("cuda"), num_processes=2, scaler=object(), mixed_precision="fp16"
    )
    trainer.tasks = (SimpleNamespace(name="adapts", source=object()),)
    said = " ".join(refusals(trainer))
    for each in ("one process, found 2", "fp16", "adapts", "evolution.normalise", "counts (before_step)"):
        assert each in said
    trainer.config = trainer.config.model_copy(update={"capture": True})
    with pytest.raises(PlanError, match=r"needs one process, found 2; and .*: leave it out\.$"):
        captured_of(trainer)


def test_evolution_can_be_captured_and_what_it_keeps_cannot():
    assert [each.acts_in_steps() for each in trainer_of().moves] == [None]
    assert captured_of(trainer_of()) is None  # nobody asked for it
    kept = trainer_of(keep=["b"], evolution={"start": "own"}).moves[0].acts_in_steps()
    assert kept is not None and "keeps b" in kept


def test_forms_are_equal_where_only_values_differ():
    def form(x, target=None, share=1.0, **named):
        return _form({"task": [(Batch((x,), named, target), share)]})

    x = torch.zeros(2, 3)
    first, tensors = form(x, x[0], mask=x)
    assert first == form(x + 1, x[1], mask=x - 1)[0] and len(tensors) == 3
    for other in (
        form(torch.zeros(3, 3), x[0], mask=x),
        form(x, x[0], mask=x.double()),
        form(x, x[0], more=x),
        form(x, x[0], 0.5, mask=x),
        form(x, None, mask=x),
        form(x, x[0], mask=3),
        form([x, x], x[0], mask=x),
    ):
        assert other[0] != first


def test_batches_are_drawn_as_their_passes_begin(monkeypatch):
    """Data that draw from PyTorch's generator do so between the members' own draws, as they always have."""
    order: list[str] = []
    trainer = trainer_of()
    plain = Trainer._run

    def run(self, task, *rest):
        order.append(f"pass of {task.name}")
        return plain(self, task, *rest)

    class Told:
        def __init__(self, stream):
            self.stream = stream

        def __next__(self):
            order.append(f"batch of {self.stream.name}")
            return next(self.stream)

    monkeypatch.setattr(Trainer, "_run", run)
    trainer.streams = {name: Told(stream) for name, stream in trainer.streams.items()}
    trainer.train_step()
    assert order == ["batch of classes", "pass of classes", "batch of product", "pass of product"]


@pytest.mark.parametrize("kind", [torch.nn.LSTM, torch.nn.GRU, torch.nn.RNN])
def test_recurrent_layers_take_the_weights_of_a_step_where_they_are(kind):
    """On a device they would move weights that they have not seen, which looks as if somebody had written to them."""

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.cell, self.last = torch.nn.Linear(3, 8), kind(8, 8), torch.nn.Linear(8, 2)

        def forward(self, x):
            return self.last(self.cell(self.first(x))[0])

    member = surgery.load_member(Net(), name="net", inputs=torch.randn(4, 2, 3))
    joint = surgery.join([member], block=(8, 8)).open(2)
    assert any(p.site.name.startswith("cell.") for p in joint.plan.placements)
    cell = joint["net"].cell
    for _ in range(2):
        with joint.step():
            assert not cell._weights_have_changed()
            joint["net"](torch.randn(4, 2, 3)).sum().backward()
    joint.refresh()
    assert cell._weights_have_changed()  # those that stay are moved once, and are faster then
