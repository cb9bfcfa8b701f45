"""Predictors of what the immune system presents: 299 LSTMs of one shape with real weights, from PyPI's mhcnuggets.

Most were trained one from another, none from a base that is known. The score is the area under the curve on peptides
that were measured with the allele, where there are enough of both kinds; other members are measured on peptides of all
alleles, by their outputs alone. All measurements were training data of these networks, so scores are in-sample.

Outputs are log-odds, not probabilities: the score is of their ranks, which a sigmoid keeps, while squared errors of
probabilities hardly count peptides that bind badly, and so not how these are ranked.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.frontier.families.base import Batch, Choice, Family, State, Task, generator_of
from benchmarks.siblings import SITES, Predictor, area, encode, read_data, read_predictor

CALIBRATION, VALIDATION, TEST = 64, 100, 300  # peptides of a member
LEAST = 15  # peptides of either kind in validation and in test


class Scorer(Predictor):
    """A predictor's log-odds, `[B, 9, 21]` -> `[B, 1]`."""

    def forward(self, peptides: Tensor) -> Tensor:
        return self.log_odds(peptides)


def make(cache: Path, choice: Choice) -> Family:
    """The family; nothing is trained."""
    if choice.fast:
        return tiny(choice.seed)
    found = importlib.util.find_spec("mhcnuggets")
    if found is None or not found.submodule_search_locations:
        raise SystemExit(
            "The models are in the package mhcnuggets: pip install --no-deps mhcnuggets==2.4.1 h5py"
        )
    package = Path(found.submodule_search_locations[0])
    data = read_data(package)
    everything = [peptide for peptides, _ in data.values() for peptide in peptides]
    states: dict[str, State] = {}
    tasks: dict[str, Task] = {}
    files = {
        path.stem.removesuffix("_BA").replace(":", "").replace("/", "-"): path
        for path in sorted(package.glob("saves/production/*_BA.h5"))
    }
    for name in choice.of(files):
        path, allele = files[name], files[name].stem.removesuffix("_BA")
        states[name] = {key: t.clone() for key, t in read_predictor(path).state_dict().items()}
        tasks[name] = task_of(data.get(allele, ([], [])), everything, generator_of(0, allele))
    return Family("mhc", lambda: Scorer().eval(), states, None, tasks, "AUC", tuple(SITES))


def task_of(own: tuple[list[str], list[bool]], everything: list[str], generator: torch.Generator) -> Task:
    """A member's peptides, or anybody's where it has too few."""
    peptides, binds = own
    order = torch.randperm(len(peptides), generator=generator)
    label = torch.tensor(binds, dtype=torch.bool)[order]
    held = CALIBRATION, CALIBRATION + VALIDATION, CALIBRATION + VALIDATION + TEST
    parts = label[held[0] : held[1]], label[held[1] : held[2]]
    if all(min(int(part.sum()), int((~part).sum())) >= LEAST for part in parts):
        chosen = [peptides[row] for row in order.tolist()[: held[2]]]
        every = Batch(label[: held[2]], (encode(chosen),))
        score = auc
    else:
        rows = torch.randint(len(everything), (held[2],), generator=generator).tolist()
        every = Batch(torch.zeros(held[2], dtype=torch.bool), (encode([everything[row] for row in rows]),))
        score = None
    return Task(
        every.rows(slice(0, held[0])), every.rows(slice(*held[:2])), every.rows(slice(*held[1:])), score
    )


def auc(outputs: Tensor, target: Tensor) -> float:
    """Area under the curve of scores `[N, 1]`."""
    return area(outputs.numpy()[:, 0], target.numpy().astype(np.bool_))


def tiny(seed: int) -> Family:
    """Three random networks that are near one another, for tests."""
    generator = generator_of(seed, "mhc")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        base = Scorer().state_dict()
    inputs = torch.rand(40, 9, 21, generator=generator)
    part = Batch(torch.arange(40) % 2 == 0, (inputs,))
    states = {
        f"allele{n}": {k: t + 0.02 * torch.randn(t.shape, generator=generator) for k, t in base.items()}
        for n in range(3)
    }
    task = Task(part, part, part, auc)
    return Family(
        "mhc", lambda: Scorer().eval(), states, None, dict.fromkeys(states, task), "AUC", tuple(SITES)
    )
