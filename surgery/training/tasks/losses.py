"""Losses by name, alone or added with weights; a new one is a function and a line in `LOSSES`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from surgery.errors import PlanError
from surgery.settings.problems import advice_on
from surgery.training.tasks.adaptation import WAYS, adapt_by
from surgery.training.tasks.features import SourceFeatures
from surgery.training.tasks.stateful import Sum
from surgery.training.tasks.tasks import Batch, Loss, prediction_of
from surgery.util.collectives import average
from surgery.util.dtypes import wide

DISTILLATION = "distillation"
Wanted = str | Mapping[str, float] | Loss


def cross_entropy(output: Any, batch: Batch) -> Tensor:
    """Cross-entropy of class scores `[..., C]` with class numbers `[...]`; targets of -100 do not count."""
    scores = prediction_of(output)
    return F.cross_entropy(wide(scores.flatten(0, -2)), _target(batch).flatten(), ignore_index=-100)


def language_modelling(output: Any, batch: Batch) -> Tensor:
    """Cross-entropy of every token with the scores at the one before it, for members that see all tokens.

    The target, or without one `input_ids`, holds the tokens `[B, T]`.
    """
    tokens = (
        batch.kwargs["input_ids"] if batch.target is None and "input_ids" in batch.kwargs else _target(batch)
    )
    scores = prediction_of(output)[:, :-1]
    return F.cross_entropy(wide(scores.flatten(0, -2)), tokens[:, 1:].flatten(), ignore_index=-100)


def mse(output: Any, batch: Batch) -> Tensor:
    """Mean squared error."""
    prediction = wide(prediction_of(output))
    return F.mse_loss(prediction, _target(batch).to(prediction.dtype).view(prediction.shape))


def binary_cross_entropy(output: Any, batch: Batch) -> Tensor:
    """Binary cross-entropy of scores, each of them a yes or no of its own."""
    scores = wide(prediction_of(output))
    return F.binary_cross_entropy_with_logits(scores, _target(batch).to(scores.dtype).view(scores.shape))


def statistics(output: Any, batch: Batch) -> Tensor:
    """Nothing to learn: only running statistics of batch norms follow the data (AdaBN, Li et al. 2016)."""
    return wide(prediction_of(output)).sum() * 0


LOSSES: dict[str, Loss] = {
    "cross_entropy": cross_entropy,
    "language_modelling": language_modelling,
    "mse": mse,
    "binary_cross_entropy": binary_cross_entropy,
    "statistics": statistics,
}
TARGETED = ("cross_entropy", "mse", "binary_cross_entropy")  # those that cannot do without targets


def distillation(original: nn.Module) -> Loss:
    """The squared distance of all floating-point outputs from those of the member as it was, relative to these.

    Args:
        original: a frozen copy of the member; it sees the same inputs and no target is needed.
    """

    def loss(output: Any, batch: Batch) -> Tensor:
        with torch.no_grad():
            wanted = _floats(original(*batch.args, **batch.kwargs))
        found = _floats(output)
        energies = torch.stack([wide(b).square().mean() for b in wanted])
        average([energies])  # a scale must be the same in all processes
        distances = [(wide(a) - wide(b)).square().mean() for a, b in zip(found, wanted, strict=True)]
        return (torch.stack(distances) / energies.clamp_min(1e-12)).mean()

    return loss


def loss_of(
    wanted: Wanted,
    original: Callable[[], nn.Module],
    adapted: nn.Module | None = None,
    source: SourceFeatures | None = None,
) -> Loss:
    """A task's loss as one function.

    Args:
        wanted: a name, names with their weights, or the function itself.
        original: makes the frozen copy of the member, where distillation asks for it.
        adapted: the member as it is trained, where a way of adaptation asks for it.
        source: what that compares it with.

    Raises:
        PlanError: for a name that is not known, or where there is no source to adapt to.

    Example:
        >>> loss_of({"mse": 2.0}, nn.Identity)(torch.ones(1, 1), Batch(target=torch.zeros(1, 1)))
        tensor(2.)
    """
    if callable(wanted):
        return wanted
    terms: dict[str, tuple[float, Loss]] = {}
    for name, weight in terms_of(wanted).items():
        if name == DISTILLATION:
            loss = distillation(original())
        elif name in LOSSES:
            loss = LOSSES[name]
        elif name in WAYS:
            loss = adapt_by(name, adapted if adapted is not None else original(), source)
        else:
            raise PlanError(_unknown(name))
        terms[name] = weight, loss
    if len(terms) == 1 and (only := next(iter(terms.values())))[0] == 1.0:
        return only[1]
    return Sum(terms)


def loss_problems(wanted: Any) -> list[str]:
    """What is wrong with a task's loss: no function, names that are not known, weights that are no finite numbers.

    Example:
        >>> loss_problems({"mse": 1.0, "mae": 0.5})
        ["There is no loss 'mae', did you mean 'mse'?"]
    """
    if callable(wanted):
        return []
    if not isinstance(wanted, str | Mapping) or not wanted:
        return [f"a loss is a name, names with their weights, or a function, found {wanted!r}"]
    terms = terms_of(wanted)
    wrong = [_unknown(name) for name in terms if name not in (*LOSSES, DISTILLATION, *WAYS)]
    weights = {name: weight for name, weight in terms.items() if not _is_finite(weight)}
    return wrong + [
        f"the weight of loss {n} must be a finite number, found {w!r}" for n, w in weights.items()
    ]


def _unknown(name: str) -> str:
    return f"There is no loss '{name}', {advice_on(name, [*LOSSES, DISTILLATION, *WAYS])}"


def _is_finite(weight: Any) -> bool:
    return isinstance(weight, int | float) and not isinstance(weight, bool) and math.isfinite(weight)


def adapts_by(wanted: Wanted) -> dict[str, float]:
    """The ways of adaptation among a loss's names, with their weights: these compare with a source."""
    return {} if callable(wanted) else {n: w for n, w in terms_of(wanted).items() if n in WAYS}


def needs_targets(wanted: Wanted) -> bool:
    """Whether a loss has a name that compares with targets."""
    return not callable(wanted) and any(name in TARGETED for name in terms_of(wanted))


def terms_of(wanted: str | Mapping[str, float]) -> dict[str, float]:
    """A loss's names with their weights."""
    return {wanted: 1.0} if isinstance(wanted, str) else dict(wanted)


def _target(batch: Batch) -> Any:
    if batch.target is None:
        raise ValueError(
            "this loss compares with targets, but the data give none: give them, or take a loss that needs none"
        )
    return batch.target


def _floats(output: Any) -> list[Tensor]:
    leaves = tree_leaves(dict(output) if isinstance(output, Mapping) else output)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
