"""Row: what is known of one model after it was tried; a line of the CSV."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

LIBRARIES = ("timm", "torchvision", "transformers")


@dataclass(frozen=True)
class Row:
    """One model.

    Attributes:
        library: it comes from.
        model: its name there.
        implementation: what it stands for: the class of the model.
        parameters: numbers in it.
        tier: of tracing that served.
        inputs: that were made up.
        seconds: of tracing, on one thread.
        sites: share of the parameters that are sites.
        private: share that are private, with a reason each.
        skipped: share that is neither.
        why_skipped: reasons, the largest share first.
        outputs: whether the joined model gave the original outputs, bit for bit; empty where not reached.
        state: whether the collapsed state dict was the original one, bit for bit; empty where not reached.
        status: `exact`, `failed` with its cause, or `absent`: there is no such model to be tried.
        cause: of a failure or an absence, with the stage at which it happened.
    """

    library: str
    model: str
    implementation: str = ""
    parameters: int = 0
    tier: str = ""
    inputs: str = ""
    seconds: float = 0.0
    sites: float = 0.0
    private: float = 0.0
    skipped: float = 0.0
    why_skipped: str = ""
    outputs: str = ""
    state: str = ""
    status: str = "failed"
    cause: str = ""

    @property
    def traced(self) -> bool:
        """Whether a graph was recorded."""
        return bool(self.tier) and "table" not in self.tier


COLUMNS = [field.name for field in fields(Row)]


def append(path: Path, row: Row) -> None:
    """Add a line; the first one brings the header."""
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        writer.writerow(asdict(row))


def read(path: Path) -> list[Row]:
    """The rows of a CSV; a last line that was cut off is left out."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [row for row in map(_row, csv.DictReader(file)) if row is not None]


def write(path: Path, rows: Iterable[Row]) -> None:
    """Write all rows anew."""
    beside = path.with_suffix(".new")
    beside.unlink(missing_ok=True)
    for row in rows:
        append(beside, row)
    beside.replace(path)


def _row(line: dict[str, str | None]) -> Row | None:
    if set(line) != set(COLUMNS) or None in line.values():
        return None
    numbers = {"parameters": int, "seconds": float, "sites": float, "private": float, "skipped": float}
    try:
        values = {key: numbers.get(key, str)(str(value)) for key, value in line.items()}
    except ValueError:
        return None
    return Row(**values)  # type: ignore[arg-type]
