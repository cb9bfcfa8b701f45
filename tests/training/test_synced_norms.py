"""Batch norms over all processes: put in for a run, taken out afterwards, refused where PyTorch has none."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import surgery
from surgery.errors import PlanError
from surgery.training.distributed.synced import synced_norms


def joined():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(4, 8), nn.Sequential(nn.BatchNorm1d(8), nn.ReLU()), nn.Linear(8, 8), nn.Linear(8, 2)
    )
    return surgery.join(
        [surgery.load_member(net, name="net", inputs=torch.zeros(3, 4))], block=(4, 4), context=2
    )


def accelerator(processes, device):
    return SimpleNamespace(num_processes=processes, device=torch.device(device))


def test_norms_are_synced_inside_and_what_they_were_afterwards():
    joint = joined()
    norm, keys = joint["net"][1][0], list(joint["net"].state_dict())
    with synced_norms(joint, accelerator(2, "meta"), True):
        inside = joint["net"][1][0]
        assert type(inside) is nn.SyncBatchNorm and inside.weight is norm.weight
        assert inside.running_mean is norm.running_mean and list(joint["net"].state_dict()) == keys
        inside.running_mean.fill_(3)
        joint["net"].eval()
    assert joint["net"][1][0] is norm and type(norm) is nn.BatchNorm1d and not norm.training
    assert bool((norm.running_mean == 3).all())


def test_one_process_needs_none_and_cpus_have_none():
    joint = joined()
    for processes, wanted in ((1, True), (2, False)):
        with synced_norms(joint, accelerator(processes, "cpu"), wanted):
            assert type(joint["net"][1][0]) is nn.BatchNorm1d
    with pytest.raises(PlanError, match="sync_norms"), synced_norms(joint, accelerator(2, "cpu"), True):
        pass
    assert type(joint["net"][1][0]) is nn.BatchNorm1d
