"""Pieces of batches: derivatives are drawn for few examples at a time.

A draw of random signs for a whole batch has the moments of its examples and what the signs of different examples make
of one another, which is 0 only in the mean over many draws. Backward passes of pieces take about the same time and have
less of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from surgery.fitting.trial import Trial
from surgery.inputs.probes import outputs_of
from surgery.members.member import Inputs

EXAMPLES = 8  # of a piece, as many as batches of calibration files have
SAME = 0.05  # relative difference of outputs from those of whole batches: more than a narrow dtype's rounding


def in_pieces(trial: Trial, probes: Sequence[Inputs]) -> Sequence[Inputs]:
    """Batches of at most `EXAMPLES`, where outputs of an example do not depend on the others.

    Args:
        trial: with its original weights.
        probes: what is learned from, in a dtype that it runs in.

    Returns:
        pieces of all batches; the batches as they are where some cannot be divided.
    """
    found: list[Inputs] = []
    for whole in probes:
        size = batch_of(whole)
        if size is None:
            return probes
        if size <= EXAMPLES:
            found.append(whole)
            continue
        pieces = list(_cut(whole, size))
        if not _same(trial, pieces, whole):
            return probes
        found += pieces
    return found


def batch_of(inputs: Inputs) -> int | None:
    """The first axis that all tensors have; None where they differ.

    Example:
        >>> batch_of(Inputs((torch.ones(3, 4),), {"mask": torch.ones(3)}))
        3
    """
    sizes = {
        tuple(each.shape[:1])
        for each in tree_leaves((tuple(inputs.args), dict(inputs.kwargs)))
        if isinstance(each, Tensor)
    }
    if len(sizes) != 1:
        return None
    (shape,) = sizes
    return shape[0] if shape else None


def _cut(inputs: Inputs, size: int) -> Iterator[Inputs]:
    count = -(-size // EXAMPLES)
    for number in range(count):
        rows = slice(number * size // count, (number + 1) * size // count)

        def some(value: object, rows: slice = rows) -> object:
            return value[rows] if isinstance(value, Tensor) else value

        yield replace(
            inputs, args=tree_map(some, tuple(inputs.args)), kwargs=tree_map(some, dict(inputs.kwargs))
        )


def _same(trial: Trial, pieces: Sequence[Inputs], whole: Inputs) -> bool:
    """Whether outputs of pieces, one behind the other, are those of the whole."""
    start = 0
    try:
        reference = _real(outputs_of(trial.module, whole))
        for piece in pieces:
            stop = start + (batch_of(piece) or 0)
            for own, every in zip(_real(outputs_of(trial.module, piece)), reference, strict=True):
                wanted = every[start:stop]
                if own.shape != wanted.shape or float((own - wanted).norm()) > SAME * float(wanted.norm()):
                    return False
            start = stop
    except (RuntimeError, TypeError, ValueError) as error:  # a model that takes batches of one size alone
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return False
    return all(len(every) == start for every in reference)


def _real(outputs: Sequence[Tensor]) -> list[Tensor]:
    return [(torch.view_as_real(each) if each.is_complex() else each).double() for each in outputs]
