"""What is said of a budget before anything is fitted, and of inputs that are made up."""

from __future__ import annotations

import json

import pytest
import torch
from command_line import surgery as command
from safetensors.torch import save_file

from surgery.errors import PlanError
from surgery.fitting.reach import check_reach

FACTORY = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    layers = nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
    return nn.Sequential(*layers).eval(), torch.randn(4, 32)
"""
MERGE = ("merge", "a=nets.py:net")
FLOAT, WHOLE = torch.float32, torch.int64


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets.py").write_text(FACTORY)


def test_whole_numbers_bound_a_budget_and_equal_ones_count_once():
    member = [((1000,), FLOAT), ((125,), WHOLE)]
    with pytest.raises(PlanError, match=r"budget of 0\.19 cannot be met.*take 0\.2 .*`budget=0\.21` or more"):
        check_reach(0.19, {"a": member})
    assert "one bit" in check_reach(0.11, {"a": member, "b": member})  # the whole numbers may be the same
    assert check_reach(0.23, {"a": member}) == ""
    assert "which is 22.5% of these members" in check_reach(0.21, {"a": member})
    assert check_reach(0.17, {"a": [*member, ((125,), WHOLE)]}).startswith("A budget")  # so may be these two


def test_a_dry_run_says_what_a_budget_may_not_reach():
    code, out, _ = command(*MERGE, "--budget", "0.3", "--dry-run")
    assert code == 0 and "one bit" not in out
    code, out, _ = command(*MERGE, "--budget", "0.03", "--dry-run")
    assert code == 0 and "A budget of 0.03 is below one bit for each number" in " ".join(out.split())
    code, out, _ = command(*MERGE, "--budget", "0.03", "--dry-run", "--json")
    assert code == 0 and "one bit" in json.loads(out)["warning"]
    code, out, err = command(*MERGE, "--budget", "0.0001", "--dry-run")
    assert (code, out) == (2, "") and "A budget of 0.0001 cannot be met" in err and "--budget" in err


def test_made_up_inputs_come_with_what_to_do():
    advice = "give yours with --calibrate"
    assert advice in command(*MERGE, "--dry-run")[1]
    assert advice in command(*MERGE, "--out", "j")[1]
    assert advice in command("add", "j", "b=nets.py:net", "--dry-run")[1]
    assert advice not in command(*MERGE, "--out", "exact", "--max-error", 0)[1]  # nothing moved
    save_file({"arg0": torch.randn(4, 32)}, "x.safetensors")
    code, out, _ = command(*MERGE, "--out", "real", "--calibrate", "x.safetensors")
    assert code == 0 and advice not in out
    assert advice not in command("add", "j", "b=nets.py:net", "--dry-run", "--calibrate", "x.safetensors")[1]
