"""Tables: rows that are looked up often, or that fine-tuning moved, have more bits than others.

Calibration data use few of the rows of a table, and other data use others. What rows that no calibration example used
count is therefore estimated from where fine-tuning of related members moved rows: those are the ones that the members'
own data used. Of a member alone nothing is known of them, and they all count the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from surgery.fitting.metric import DAMPING
from surgery.fitting.units import Unit, unit_bytes
from surgery.storage.codecs import Precision, Statistics, mixtures, row_costs

TABLE = "embedding"  # the kind of sites that are looked up row by row
UNSEEN = 0.2  # share of look-ups that go to rows which calibration data do not use: typical of some hundred sentences
NEVER = 1e-4  # of the mean of all rows: less is what damping and rounding leave of none at all
ELSEWHERE = 0.1  # share of these that go to rows which fine-tuning did not move


def row_weights(seen: Tensor | None, moved: Tensor) -> Tensor:
    """What an error of each row counts, of all rows: `[o]`.

    Args:
        seen: `[o]`, what it counts on calibration data, damped, of all; None where there are none: made-up inputs look
            up any row.
        moved: `[o]`, squared differences of the members from what they share; zeros where that is not known.
    """
    rows = len(moved)
    own = torch.zeros_like(moved) if seen is None else seen * (1 + DAMPING) - DAMPING / rows
    own = torch.where(own > NEVER / rows, own, 0.0)
    own = own / own.sum().clamp_min(1e-30)
    moved = torch.where(own > 0, 0.0, moved)
    moved = moved if float(moved.sum()) > 0 else (own == 0).to(own)
    moved = moved / moved.sum().clamp_min(1e-30)
    unseen = 1.0 if seen is None else UNSEEN
    return (1 - unseen) * own + unseen * ((1 - ELSEWHERE) * moved + ELSEWHERE / rows)


def by_rows(unit: Unit, weights: Tensor) -> Unit:
    """A unit of one matrix whose rows do not count the same, with options of bits by row.

    Args:
        unit: with the options of whole matrices.
        weights: `[o]`, what an error of each row counts, of all.
    """
    (tensor,), known = unit.tensors.values(), unit.statistics
    power = max(float(tensor.float().square().sum(dtype=torch.float64)), 1e-300)
    losses = [error / power for error in unit.errors]
    costs = row_costs(tensor, weights * len(weights))
    total = float(costs.sum(dtype=torch.float64))
    found = mixtures(costs, unit.options, losses)
    mixed: Sequence[Precision] = [precision for precision, _ in found]
    return replace(
        unit,
        options=(*unit.options, *mixed),
        nbytes=(*unit.nbytes, *(unit_bytes(unit.tensors, each) for each in mixed)),
        errors=(*(total * loss for loss in losses), *(cost for _, cost in found)),
        statistics=Statistics(known and known.second_moment, 1, weights),
    )
