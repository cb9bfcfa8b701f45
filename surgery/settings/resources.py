"""Resources: what one run may take of the machine that it runs on; nothing of it is recorded in what is written."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, ValidationError

from surgery.disk.untrusted import shown
from surgery.errors import PlanError
from surgery.settings.problems import Strict, problems_of
from surgery.util.wording import sentence

UNITS = {
    "": 1,
    "B": 1,
    **{f"{prefix}B": 1000**power for power, prefix in enumerate("kMGT", 1)},
    **{f"{prefix}iB": 1024**power for power, prefix in enumerate("KMGT", 1)},
}
"""Bytes of a unit."""

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]i?b|b|)", re.ASCII | re.IGNORECASE)


def parse_bytes(value: Any) -> Any:
    """`"8GiB"` -> 8589934592; anything else is left for validation to judge.

    Example:
        >>> parse_bytes("8GiB"), parse_bytes("1.5 GB"), parse_bytes(512)
        (8589934592, 1500000000, 512)
    """
    if not isinstance(value, str):
        return value
    found = _SIZE.fullmatch(value.strip())
    if found is None:
        raise ValueError(f"memory is written as 8GiB, 500MB or bytes, not {shown(value)}")
    unit = {unit.lower(): each for unit, each in UNITS.items()}[found[2].lower()]
    return int(float(found[1]) * unit)


Bytes = Annotated[int, BeforeValidator(parse_bytes), Field(ge=1, le=1 << 53)]


class Resources(Strict):
    """What a run may take.

    Attributes:
        memory: bytes that it may hold besides pages of files, such as `8GiB`; what does not fit is kept in files beside
            the target, and what cannot be kept is refused.
    """

    memory: Bytes | None = None

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """Validate what was given in Python; None stands for what was not.

        Raises:
            PlanError: naming every value that is wrong.
        """
        try:
            return cls.model_validate({name: value for name, value in values.items() if value is not None})
        except ValidationError as error:
            quoted = {name: f"`{name}`" for name in cls.model_fields}
            raise PlanError(sentence("; ".join(problems_of(error, cls, called=quoted)))) from None
