"""Reach: what can be said of a budget before anything is fitted, from shapes and dtypes alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from surgery.errors import PlanError
from surgery.storage.codecs import always_native
from surgery.storage.stored import ALIAS_BYTES
from surgery.util.wording import more_than, percent, rounded_up

Kind = tuple[tuple[int, ...], torch.dtype]
"""Shape and dtype of a tensor."""

TINY = 16  # elements, below which nothing is rounded


def check_reach(budget: float, members: Mapping[str, Sequence[Kind]]) -> str:
    """Look whether a budget can be met at all.

    Args:
        budget: the most bytes, as a fraction of the members' together.
        members: shape and dtype of every tensor, a tied one once, by member.

    Returns:
        in words, why it may not be met; empty where nothing speaks against it.

    Raises:
        PlanError: where what is stored as it is takes more.

    Example:
        >>> check_reach(0.25, {"a": [((64, 64), torch.float32)]})
        ''
    """
    whole = sum(map(_bytes, [kind for kinds in members.values() for kind in kinds]))
    least = max((_least(kinds) for kinds in members.values()), default=0) / max(whole, 1)
    if least > budget:
        raise PlanError(
            f"A budget of {budget:g} cannot be met: numbers that are stored as they are, such as whole ones, take "
            f"{more_than(least, budget)} of the members' bytes; use `budget={rounded_up(least):g}` or more."
        )
    bits = sum(
        math.prod(shape) / 8
        for kinds in members.values()
        for shape, dtype in kinds
        if dtype.is_floating_point
    )
    one = min(1.0, least + bits / max(whole, 1))
    if budget >= one:
        return ""
    return (
        f"A budget of {budget:g} is below one bit for each number, which is {percent(one)} of these members: only what "
        "they share takes less, so the fit may refuse it."
    )


def _least(kinds: Sequence[Kind]) -> int:
    """Bytes that one member takes at least: other members can hold the same tensors."""
    kept = [kind for kind in kinds if always_native(*kind) or math.prod(kind[0]) < TINY]
    large = {kind for kind in kept if _bytes(kind) >= ALIAS_BYTES}  # equal ones are stored once
    return sum(map(_bytes, large)) + sum(_bytes(kind) for kind in kept if _bytes(kind) < ALIAS_BYTES)


def _bytes(kind: Kind) -> int:
    shape, dtype = kind
    return math.prod(shape) * dtype.itemsize
