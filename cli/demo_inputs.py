"""Real inputs for the demo's two models: sentences in pairs of one meaning, and photographs with their crops."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .demo_weights import package_file

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from surgery.members.member import Inputs

SENTENCES = (
    "The surgeon sewed the wound with great care.",
    "With a steady hand the doctor stitched the cut.",
    "Heavy rain is expected along the coast tomorrow.",
    "The forecast says it will pour by the sea on the next day.",
    "She repaired the old clock that her grandfather had built.",
    "The antique timepiece made by her grandpa works again thanks to her.",
    "Bread dough has to rest before it goes into the oven.",
    "Let the loaf rise for a while, then bake it.",
    "The central bank raised interest rates for the third time this year.",
    "Borrowing became more expensive after another decision of the monetary authority.",
    "Our train was two hours late because of a broken signal.",
    "A faulty light on the line delayed the railway journey.",
    "The children planted sunflowers behind the school.",
    "Pupils grew tall yellow flowers in the school garden.",
    "He forgot his password and could not log in.",
    "Without the secret word he had no access to his account.",
)
"""Sentences `2i` and `2i + 1` mean about the same."""

PHOTOGRAPHS = (
    ("sklearn", "datasets/images/china.jpg"),
    ("sklearn", "datasets/images/flower.jpg"),
    ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg"),
)
TEXTS, PICTURES = "sentences.txt", "pictures"  # names in the demo's folder
CROP = 0.7  # side of a crop, as a fraction of the photograph's


def write_inputs(folder: Path) -> tuple[Path, Path]:
    """Write the sentences, and each photograph whole and as four corner crops.

    Args:
        folder: made anew.

    Returns:
        the file of sentences and the folder of pictures.

    Raises:
        LoadError: where a package that holds a photograph is missing.
        OutputError: where the folder cannot be written, or holds other files.
    """
    from surgery.disk.folders import new_folder

    with new_folder(folder, overwrite=True) as new:
        (new / TEXTS).write_text("\n".join(SENTENCES) + "\n", encoding="utf-8")
        (new / PICTURES).mkdir()
        for package, path in PHOTOGRAPHS:
            file = package_file(package, path)
            for number, view in enumerate(views_of(file)):
                view.save(new / PICTURES / f"{file.stem}-{number}.png")
    return folder / TEXTS, folder / PICTURES


def views_of(file: Path) -> list[Image]:
    """A photograph, whole and as four corner crops."""
    from PIL import Image

    with Image.open(file) as opened:
        picture = opened.convert("RGB")
    width, height = picture.size
    w, h = int(width * CROP), int(height * CROP)
    corners = ((0, 0), (width - w, 0), (0, height - h), (width - w, height - h))
    return [picture, *(picture.crop((x, y, x + w, y + h)) for x, y in corners)]


def embed(outputs: Sequence[tuple[Tensor, ...]], inputs: Sequence[Inputs]) -> Tensor:
    """Sentence embeddings `[sentences, width]`: the mean over real tokens, of length 1."""
    import torch
    from torch.nn.functional import normalize

    means = []
    for (hidden, *_), batch in zip(outputs, inputs, strict=True):
        mask = batch.kwargs["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        means.append((hidden * mask).sum(1) / mask.sum(1))
    return normalize(torch.cat(means), dim=1)


def pairs_found(embeddings: Tensor) -> int:
    """How many sentences have their own partner as their nearest neighbour."""
    import torch

    similarity = embeddings @ embeddings.T
    similarity.fill_diagonal_(-1)
    partners = torch.arange(len(embeddings)) ^ 1
    return int((similarity.argmax(1) == partners).sum())


def top1(outputs: Sequence[tuple[Tensor, ...]]) -> Tensor:
    """The most likely class of each picture, `[pictures]`."""
    import torch

    return torch.cat([logits for logits, *_ in outputs]).argmax(1)


def class_name(number: int) -> str:
    """The first of the names of an ImageNet class."""
    from timm.data.imagenet_info import ImageNetInfo

    return str(ImageNetInfo().index_to_description(number, detailed=False)).partition(",")[0]
