"""Units: tensors that can be stored in more than one way, what each way costs and how wrong it is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from surgery.anatomy.plan import BankPlan, Placement
from surgery.disk.journal import made_once
from surgery.fitting.tabulated import Table
from surgery.storage.codecs import (
    NATIVE,
    Encoded,
    Encoding,
    Precision,
    Statistics,
    expected_bytes,
    is_tame,
    ladder,
    rounded,
)
from surgery.storage.codecs.feedback import expected_gain
from surgery.storage.codecs.integers import fits_outputs
from surgery.storage.codecs.two_sided import expected_gain as gain_of_outputs

SAMPLE = 1 << 18  # values on which the error of a precision is measured
ROW_SAMPLE = 1 << 16  # of a tensor that is one row, in pieces, or of one of LARGE
# The same where most tensors are stored with what is there, and these figures are compared with it.
ROUGH = 1 << 12
TWO_BITS = (10.0, 26.0)  # times an error that two bits fewer make: about 16
LARGE = 1 << 22  # elements, whose precisions would take too long otherwise
PIECE = 64  # values of such a row that are sampled together, or as many as are stored together
PART_BYTES = 160  # a stored part's entry in a file's header and in the manifest, rounded up
GATHERED_BYTES = 40  # the same where parts are so many and so small that names and records are deflated
BANK_BYTES = 400.0  # a bank's entry in the manifest

Key = tuple[str, str]
"""A tensor: its member and its name there."""


@dataclass(frozen=True)
class Unit:
    """Tensors that get the same option; equal tensors are one object and are stored once.

    Attributes:
        tensors: what is to be stored, by `PlainKey`, or by the name of a part where there is no bank yet; nothing where
            the unit only carries an error.
        weight: by member, relative squared output error per squared error.
        options: precisions, or None for leaving the tensor out.
        nbytes: bytes of each option.
        errors: squared error of each option.
        statistics: of the tensors' inputs, for codecs that make use of them.
    """

    tensors: Mapping[Any, Tensor]
    weight: Mapping[str, float]
    options: tuple[Precision | None, ...]
    nbytes: tuple[float, ...]
    errors: tuple[float, ...]
    statistics: Statistics | None = None


class Shared(Protocol):
    """A bank that some sites are generated from, as an arrangement offers it."""

    @property
    def count(self) -> int:
        """How many units it has: each is one of its parts."""
        ...

    def assemble(
        self, number: int, parts: Sequence[Encoding | None]
    ) -> tuple[BankPlan, list[Placement], dict[str, Encoded]]:
        """The bank as it is stored: its plan, what it generates, and its parts by name.

        Args:
            number: of the bank in the joint model, by which it may name itself.
            parts: what was chosen for each unit; None for one that is left out.
        """
        ...


@dataclass(frozen=True)
class Arrangement:
    """One way of storing a group of tensors.

    Attributes:
        units: of all banks, part by part; without banks, of plain tensors. Units after the banks' only carry an error.
        fixed: bytes besides the units.
        banks: what is shared.
    """

    units: tuple[Unit, ...]
    fixed: float = 0.0
    banks: tuple[Shared, ...] = ()


@dataclass(frozen=True)
class Group:
    """Tensors that are decided on together.

    Attributes:
        arrangements: to choose from; the first shares nothing.
        shared: whether the first cannot be taken, and is there only to measure by it what sharing saves.
        claimed: whether a method decides on these tensors, so that storing them apart is tried by itself as well.
    """

    arrangements: tuple[Arrangement, ...] = field(default_factory=tuple)
    shared: bool = False
    claimed: bool = False


def measure(
    tensors: Mapping[Any, Tensor],
    weight: Mapping[str, float],
    *,
    droppable: bool = False,
    key: str = "",
    sample: int = SAMPLE,
) -> Unit:
    """The unit of equal tensors: every precision of their ladder tried, cost and squared error taken.

    Args:
        tensors: equal ones, by what they are stored as.
        weight: by member, relative squared output error per squared error.
        droppable: whether leaving them out is an option.
        key: under which a run that can be gone on with keeps what it measured; none where it does not.
        sample: values of a matrix on which errors are measured, at most.
    """
    tensor = next(iter(tensors.values()))
    tried = precisions(tensor)
    options: list[Precision | None] = list(tried)
    nbytes = bytes_of_each(tensors, tried)

    def measured() -> list[float]:
        return _errors(tensor, tried, sample)

    errors = list(made_once(key, lambda: (measured(), {}))[0]) if key else measured()
    if droppable:
        options, nbytes = [*options, None], [*nbytes, 0.0]
        errors.append(float(tensor.float().square().sum(dtype=torch.float64)))
    return Unit(tensors, weight, tuple(options), tuple(nbytes), tuple(errors))


def _errors(tensor: Tensor, tried: Sequence[Precision], sample: int) -> list[float]:
    """The squared error of each precision that `precisions` gives, from an accelerator all at once.

    Where few values are looked at, that of a width between two others is their geometric mean, if these are as far
    apart as steps of two bits make them; those of values that lie on a grid are not.
    """

    def measured(numbers: Sequence[int]) -> dict[int, float]:
        found = [_squared_error(tensor, tried[each], sample) for each in numbers]
        errors = torch.stack([error for error, _ in found]).tolist()
        pairs = zip(numbers, errors, found, strict=True)
        return {each: error * tensor.numel() / sampled for each, error, (_, sampled) in pairs}

    every = range(len(tried))
    if sample >= SAMPLE or len(tried) < 3:
        return [*measured(every).values()]
    errors = measured([each for each in every if each % 2 == len(tried) % 2 or each in (0, len(tried) - 1)])
    rest = [each for each in every if each not in errors]
    between = [
        each
        for each in rest
        if errors[each - 1] > 0 and TWO_BITS[0] < errors[each + 1] / errors[each - 1] < TWO_BITS[1]
    ]
    errors |= {each: math.sqrt(errors[each - 1] * errors[each + 1]) for each in between}
    if others := [each for each in rest if each not in between]:
        errors |= measured(others)
    return [errors[each] for each in every]


def fed_back(unit: Unit, known: Statistics) -> Unit:
    """The same unit, rounded with error feedback: what that gains is foretold.

    Args:
        unit: of one matrix, or of equal ones.
        known: of its inputs and outputs.
    """
    gain = 1.0 if known.second_moment is None else expected_gain(known.second_moment)
    if known.outputs is not None and fits_outputs(next(iter(unit.tensors.values())), known):
        gain *= gain_of_outputs(known.outputs)
    return replace(unit, errors=tuple(gain * error for error in unit.errors), statistics=known)


def unit_bytes(tensors: Mapping[Any, Tensor], precision: Precision) -> float:
    """Bytes of all tensors of a unit, equal ones counted once, with what files say about them."""
    return bytes_of_each(tensors, [precision])[0]


def bytes_of_each(tensors: Mapping[Any, Tensor], tried: Sequence[Precision]) -> list[float]:
    """What `unit_bytes` says of each of some precisions; values are looked at once."""
    totals = [0.0] * len(tried)
    for tensor in {id(tensor): tensor for tensor in tensors.values()}.values():
        shape, tame = tuple(tensor.shape), all(each.is_native for each in tried) or is_tame(tensor)
        for number, precision in enumerate(tried):
            own = precision if tame else NATIVE
            totals[number] += expected_bytes(shape, tensor.dtype, own) + PART_BYTES
    return totals


def precisions(tensor: Tensor) -> tuple[Precision, ...]:
    """Precisions worth trying for a tensor, the finest first."""
    return ladder([tensor]) if tensor.numel() >= 16 and is_tame(tensor) else (NATIVE,)


def _squared_error(tensor: Tensor, precision: Precision, most: int) -> tuple[Tensor, int]:
    """`|decode(encode(tensor)) - tensor|^2`, for a large tensor estimated from rows or groups spread over it.

    Args:
        tensor: any.
        precision: that is tried.
        most: values of a matrix that are looked at.

    Returns:
        that of the sample, float64, and the sample's elements.
    """
    if precision.is_native:
        return torch.zeros((), dtype=torch.float64, device=tensor.device), tensor.numel()
    count, sample = tensor.numel(), tensor
    limit = min(most, SAMPLE if count < LARGE else ROW_SAMPLE)
    span = precision.codec.span(precision.settings)
    if tensor.ndim > 1 and len(tensor) == 1 and count > ROW_SAMPLE and 0 < span <= ROW_SAMPLE:
        piece = span * -(-PIECE // span)  # the groups of one row are as good as rows
        tensor, limit = tensor.reshape(-1)[: count // piece * piece].view(-1, piece), ROW_SAMPLE
    if tensor.ndim > 1 and tensor.numel() > limit:
        rows = max(1, limit // (tensor.numel() // len(tensor)))
        sample = tensor[torch.linspace(0, len(tensor) - 1, rows, device=tensor.device).long()]
    error = (rounded(sample, precision).float() - sample.float()).square().sum(dtype=torch.float64)
    return error, sample.numel()


def tabulate(groups: Sequence[Group], members: Sequence[str]) -> tuple[Table, list[Unit], list[Arrangement]]:
    """All units as arrays for the allocation; units and arrangements come in the order of their numbers.

    What cannot be taken is in the table too; `barred` tells which arrangements these are.
    """
    arrangements = [a for group in groups for a in group.arrangements]
    units = [unit for a in arrangements for unit in a.units]
    width = max((len(unit.options) for unit in units), default=1)
    size, error = np.full((len(units), width), np.inf), np.zeros((len(units), width))
    weight = np.zeros((len(units), len(members)))
    for u, unit in enumerate(units):
        size[u, : len(unit.nbytes)], error[u, : len(unit.errors)] = unit.nbytes, unit.errors
        weight[u] = [unit.weight.get(name, 0.0) for name in members]
    table = Table(
        size,
        error,
        weight,
        arrangement=np.repeat(np.arange(len(arrangements)), [len(a.units) for a in arrangements]),
        group=np.repeat(np.arange(len(groups)), [len(group.arrangements) for group in groups]),
        fixed=np.array([a.fixed for a in arrangements]),
    )
    return table, units, arrangements


def barred(groups: Sequence[Group]) -> np.ndarray:
    """Which arrangements are there only to be compared with: `[A]`."""
    return np.array(
        [group.shared and not i for group in groups for i in range(len(group.arrangements))], bool
    )


def doubtful(groups: Sequence[Group]) -> np.ndarray:
    """Which arrangements share what methods decide on: `[A]`; what is predicted of them is compared with none of it."""
    return np.array([group.claimed and bool(a.banks) for group in groups for a in group.arrangements], bool)
