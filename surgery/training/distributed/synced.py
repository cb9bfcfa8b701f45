"""Batch norms whose statistics are those of the whole batch, where several processes each see a part of it.

Two processes train as one does, up to rounding, except through batch norms: each normalises by its own half of a batch,
which is another network. PyTorch's `SyncBatchNorm` exchanges the sums, in every pass of every such layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from surgery.core.joint import JointModel
from surgery.errors import PlanError


@contextmanager
def synced_norms(joint: JointModel, accelerator: Any, wanted: bool) -> Iterator[None]:
    """Inside, batch norms of all members are `SyncBatchNorm`, on the same parameters and buffers.

    Args:
        joint: whose members are trained.
        accelerator: of the run; one process needs nothing.
        wanted: whether the settings ask for it.

    Raises:
        PlanError: on devices where PyTorch has no such layer, as on CPUs.
    """
    places = list(_norms(joint)) if wanted and accelerator.num_processes > 1 else []
    if places and accelerator.device.type == "cpu":
        raise PlanError(
            "`sync_norms` needs accelerators, as PyTorch's SyncBatchNorm does, but this run is on CPUs: leave it out."
        )
    try:
        for parent, name, norm in places:
            setattr(parent, name, nn.SyncBatchNorm.convert_sync_batchnorm(norm))
        yield
    finally:
        for parent, name, norm in places:
            made = getattr(parent, name)
            norm.train(made.training)
            for buffer in ("running_mean", "running_var", "num_batches_tracked"):
                setattr(norm, buffer, getattr(made, buffer))
            for parameter in ("weight", "bias"):
                setattr(norm, parameter, getattr(made, parameter))
            setattr(parent, name, norm)


def _norms(joint: JointModel) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """The batch norms of all members with their places; a member that is one itself has none."""
    for member in joint.names:
        for parent in joint[member].modules():
            for name, child in parent.named_children():
                if isinstance(child, nn.modules.batchnorm._BatchNorm) and not isinstance(
                    child, nn.SyncBatchNorm
                ):
                    yield parent, name, child
