"""Losses by name, alone or added with weights; a new one is a function and a line in `LOSSES`."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from surgery.errors import PlanError
from surgery.training.tasks import Batch, Loss, prediction_of

DISTILLATION = "distillation"


def cross_entropy(output: Any, batch: Batch) -> Tensor:
    """Cross-entropy of class scores `[..., C]` with class numbers `[...]`; targets of -100 do not count."""
    scores = prediction_of(output)
    return F.cross_entropy(scores.flatten(0, -2).float(), batch.target.flatten(), ignore_index=-100)


def language_modelling(output: Any, batch: Batch) -> Tensor:
    """Cross-entropy of every token with the scores at the one before it, for members that see all tokens.

    The target, or without one `input_ids`, holds the tokens `[B, T]`.
    """
    tokens = batch.target if batch.target is not None else batch.kwargs["input_ids"]
    scores = prediction_of(output)[:, :-1]
    return F.cross_entropy(scores.flatten(0, -2).float(), tokens[:, 1:].flatten(), ignore_index=-100)


def mse(output: Any, batch: Batch) -> Tensor:
    """Mean squared error."""
    prediction = prediction_of(output)
    return F.mse_loss(prediction.float(), batch.target.float().view(prediction.shape))


def binary_cross_entropy(output: Any, batch: Batch) -> Tensor:
    """Binary cross-entropy of scores, each of them a yes or no of its own."""
    scores = prediction_of(output)
    return F.binary_cross_entropy_with_logits(scores.float(), batch.target.float().view(scores.shape))


LOSSES: dict[str, Loss] = {
    "cross_entropy": cross_entropy,
    "language_modelling": language_modelling,
    "mse": mse,
    "binary_cross_entropy": binary_cross_entropy,
}


def distillation(original: nn.Module) -> Loss:
    """The squared distance of all floating-point outputs from those of the member as it was, relative to these.

    Args:
        original: a frozen copy of the member; it sees the same inputs and no target is needed.
    """

    def loss(output: Any, batch: Batch) -> Tensor:
        with torch.no_grad():
            wanted = _floats(original(*batch.args, **batch.kwargs))
        found = _floats(output)
        energies = _mean_over_processes(torch.stack([b.float().square().mean() for b in wanted]))
        distances = [(a.float() - b.float()).square().mean() for a, b in zip(found, wanted, strict=True)]
        return (torch.stack(distances) / energies.clamp_min(1e-12)).mean()

    return loss


def loss_of(wanted: str | Mapping[str, float] | Loss, original: Callable[[], nn.Module]) -> Loss:
    """A task's loss as one function.

    Args:
        wanted: a name, names with their weights, or the function itself.
        original: makes the frozen copy of the member, where distillation asks for it.

    Raises:
        PlanError: for a name that is not known.

    Example:
        >>> loss_of({"mse": 2.0}, nn.Identity)(torch.ones(1, 1), Batch(target=torch.zeros(1, 1)))
        tensor(2.)
    """
    if callable(wanted):
        return wanted
    terms = {wanted: 1.0} if isinstance(wanted, str) else dict(wanted)
    parts: list[tuple[float, Loss]] = []
    for name, weight in terms.items():
        if name == DISTILLATION:
            parts.append((weight, distillation(original())))
        elif name in LOSSES:
            parts.append((weight, LOSSES[name]))
        else:
            known = [*LOSSES, DISTILLATION]
            near = difflib.get_close_matches(name, known, n=1)
            advice = f"did you mean '{near[0]}'?" if near else f"known are {', '.join(known)}"
            raise PlanError(f"There is no loss '{name}', {advice}")
    if len(parts) == 1 and parts[0][0] == 1.0:
        return parts[0][1]
    return lambda output, batch: torch.stack([w * part(output, batch) for w, part in parts]).sum()


def needs_original(wanted: str | Mapping[str, float] | Loss) -> bool:
    """Whether a loss compares with the member as it was."""
    return not callable(wanted) and DISTILLATION in ({wanted} if isinstance(wanted, str) else wanted)


def _mean_over_processes(values: Tensor) -> Tensor:
    """What the processes that share a batch have in the mean: a scale must be the same in all of them."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(values)
        values /= torch.distributed.get_world_size()
    return values


def _floats(output: Any) -> list[Tensor]:
    leaves = tree_leaves(dict(output) if isinstance(output, Mapping) else output)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
