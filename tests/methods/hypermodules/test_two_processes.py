"""Two processes decide merging moves, splits and what stays as one does, and hold the same bits."""

import os
from pathlib import Path

import pytest
import torch
import training_nets
from processes import Started, forks

from surgery.training.train import train

KEY = "4x4-float32"
CASES = {
    "splits": {"evolution": {"start": "order", "splits": 0.0, "alpha": 0.5}},
    "merges": {"evolution": {"price": 30.0, "alpha": 0.5, "fraction": 0.5}},
    "keep": {"keep": ["a"], "evolution": {"alpha": 0.5, "fraction": 1.0, "normalise": True}},
}


def run_all(place: Path) -> None:
    """One short run of each case; the banks' states as they are afterwards."""
    found = {}
    for name, changes in CASES.items():
        joint = training_nets.build(dropout=0.0, block=(4, 4), context=2)
        tasks = [task for task in training_nets.tasks() if task.member not in changes.get("keep", ())]
        config = {
            "steps": 3, "generations": 3, "final": 1, "optimizer": {"lr": 0.01, "soft_lr": 0.3},
            "stopping": {"keep": "last"},
        }  # fmt: skip
        train(joint, tasks, config | changes, cpu=True)
        found[name] = {name: tensor.clone() for name, tensor in joint.dictionary[KEY].state().items()}
    torch.save(found, place / f"{os.environ.get('RANK', '0')}.pt")


@pytest.fixture(scope="module")
def states(tmp_path_factory):
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    runs = Started(run_all, one), Started(run_all, two, ranks=2)
    for run in runs:
        run.succeed()
    return [torch.load(file) for file in (one / "0.pt", two / "0.pt", two / "1.pt")]


@forks
@pytest.mark.parametrize("case", CASES)
def test_two_processes_agree_with_one(states, case):
    one, first, second = (state[case] for state in states)
    assert len(one["rows"]) != 2 * len(one["psi"]) or case == "keep"  # something was merged or split
    for name, tensor in one.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], tensor, rtol=1e-4, atol=1e-5)  # sums in another order
