"""Target: what a merge or a fit is to reach, and the shape of its dictionary, for Python, recipes and flags alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, ValidationError, model_validator

from surgery.disk.untrusted import shown
from surgery.errors import PlanError
from surgery.settings.names import Mixing
from surgery.settings.problems import Strict, problems_of
from surgery.settings.quantities import Context, NotNegative, Positive, Share
from surgery.util.wording import sentence

MAX_ERROR = 0.05
"""Of a fit that nothing else is asked of."""

TARGETS = ("max_error", "budget", "hypermodules", "templates")
"""What can be asked of a fit, each with a value."""


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

    At most one of the four targets is given, or `templates` with `max_error` or `budget`; with none, `max_error` is
    0.05, unless the settings of a method fix what it makes.

    Attributes:
        max_error: the smallest artifact whose members' outputs move by at most this much; 0 is lossless.
        budget: the most exact artifact of this share of the members' bytes.
        hypermodules: a bank of so many.
        templates: so many for each stack, with method templates: at the members' precision, or in the precisions that
            `max_error` or `budget` asks for.
        block: sides of the blocks that are shared, such as `16x16`.
        context: basis blocks of a hypermodule (c).
        mixture: of templates: `linear`, positive ones that sum to 1 (`softmax`), or one template a layer (`one-hot`).
    """

    max_error: NotNegative | None = None
    budget: Share | None = None
    hypermodules: Positive | None = None
    templates: Context | None = None
    block: Block | None = None
    context: Context | None = None
    mixture: Mixing = "linear"

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        given = self.given()
        # With templates given, an error or a budget decides their precisions.
        if len(given) > (1 if self.templates is None or self.hypermodules is not None else 2):
            raise ValueError(
                f"only one of {', '.join(TARGETS)} can be the target, or templates with max_error or budget, "
                f"found {' and '.join(f'`{name}`' for name in given)}"
            )
        return self

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """Validate what was given in Python; None stands for what was not.

        Raises:
            PlanError: naming every value that is wrong.
        """
        try:
            return cls.model_validate({name: value for name, value in values.items() if value is not None})
        except ValidationError as error:
            raise PlanError(
                sentence(f"The target is not valid: {'; '.join(problems_of(error, cls))}")
            ) from None

    def given(self) -> list[str]:
        """The names of the targets that have a value."""
        return [name for name in TARGETS if getattr(self, name) is not None]
