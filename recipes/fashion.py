"""Fashion-MNIST: 70,000 pictures of clothes in ten classes, 28x28, from Debian's dataset-fashion-mnist."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from surgery.errors import LoadError
from surgery.training.tasks.streams import Batches

from .packages import find_files
from .parts import Prepared, first, of_classes
from .views import see

MEAN, DEVIATION = 0.286, 0.353  # of the training pictures, in [0, 1]
HELD = 5000  # of the training pictures, for validation


def fashion_mnist(
    batch: int = 128,
    seed: int = 0,
    folder: str | None = None,
    train: int | None = None,
    validation: int | None = None,
    test: int | None = None,
    side: int = 28,
    channels: int = 1,
    view: str = "plain",
    classes: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Batches of pictures `[B, channels, side, side]` and classes `[B]`.

    Args:
        batch: pictures in a batch.
        seed: of the order.
        folder: with the four `.gz` files; the user's cache by default.
        train: how many training pictures are used; by default all but those held for validation.
        validation: how many of the 5,000 held training pictures are used.
        test: how many of the 10,000 test pictures are used.
        side: to which pictures are enlarged.
        channels: 1, or 3 for nets that want colours.
        view: how they are seen: `plain`, `rotated`, `inverted`, `shear`, `scale`, `shot`, or several joined by `+`.
        classes: that are told apart, counted from 0 in their order; all ten by default.

    Raises:
        LoadError: where the files are missing or are not what they should be.
        PlanError: for a view that is not known.
    """
    files = find_files("fashion-mnist", folder)
    small, kinds, test_small, test_kinds = (_read(path) for path in files)
    pictures, kinds = of_classes(small, kinds, classes)
    test_pictures, test_kinds = of_classes(test_small, test_kinds, classes)
    see(torch.zeros(1, 1, 28, 28), view)
    held = min(HELD, len(pictures) // 10)
    rows = torch.arange(len(pictures))
    chosen = {
        "train": (pictures, kinds, first(rows[:-held], train, "train")),
        "validation": (pictures, kinds, first(rows[-held:], validation, "validation")),
        "test": (test_pictures, test_kinds, first(torch.arange(len(test_pictures)), test, "test")),
    }

    def prepare(small: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        made = (see(small.unsqueeze(1).float() / 255, view) - MEAN) / DEVIATION
        if side != 28:
            made = F.interpolate(made, (side, side), mode="bilinear", align_corners=False)
        return made.expand(-1, channels, -1, -1).contiguous(), target.long()

    return {
        name: Prepared(Batches(x[use], y[use], batch, name == "train", seed), prepare)
        for name, (x, y, use) in chosen.items()
    }


def _read(path: Path) -> Tensor:
    """A file in the idx format: the number of axes in its fourth byte, their lengths, then the bytes."""
    try:
        content = gzip.decompress(path.read_bytes())
        axes = content[3]
        shape = [int.from_bytes(content[4 + 4 * n : 8 + 4 * n], "big") for n in range(axes)]
        return torch.frombuffer(bytearray(content[4 + 4 * axes :]), dtype=torch.uint8).view(shape)
    except (OSError, EOFError, IndexError, RuntimeError, ValueError) as error:
        raise LoadError(f"{path} must be a gzipped idx file, but reading it says: {error}") from error
