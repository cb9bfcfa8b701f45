"""Tables: rows that are looked up often, or that fine-tuning moved, have more bits than others.

Calibration data use few of the rows of a table, and other data use others. How much other rows count is estimated by
what rows count that calibration data use exactly once (Good 1953, The population frequencies of species); which of them
count, from where fine-tuning of related members moved rows: those are the ones that the members' own data used. Of a
member alone nothing is known of them, and they all count the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from surgery.fitting.metric import DAMPING
from surgery.fitting.moments import names_by_storage, watched
from surgery.fitting.units import Unit, bytes_of_each
from surgery.storage.codecs import Precision, Statistics, mixtures, row_costs

TABLE = "embedding"  # the kind of sites that are looked up row by row
UNSEEN = 0.2  # share of look-ups of rows that calibration data do not use, where look-ups were not counted
NEVER = 1e-4  # of the mean of all rows: less is what damping and rounding leave of none at all
ELSEWHERE = 0.1  # share of these that go to rows which fine-tuning did not move


def row_weights(seen: Tensor | None, moved: Tensor, uses: Tensor | None = None) -> Tensor:
    """What an error of each row counts, of all rows: `[o]`.

    Args:
        seen: `[o]`, what it counts on calibration data, damped, of all; None where there are none: made-up inputs look
            up any row.
        moved: `[o]`, squared differences of the members from what they share; zeros where that is not known.
        uses: `[o]`, how often calibration data look up each row; None where that is not known.
    """
    rows = len(moved)
    own = torch.zeros_like(moved) if seen is None else seen * (1 + DAMPING) - DAMPING / rows
    own = torch.where(own > NEVER / rows, own, 0.0)
    own = own / own.sum().clamp_min(1e-30)
    moved = torch.where(own > 0, 0.0, moved)
    moved = moved if float(moved.sum()) > 0 else (own == 0).to(own)
    moved = moved / moved.sum().clamp_min(1e-30)
    unseen = 1.0 if seen is None else UNSEEN if uses is None else unseen_share(own, uses)
    return (1 - unseen) * own + unseen * ((1 - ELSEWHERE) * moved + ELSEWHERE / rows)


def unseen_share(own: Tensor, uses: Tensor) -> float:
    """The share that rows which no data used so far will have in what all rows count on as much further data.

    Args:
        own: `[o]`, what each row counts on the data so far, of all.
        uses: `[o]`, how often these look it up.

    Example:
        >>> unseen_share(torch.tensor([0.5, 0.25, 0.25, 0.0]), torch.tensor([7, 1, 1, 0]))
        0.55
    """
    # Of no row that was used once not nothing follows: the next look-up may well be a new row's.
    count = int(uses[own > 0].sum())
    return (float(own[uses == 1].sum()) * count + 1) / (count + 1)


def look_ups(
    module: nn.Module,
    tables: Iterable[str],
    batches: Iterable[tuple[Sequence[Any], Mapping[str, Any]]],
) -> dict[str, Tensor]:
    """How often each row of tables is looked up, `[o]` by name; a table that is read in another way is absent.

    Args:
        module: in eval mode, with its ordinary weights; left as it was.
        tables: names of weights of this module.
        batches: positional and named arguments of a call.
    """
    watch = _LookUps(names_by_storage(module, tables))
    for _ in watched(module, watch, batches):
        pass
    return watch.uses


class _LookUps(TorchFunctionMode):
    """While it is the active mode, counts what is looked up.

    Args:
        names: of tables, by the address of their storage.
    """

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self.names = names
        self.uses: dict[str, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in ("embedding", "embedding_bag"):
            given = {**dict(zip(("input", "weight"), args, strict=False)), **kwargs}
            ids, weight = given.get("input"), given.get("weight")
            if isinstance(ids, Tensor) and isinstance(weight, Tensor):
                self.count(ids, weight)
        return func(*args, **kwargs)

    def count(self, ids: Tensor, weight: Tensor) -> None:
        """Add look-ups of a table, where it is one of those that are asked for."""
        name = self.names.get(weight.untyped_storage().data_ptr())
        if name is not None:
            found = torch.bincount(ids.reshape(-1), minlength=len(weight))
            self.uses[name] = self.uses[name] + found if name in self.uses else found


def by_rows(unit: Unit, weights: Tensor) -> Unit:
    """A unit of one matrix, or of equal ones, whose rows matter more or less, with further options in which each row
    has bits of its own.

    Args:
        unit: with the options of whole matrices.
        weights: `[o]`, how much an error in each row matters, as a share of all rows.
    """
    tensor, known = next(iter(unit.tensors.values())), unit.statistics  # equal ones are stored once
    power = max(float(tensor.float().square().sum(dtype=torch.float64)), 1e-300)
    losses = [error / power for error in unit.errors]
    costs = row_costs(tensor, weights * len(weights))
    total = float(costs.sum(dtype=torch.float64))
    found = mixtures(costs, unit.options, losses)
    mixed: Sequence[Precision] = [precision for precision, _ in found]
    return replace(
        unit,
        options=(*unit.options, *mixed),
        nbytes=(*unit.nbytes, *bytes_of_each(unit.tensors, mixed)),
        errors=(*(total * loss for loss in losses), *(cost for _, cost in found)),
        statistics=Statistics(known and known.second_moment, 1, weights),
    )
