"""Target: what a merge or a fit is to reach, and the shape of its dictionary, for Python and recipes alike."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, model_validator

from surgery.disk.untrusted import shown
from surgery.errors import SurgeryWarning
from surgery.settings.names import TARGETS
from surgery.settings.problems import Strict, validated
from surgery.settings.quantities import Context, Error, Positive, Share
from surgery.util.wording import percent

MAX_ERROR = 0.05
"""Of a fit that nothing else is asked of."""


def warn_of_percentage(max_error: float | None) -> None:
    """Warn of an error bound that allows any outputs, which is what a percentage looks like.

    Args:
        max_error: as it was given; None for none.
    """
    if max_error is not None and max_error >= 1:
        warnings.warn(
            f"`max_error` is a fraction: {max_error:g} lets outputs move by {percent(max_error)}, and zeros in their "
            f"place move by 100%. For {max_error:g}% give {max_error / 100:g}.",
            SurgeryWarning,
            stacklevel=3,
        )


def parse_block(value: Any) -> Any:
    """`"16x16"` -> `(16, 16)`; anything else is left for validation to judge."""
    if isinstance(value, str):
        sides = value.lower().split("x")
        if len(sides) != 2 or not all(side.strip().isdecimal() for side in sides):
            raise ValueError(f"a block is written MxN, for example 16x16, not {shown(value)}")
        return tuple(int(side) for side in sides)
    return value


Block = Annotated[tuple[Positive, Positive], BeforeValidator(parse_block)]


class Target(Strict):
    """What is asked of a fit; what is not given is chosen by it.

    At most one of the three targets is given; with none, `max_error` is 0.05, unless the settings of a method fix what
    it makes.

    Attributes:
        max_error: the smallest artifact whose members' outputs move by at most this much; 0 is lossless.
        budget: the most exact weights within this share of the members' bytes; records and small files come on top.
        hypermodules: a bank of so many.
        block: sides of the blocks that are shared, such as `16x16`.
        context: basis blocks of a hypermodule (c).
    """

    max_error: Error | None = None
    budget: Share | None = None
    hypermodules: Positive | None = None
    block: Block | None = None
    context: Context | None = None

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        if len(given := self.given()) > 1:
            raise ValueError(
                f"only one of {', '.join(TARGETS)} can be the target, found "
                f"{' and '.join(f'`{name}`' for name in given)}"
            )
        return self

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """Validate what was given in Python; None stands for what was not.

        Raises:
            PlanError: naming every value that is wrong.
        """
        return validated(cls, values, "The target is not valid: ")

    def given(self) -> list[str]:
        """The names of the targets that have a value."""
        return [name for name in TARGETS if getattr(self, name) is not None]
