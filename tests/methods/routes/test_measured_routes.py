"""Starts that are measured: which layers are missed least, by whose batches, and when nothing is measured."""

import signal

import pytest
import torch
from ended_runs import stopped_at
from routed import CONFIG, IDS, bert, distilled, joined, run, train
from torch import nn

import surgery
from surgery.methods.routes.groups import routes_in
from surgery.training.loop.interruptions import Interrupted
from surgery.training.tasks.streams import Batches


def loss_without(gone):
    """The loss of the first two batches, of four layers without some."""
    model = bert()
    model.encoder.layer = nn.ModuleList(each for i, each in enumerate(model.encoder.layer) if i not in gone)
    return float((run(model) - run(bert())).square().mean())


def test_learning_begins_with_the_layers_that_are_missed_most(tmp_path):
    gone: list[int] = []
    while len(gone) < 2:
        gone.append(min(set(range(4)) - set(gone), key=lambda i: loss_without([*gone, i])))
    joint = joined({"layers": 2, "rate": 1e-9})
    task = surgery.Task("text", "text", Batches(IDS, run(bert()), 3), "mse")
    before = [{key: value.clone() for key, value in joint["text"].state_dict().items() if "gates" not in key}]
    report = train(joint, task, burn_in=0, steps=1, generations=1, final=0, optimizer={"lr": 1e-12})
    found = report.methods["routes"]["measured"]["text:encoder.layer.*"][""]
    assert found["left"] == gone and found["passes"] >= (4 * 3 + 3 * 2) * 2  # more where losses are close
    assert found["losses"] == pytest.approx([loss_without(gone[:1]), loss_without(gone)], rel=1e-4)
    (depths,) = routes_in(joint["text"]).values()
    for depth, gates in enumerate(depths):
        assert gates.hard is None
        p = 1 - gates.settings.p_init if depth in gone else gates.settings.p_init
        torch.testing.assert_close(gates.table(), torch.tensor([[p]]))
    after = joint["text"].state_dict()
    assert all(torch.allclose(after[key], value) for key, value in before[0].items())


def test_without_a_phase_in_which_routes_are_learned_the_measured_ones_are_kept():
    joint = joined({"layers": 2})
    report = train(joint, burn_in=0, generations=0, final=2)
    (chosen,) = report.methods["routes"]["chosen"].values()
    left = report.methods["routes"]["measured"]["text:encoder.layer.*"][""]["left"]
    assert [i for i, (name,) in enumerate(chosen[""]) if name == "identity"] == sorted(left)
    layer = sum(t.numel() for t in bert().encoder.layer[0].parameters())
    sizes = {when: each["text"]["parameters"] for when, each in report.sizes.items()}
    assert sizes["joint"] == sizes["alone"] - 2 * layer  # as it is stored


@pytest.mark.parametrize("how", [{"measure": 0, "layers": 2}, {"layers": 4}, {}, {"routing": "soft"}])
def test_nothing_is_measured_where_nothing_is_chosen_by_it(how):
    report = train(joined(how), burn_in=0, steps=1, generations=1)
    assert "measured" not in report.methods["routes"]


def test_each_task_is_measured_by_its_own_batches():
    joint = joined({"layers": 3, "tasks": {"text": ["mood", "topic"]}})
    others = torch.randint(5, 60, (3, 7), generator=torch.Generator().manual_seed(9))
    tasks = [surgery.Task(name, "text", Batches(x, x, 3), {"distillation": 1.0})
             for name, x in (("mood", IDS), ("topic", others))]  # fmt: skip
    report = train(joint, *tasks, burn_in=0, steps=1, generations=1)
    found = report.methods["routes"]["measured"]["text:encoder.layer.*"]
    assert set(found) == {"mood", "topic"} and found["mood"]["losses"] != found["topic"]["losses"]


def test_a_run_that_was_measured_resumes(tmp_path):
    def one(folder, **options):
        joint = joined({"layers": 2})
        report = surgery.train(joint, [distilled()], CONFIG, folder=folder, cpu=True, **options)
        return report.methods["routes"], joint.collapse("text")

    wanted, weights = one(tmp_path / "whole")
    # Within the phase in which routes are learned.
    with stopped_at(6, method="advance", number=signal.SIGTERM), pytest.raises(Interrupted):
        one(tmp_path / "broken")
    found, again = one(tmp_path / "broken", resume=True)
    assert found == wanted and found["measured"]
    assert list(again) == list(weights) and all(torch.equal(again[k], weights[k]) for k in weights)
