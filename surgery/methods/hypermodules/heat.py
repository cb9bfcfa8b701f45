"""Heat: how much opening a contest disturbs what members do, and how contests are made as hot as they may be.

An alternative that enters with probability alpha at a share p of the locations replaces p * alpha of all weights by
what was made for something else, and the loss rises at once. A generation has to be long enough to get over that
before it can decide anything. So p and alpha follow from its length, alpha falls towards the last generations, and
after each opening it is corrected by the rise that was measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from surgery.disk.untrusted import shown

WINDOW = 20
"""Steps before an opening whose mean loss is the measure."""

FIRST = 5
"""Steps after an opening whose mean loss says how far it rose."""

BACK = 10
"""Steps whose mean loss says that a generation is back where it was."""


@dataclass(frozen=True)
class Opening:
    """What opening a contest did.

    Attributes:
        rise: of the loss just after it, relative to just before, the mean over tasks.
        back: steps until the loss was back; None where it was not within the generation.
    """

    rise: float
    back: int | None

    @classmethod
    def of(cls, before: Sequence[float], steps: Sequence[Sequence[float]]) -> Opening | None:
        """From the tasks' losses before an opening, and in every step since; None where there are none.

        Example:
            >>> Opening.of([1.0], [[1.5]] * 5 + [[1.0]] * 15).back
            15
        """
        if not before or not steps:
            return None
        ratios = [
            sum(x / max(b, 1e-12) for x, b in zip(step, before, strict=True)) / len(before) for step in steps
        ]
        first = ratios[:FIRST]
        back = next(
            (n for n in range(BACK, len(ratios) + 1) if sum(ratios[n - BACK : n]) / BACK <= 1.0), None
        )
        return cls(sum(first) / len(first) - 1, back)

    def document(self) -> dict[str, Any]:
        """The opening as JSON values."""
        return {"rise": self.rise, "back": self.back}


class Thermostat:
    """Alpha of one generation after another.

    Args:
        heat: how far the loss may rise at an opening, relative to before; None where alpha is given.

    Attributes:
        factor: by which alpha is multiplied by now.
        before: by task the mean loss of the steps before this generation.
        alpha: of the last contest, None before the first.
        opening: what the last opening did.
    """

    def __init__(self, heat: float | None):
        self.heat, self.factor = heat, 1.0
        self.before: list[float] = []
        self.alpha: float | None = None
        self.opening: Opening | None = None

    def begin(self, alpha: float) -> float:
        """The alpha with which a contest opens, made of the one in the settings."""
        self.alpha = alpha if self.heat is None else min(alpha * self.factor, 0.5)
        return self.alpha

    def end(self, steps: Sequence[Sequence[float]], opened: bool) -> None:
        """Take note of a generation that has ended, and set the next alpha by the rise that its opening caused.

        Args:
            steps: the tasks' losses in every step of it.
            opened: whether a contest was open.
        """
        self.opening = Opening.of(self.before, steps) if opened else None
        if self.opening is not None and self.heat is not None:
            change = self.heat / max(self.opening.rise, 0.1 * self.heat)
            self.factor = min(max(self.factor * min(max(change, 0.5), 1.5), 0.1), 2.0)
        last = steps[-WINDOW:]
        self.before = [sum(column) / len(last) for column in zip(*last, strict=True)]

    def document(self) -> dict[str, Any]:
        """The JSON values that a run's state keeps."""
        return {"factor": self.factor, "before": self.before, "alpha": self.alpha}

    def take(self, document: Mapping[str, Any]) -> None:
        """Go on from a document in which nothing is wrong; one of an older version is empty."""
        self.factor = float(document.get("factor", 1.0))
        self.before = [float(value) for value in document.get("before", ())]
        self.alpha = document.get("alpha")


def wrong_heat(document: object, tasks: int) -> str:
    """What cannot be true of a thermostat's document, in words; empty where nothing is.

    Example:
        >>> wrong_heat({"factor": 1.0, "before": [0.5], "alpha": None, "steps": []}, 1)
        ''
    """
    if isinstance(document, Mapping):
        factor, before, alpha = (document.get(name) for name in ("factor", "before", "alpha"))
        steps = document.get("steps", [])
        rows = [before, *steps] if isinstance(before, list) and isinstance(steps, list) else [None]
        whole = all(
            isinstance(row, list) and len(row) in (0, tasks) and all(map(_number, row)) for row in rows
        )
        if (
            whole
            and isinstance(factor, float)
            and 0 < factor < 1e9
            and (alpha is None or (_number(alpha) and 0 < alpha < 1))
        ):
            return ""
    return f"the heat of contests must be a factor, an alpha and losses of {tasks} tasks, found {shown(document)}"


def _number(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, int | float) and abs(value) < 1e300
