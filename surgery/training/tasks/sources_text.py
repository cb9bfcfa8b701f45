"""Text files as task data: csv, tsv or jsonl with a column of texts, tokenised by the member's own tokenizer."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from surgery.disk.untrusted import TEXT_BYTES, UnreadableError, parse_json, read_regular
from surgery.errors import LoadError
from surgery.inputs.reading import read_tokenizer
from surgery.members.member import Member
from surgery.permission import Permission
from surgery.training.tasks.parts import Parts, check_there, split_rows, take_option
from surgery.training.tasks.streams import Batches
from surgery.util.text import one_line

if TYPE_CHECKING:
    from surgery.settings.recipe import TaskSpec

TEXT_ENDINGS = (".csv", ".tsv", ".jsonl")
LENGTH = 128
_TOKENIZER = ("tokenizer", "vocab", "spiece", "sentencepiece")


class TextBatches:
    """Texts in batches of token ids, each batch as long as its longest text.

    Args:
        tokenizer: of transformers.
        texts: one or more.
        target: `[N]`, or None, where the tokens themselves are the target of language modelling.
        batch: texts in a batch.
        shuffle: whether their order changes with the epoch.
        seed: of the order.
        length: tokens after which a text is cut off.
    """

    def __init__(
        self,
        tokenizer: Any,
        texts: Sequence[str],
        target: Tensor | None,
        batch: int,
        shuffle: bool = True,
        seed: int = 0,
        length: int = LENGTH,
    ):
        made = tokenizer(list(texts), return_tensors="pt", padding=True, truncation=True, max_length=length)
        inputs = {name: made[name] for name in ("input_ids", "attention_mask")}
        if target is None:
            target = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
            self.cut_target = True
        else:
            self.cut_target = False
        self.batches = Batches(inputs, target, batch, shuffle, seed)

    def __len__(self) -> int:
        return len(self.batches)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch."""
        self.batches.set_epoch(epoch)

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        for inputs, target in self.batches:
            used = inputs["attention_mask"].any(0).nonzero()
            begin, end = int(used[0]), int(used[-1]) + 1  # some tokenizers pad on the left
            cut = {name: value[:, begin:end] for name, value in inputs.items()}
            yield cut, target[:, begin:end] if self.cut_target else target


def from_text(spec: TaskSpec, member: Member, seed: int, permission: Permission) -> Parts:
    """Texts of a csv, tsv or jsonl file.

    Options: `text` and `target`, the columns (`text` and `label` by default; `target: null` for language
    modelling); `length`; `tokenizer`, a folder, for members that have none; `validation` and `test`, numbers or
    shares of the examples.
    """
    options = dict(spec.options)
    column = take_option(options, "text", "text", str)
    label = take_option(options, "target", "label", str, type(None))
    path = Path(spec.data).expanduser()
    rows = _read_rows(path)
    wanted = [name for name in (column, label) if name is not None]
    if lacking := sorted({name for name in wanted for row in rows if row.get(name) is None}):
        raise LoadError(
            f"Every line of {path} must have {', '.join(wanted)}, but some lack {', '.join(lacking)}; the first "
            f"has {', '.join(map(str, rows[0]))}: name the columns by the options text and target."
        )
    targets = None if label is None else _numbers(path, label, [row[label] for row in rows])
    texts = [str(row[column]) for row in rows]
    return split_texts(texts, targets, spec, options, member, seed)


def split_texts(
    texts: list[str],
    targets: Tensor | None,
    spec: TaskSpec,
    options: dict[str, Any],
    member: Member,
    seed: int,
) -> Parts:
    """Tokenise texts and split them by the options `validation` and `test`."""
    length = take_option(options, "length", LENGTH, int)
    folder = take_option(options, "tokenizer", None, str, type(None))
    tokenizer = load_tokenizer(member if folder is None else Path(folder).expanduser())
    made = {}
    for name, rows in split_rows(len(texts), options, seed).items():
        chosen = [texts[int(row)] for row in rows]
        target = None if targets is None else targets[rows]
        if chosen:
            made[name] = TextBatches(tokenizer, chosen, target, spec.batch, name == "train", seed, length)
    if "train" not in made:
        raise LoadError(f"{spec.data} must hold examples to train on, found none.")
    return Parts(**made)


def load_tokenizer(source: Member | Path) -> Any:
    """The tokenizer of a member that came with its files, or of a folder.

    Raises:
        LoadError: where there is none, or it cannot be read.
    """
    if isinstance(source, Member) and not any(name.startswith(_TOKENIZER) for name in source.files):
        raise LoadError(
            f"Texts need a tokenizer, and member '{source.name}' has none: name a folder with one by the option "
            "tokenizer."
        )
    if isinstance(source, Member):
        return read_tokenizer(source.files, f"member '{source.name}'")
    return read_tokenizer(source, str(source))


def _read_rows(path: Path) -> list[dict[str, Any]]:
    check_there(path)
    try:
        text = read_regular(path, TEXT_BYTES).decode()
        if path.suffix == ".jsonl":
            rows = [parse_json(line, finite=False) for line in text.split("\n") if line.strip()]
        else:
            stream = io.StringIO(text, newline="")
            rows = list(csv.DictReader(stream, delimiter="\t" if path.suffix == ".tsv" else ","))
    except UnreadableError as error:
        raise LoadError(f"The data file {path} cannot be read, it {error}.") from None
    except (ValueError, csv.Error) as error:
        raise LoadError(f"The data file {path} cannot be read: {one_line(error)}") from error
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise LoadError(f"The data file {path} must hold examples with named columns, found none.")
    return rows


def _numbers(path: Path, label: str, values: Sequence[Any]) -> Tensor:
    """Targets as numbers: whole ones are classes."""
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError) as error:
        raise LoadError(f"The column {label} of {path} must hold numbers: {one_line(error)}") from None
    whole = all(isinstance(v, int) or (isinstance(v, str) and v.lstrip("-").isdecimal()) for v in values)
    try:
        return torch.tensor(numbers, dtype=torch.long if whole else torch.float32)
    except (RuntimeError, OverflowError) as error:
        raise LoadError(
            f"The column {label} of {path} must hold numbers of 64 bits: {one_line(error)}"
        ) from None
