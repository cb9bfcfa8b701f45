"""Human ratings of sentiment, from -4 to 4, of texts in four domains; from the source of PyPI's vaderSentiment.

C.J. Hutto and E.E. Gilbert, VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text,
ICWSM 2014.
"""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import torch

from surgery.errors import LoadError, PlanError
from surgery.training.tasks.sources_text import TextBatches, load_tokenizer

from .packages import find_files
from .parts import first, split_groups
from .pretrained import minilm_folder

DOMAINS = {
    "tweets": "tweets_GroundTruth.txt",
    "amazon": "amazonReviewSnippets_GroundTruth.txt",
    "movies": "movieReviewSnippets_GroundTruth.txt",
    "nyt": "nytEditorialSnippets_GroundTruth.txt",
}


def sentiment(
    domain: str = "tweets",
    batch: int = 32,
    seed: int = 0,
    folder: str | None = None,
    length: int = 64,
    train: int | None = None,
    validation: int | None = None,
    test: int | None = None,
) -> dict[str, Any]:
    """Batches of tokens for MiniLM and ratings `[B]`.

    A tenth of the texts is for validation, a fifth for test; snippets of one review or editorial are in the same
    part.

    Args:
        domain: `tweets`, `amazon`, `movies` or `nyt`.
        batch: texts in a batch.
        seed: of their order.
        folder: with `hutto_ICWSM_2014.tar.gz`; the user's cache by default.
        length: tokens after which a text is cut off.
        train: how many training texts are used; all by default.
        validation: how many validation texts are used.
        test: how many test texts are used.

    Raises:
        LoadError: where the file is missing or is not what it should be.
        PlanError: for another domain.
    """
    if domain not in DOMAINS:
        raise PlanError(f"The option domain must be one of {', '.join(DOMAINS)}, found '{domain}'.")
    (archive,) = find_files("sentiment", folder)
    groups, ratings, texts = read_ratings(archive, domain)
    tokenizer = load_tokenizer(minilm_folder())
    sizes = {"train": train, "validation": validation, "test": test}
    made = {}
    for name, rows in split_groups(groups, 0.1, 0.2).items():
        use = first(rows, sizes[name], name).tolist()
        target = torch.tensor([ratings[row] for row in use])
        chosen = [texts[row] for row in use]
        made[name] = TextBatches(tokenizer, chosen, target, batch, name == "train", seed, length)
    return made


def read_ratings(archive: Path, domain: str) -> tuple[list[str], list[float], list[str]]:
    """The group, the mean rating and the text of every example; snippets of one source have one group.

    Raises:
        LoadError: where it is no such archive.
    """
    groups, ratings, texts = [], [], []
    try:
        with tarfile.open(archive) as files:
            stream = files.extractfile(f"hutto_ICWSM_2014/{DOMAINS[domain]}")
            assert stream is not None
            content = io.TextIOWrapper(stream, encoding="utf-8", errors="replace").read()
        for line in content.splitlines():
            if line.strip():
                number, rating, text = line.split("\t", 2)
                groups.append(number.partition("_")[0])
                ratings.append(float(rating))
                texts.append(text.strip())
    except (OSError, KeyError, ValueError, tarfile.TarError) as error:
        raise LoadError(
            f"{archive} must hold ratings of {domain}, a number, a rating and a text in each line, but reading it "
            f"says: {error}"
        ) from error
    return groups, ratings, texts
