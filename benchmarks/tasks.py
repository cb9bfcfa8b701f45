"""Real inputs and task figures: what a change of weights does to sentences, word pairs and pictures.

Nothing here is seen by a fit, which uses inputs that it makes up. Word pairs come from gensim's test data,
pictures with labels from foolbox (`pip install --no-deps gensim foolbox`); without a package its figures are
left out. Word pairs give two figures each: the Spearman correlation of the model's similarities with human
judgement, and (`kept`) with the similarities that the original model gives. The second says how faithful the
weights are; the first may also rise when layers are damaged.
"""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr
from surgery_cli.demo_inputs import PHOTOGRAPHS, views_of
from surgery_cli.demo_weights import package_file
from torch import Tensor, nn
from torch.nn.functional import normalize

from surgery import Member
from surgery.inputs.probes import outputs_of, probe_inputs

SENTENCES = Path(__file__).with_name("sentences.txt")
PAIRS = {"WordSim-353": "wordsim353.tsv", "SimLex-999": "simlex999.txt"}
BATCH = 64  # words at once


@dataclass(frozen=True)
class Score:
    """What a set of weights does.

    Attributes:
        error: relative L2 distance of the main output from the original's, on real inputs, padding left out.
        worst: the same for the output tensor that moved most.
        tasks: task figures by name, higher is better.
    """

    error: float
    worst: float
    tasks: Mapping[str, float]


class Task(ABC):
    """A member with real inputs, its original outputs on them, and task figures."""

    def __init__(self, member: Member, inputs: Sequence[Any]):
        self.module, self.inputs = member.module, inputs
        self.reference = list(self._outputs())

    def score(self) -> Score:
        """Compare the module, as its weights are now, with what it was."""
        moved = list(self._outputs())
        errors = [
            distance([r[i] for r in self.reference], [m[i] for m in moved]) for i in range(len(moved[0]))
        ]
        return Score(errors[0], max(errors), self.figures(moved))

    @abstractmethod
    def figures(self, moved: Sequence[Sequence[Tensor]]) -> dict[str, float]:
        """Task figures of outputs, by name."""

    def _outputs(self) -> Iterator[list[Tensor]]:
        for batch in self.inputs:
            yield [self.real_part(output, batch) for output in outputs_of(self.module, batch)]

    def real_part(self, output: Tensor, batch: Any) -> Tensor:
        return output


class TextTask(Task):
    """Sentences, and similarities of word pairs against human judgement (Spearman)."""

    def __init__(self, member: Member, tokenizer_folder: Path, limit: int | None = None):
        from transformers import AutoTokenizer

        super().__init__(member, probe_inputs(member, calibrate=SENTENCES)[: limit and 1])
        self.tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
        self.pairs = {name: pairs[:limit] for name, file in PAIRS.items() if (pairs := read_pairs(file))}
        self.original = self._similarities()

    def real_part(self, output: Tensor, batch: Any) -> Tensor:
        mask = batch.kwargs["attention_mask"]
        return output[mask.bool()] if output.dim() == 3 else output

    def figures(self, moved: Sequence[Sequence[Tensor]]) -> dict[str, float]:
        similarities = self._similarities()
        human = {
            name: rank_correlation(found, [h for *_, h in self.pairs[name]])
            for name, found in similarities.items()
        }
        kept = {
            f"{name} kept": rank_correlation(found, self.original[name])
            for name, found in similarities.items()
        }
        return {**human, **kept}

    def _similarities(self) -> dict[str, list[float]]:
        """Cosines of all word pairs."""
        words = sorted({word for pairs in self.pairs.values() for pair in pairs for word in pair[:2]})
        vectors = dict(zip(words, self._embed(words), strict=True))
        return {
            name: [float(vectors[a] @ vectors[b]) for a, b, _ in pairs] for name, pairs in self.pairs.items()
        }

    @torch.no_grad()
    def _embed(self, words: Sequence[str]) -> list[Tensor]:
        """Mean over real tokens, of length 1."""
        found: list[Tensor] = []
        for start in range(0, len(words), BATCH):
            batch = self.tokenizer(list(words[start : start + BATCH]), padding=True, return_tensors="pt")
            hidden = self.module(**batch).last_hidden_state
            mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
            found += normalize((hidden * mask).sum(1) / mask.sum(1), dim=1).unbind()
        return found


class PictureTask(Task):
    """Photographs and their crops: does the most likely class stay, and is it the labelled one?"""

    def __init__(self, member: Member, folder: Path, limit: int | None = None):
        self.labels = write_pictures(folder, limit)
        super().__init__(member, probe_inputs(member, calibrate=folder))
        self.before = classes(self.reference)

    def figures(self, moved: Sequence[Sequence[Tensor]]) -> dict[str, float]:
        after = classes(moved)
        found = {"same class": float((after == self.before).float().mean())}
        labelled = [(int(c), label) for c, label in zip(after, self.labels, strict=True) if label is not None]
        if labelled:
            found["right class"] = sum(c == label for c, label in labelled) / len(labelled)
        return found


def rank_correlation(found: Sequence[float], wanted: Sequence[float]) -> float:
    """Spearman's."""
    return float(spearmanr(found, wanted)[0])


def classes(outputs: Sequence[Sequence[Tensor]]) -> Tensor:
    """The most likely class of each picture."""
    return torch.cat([logits for logits, *_ in outputs]).argmax(1)


def distance(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """Relative L2 distance over all batches."""
    moved = sum(float((a.double() - b.double()).square().sum()) for b, a in zip(before, after, strict=True))
    return (moved / sum(float(b.double().square().sum()) for b in before)) ** 0.5


def read_pairs(file: str) -> list[tuple[str, str, float]]:
    """Word pairs with human similarities from gensim's test data; none where gensim is not installed."""
    spec = importlib.util.find_spec("gensim")
    if spec is None or spec.origin is None:
        return []
    text = (Path(spec.origin).parent / "test" / "test_data" / file).read_text(encoding="utf-8")
    rows = [line.split("\t") for line in text.splitlines() if line and not line.startswith("#")]
    return [(row[0], row[1], float(row[2])) for row in rows]


def write_pictures(folder: Path, limit: int | None = None) -> list[int | None]:
    """Write real pictures in the order of their names: foolbox's with labels, photographs and their crops.

    Returns:
        the ImageNet class of each picture, None where it is not known.
    """
    folder.mkdir(parents=True)
    labels: list[int | None] = []
    spec = importlib.util.find_spec("foolbox")
    if spec is not None and spec.origin is not None:
        for file in sorted((Path(spec.origin).parent / "data").glob("imagenet_*.jpg"))[:limit]:
            (folder / f"0-{file.name}").write_bytes(file.read_bytes())
            labels.append(int(file.stem.rpartition("_")[2]))
    for package, path in PHOTOGRAPHS[:limit]:
        file = package_file(package, path)
        for number, view in enumerate(views_of(file)[:limit]):
            view.save(folder / f"1-{package}-{file.stem}-{number}.png")
            labels.append(None)
    return labels


def set_weights(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give a module other weights in place."""
    with torch.no_grad():
        state = module.state_dict(keep_vars=True)
        for name, tensor in tensors.items():
            state[name].copy_(tensor)
