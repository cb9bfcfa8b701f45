"""Quantities: the numbers that documents may hold, each within what a real model could need.

A bound is no opinion of how large a model should be: it is where a number stops to be one, an overflow in a library,
or a loop without end.
"""

from __future__ import annotations

import re
from numbers import Integral
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from surgery.errors import PlanError


def parse_fraction(value: Any) -> Any:
    """A fraction as it is, for validation to judge; a percentage is answered with the fraction that it is.

    Raises:
        ValueError: naming it.

    Example:
        >>> parse_fraction(0.1)
        0.1
    """
    if value != value:
        raise ValueError("must be a number, found nan")
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", value) if isinstance(value, str) else None
    if found:
        raise ValueError(f"a fraction is meant: write {float(found[1]) / 100:g} for {found[1]}%")
    return value


Count = Annotated[int, Field(ge=0, le=1 << 53)]
"""Elements, bytes, locations, axes: what JSON holds exactly in every language."""

Integer = Annotated[int, Field(ge=-(1 << 53), le=1 << 53)]
"""The same, where it may be negative: differences, and generations before the first."""

Positive = Annotated[int, Field(ge=1, le=(1 << 31) - 1)]
"""Steps, batches, generations, sides of a block."""

Context = Annotated[int, Field(ge=1, le=1 << 16)]
"""Basis blocks of a hypermodule, templates of a stack; each is a tensor of its own."""

MOST_SEED = (1 << 32) - 1

Seed = Annotated[int, Field(ge=0, le=MOST_SEED)]
"""What PyTorch, NumPy and Python all take."""

Finite = Annotated[float, Field(allow_inf_nan=False)]

NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]

Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]

Share = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False), BeforeValidator(parse_fraction)]

Error = Annotated[float, Field(ge=0, allow_inf_nan=False), BeforeValidator(parse_fraction)]


def check_seed(seed: object) -> None:
    """Refuse what is no seed.

    Raises:
        PlanError: naming it.
    """
    if not isinstance(seed, Integral) or isinstance(seed, bool) or not 0 <= int(seed) <= MOST_SEED:
        raise PlanError(f"`seed` must be a whole number from 0 to {MOST_SEED}, found {seed!r:.60}.")
