"""Computes a loss over the whole batch when processes each hold a part.

Every process sees its own part of a batch, and its gradients count by the part's share (see `streams.share`). A loss
that is no mean over examples, of moments say, takes the mean over the whole batch from here.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from surgery.training.tasks.tasks import Batch
from surgery.util.collectives import average, processes


def over_batch(mean: Tensor, batch: Batch) -> Tensor:
    """The mean over a batch, from that over this process's part; gradients flow through the part alone.

    The trainer weights them by the part's share and averages over the processes, which makes them those of the whole.

    Args:
        mean: over the examples of this process's part, of any shape.
        batch: the part.
    """
    if batch.place is None or processes() == 1:
        return mean
    whole = mean.detach().clone()
    average([whole], batch.place.weight)
    return mean + (whole - mean.detach())


@torch.no_grad()
def average_statistics(module: nn.Module) -> None:
    """Let all processes have one set of running statistics: the mean of what each has seen in its parts."""
    if processes() > 1:
        norms = [norm for norm in module.modules() if norm.training and hasattr(norm, "running_mean")]
        found = [getattr(norm, name, None) for norm in norms for name in ("running_mean", "running_var")]
        average(each for each in found if isinstance(each, Tensor))
