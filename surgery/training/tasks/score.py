"""What one task reached."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, Field

from surgery.settings.quantities import Count

Loss = Annotated[float, Field(ge=-1e30, le=1e30, allow_inf_nan=False)]
"""What can be drawn; a run ends where a loss is no longer finite."""


@dataclass(frozen=True)
class Score:
    """What one task reached.

    Attributes:
        loss: mean over the examples; None where it is not defined: without targets that it compares with, or, of an
            artifact, without the source that a member was adapted to.
        metric: None where the task has none.
        examples: how many were seen.
        measure: the metric's name.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    loss: Loss | None
    metric: float | None
    examples: Count
    measure: str | None = None

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    def words(self) -> tuple[str, str]:
        """Loss and metric as they are shown."""
        loss = "-" if self.loss is None else f"{self.loss:.4g}"
        return loss, "-" if self.metric is None else f"{self.metric:.4g} {self.measure or ''}".strip()
