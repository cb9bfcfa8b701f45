"""Resources: what one run may take of the machine that it runs on; nothing of it is recorded in what is written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, ByteSize, Field, TypeAdapter, ValidationError

from surgery.disk.untrusted import shown
from surgery.settings.problems import Strict, validated


def parse_bytes(value: Any) -> Any:
    """`"8GiB"` -> 8589934592; anything else is left for validation to judge.

    Example:
        >>> parse_bytes("8GiB"), parse_bytes("1.5 GB"), parse_bytes(512)
        (8589934592, 1500000000, 512)
    """
    if not isinstance(value, str):
        return value
    try:
        return int(TypeAdapter(ByteSize).validate_python(value))
    except ValidationError:
        raise ValueError(f"a size is written as 8GB, 500MB, 8GiB or bytes, not {shown(value)}") from None


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
        return validated(cls, values)
