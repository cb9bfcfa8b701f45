"""Siblings: related models with real weights together against each of them apart, at one error bound.

The models are the MHC class I predictors of the package mhcnuggets (one LSTM of 26,000 weights for each allele of the
immune system's presenting molecule), whose training data comes with them. Their cells used a hard sigmoid; here
`nn.LSTM` runs the same weights, which is near. Needs `pip install --no-deps mhcnuggets==2.4.1 h5py`.

    python -m benchmarks.siblings
    python -m benchmarks.siblings --family HLA-B --members 20
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.harness import make_header, make_parser, show
from surgery import Inputs, JointModel, Member, discover, fit, join, load_member, make_plan

LENGTH, LETTERS = 9, "ACDEFGHIKLMNPQRSTVWY"
BINDER_NM = 500.0
SITES = ["re:.*weight.*"]  # such small models have no part to spare: first and last maps take part too


class Predictor(nn.Module):
    """Binding strength of a peptide, `[B, 9, 21]` -> `[B, 1]`."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(21, 64, batch_first=True)
        self.hidden, self.out = nn.Linear(64, 64), nn.Linear(64, 1)

    def forward(self, peptides: Tensor) -> Tensor:
        return torch.sigmoid(self.log_odds(peptides))

    def log_odds(self, peptides: Tensor) -> Tensor:
        """What the last sigmoid gets."""
        last = self.lstm(peptides)[0][:, -1]
        return self.out(torch.tanh(self.hidden(last)))


def read_predictor(path: Path) -> Predictor:
    """Weights from Keras, whose gates i, f, c, o are torch's i, f, g, o."""
    import h5py

    found: dict[tuple[str, int, str], Tensor] = {}

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            kind, number = name.split("/")[0].rsplit("_", 1)
            found[kind, int(number), name.split("/")[-1].split(":")[0]] = torch.tensor(np.array(item))

    with h5py.File(path, "r") as file:
        file.visititems(visit)
    lstm = next(number for kind, number, _ in found if kind == "lstm")
    first, second = sorted({number for kind, number, _ in found if kind == "dense"})
    model = Predictor()
    model.load_state_dict({
        "lstm.weight_ih_l0": found["lstm", lstm, "kernel"].T,
        "lstm.weight_hh_l0": found["lstm", lstm, "recurrent_kernel"].T,
        "lstm.bias_ih_l0": found["lstm", lstm, "bias"], "lstm.bias_hh_l0": torch.zeros(256),
        "hidden.weight": found["dense", first, "kernel"].T, "hidden.bias": found["dense", first, "bias"],
        "out.weight": found["dense", second, "kernel"].T, "out.bias": found["dense", second, "bias"],
    })  # fmt: skip
    return model.eval()


def encode(peptides: Sequence[str]) -> Tensor:
    """Peptides of nine letters as `[B, 9, 21]`: 0.9 at the letter, 0.005 elsewhere."""
    index = torch.tensor([[LETTERS.index(letter) for letter in peptide] for peptide in peptides])
    return torch.full((*index.shape, 21), 0.005).scatter_(2, index.unsqueeze(2), 0.9)


def read_data(package: Path) -> dict[str, tuple[list[str], list[bool]]]:
    """By allele: peptides of nine letters with a measured affinity, and whether they bind."""
    data: dict[str, tuple[list[str], list[bool]]] = {}
    with (package / "data/production/mhcI/curated_training_data.csv").open() as stream:
        for row in csv.DictReader(stream):
            peptide = row["peptide"]
            if (
                row["measurement_type"] == "quantitative"
                and len(peptide) == LENGTH
                and set(peptide) <= set(LETTERS)
            ):
                peptides, binds = data.setdefault(row["mhc"].replace("*", ""), ([], []))
                peptides.append(peptide)
                binds.append(float(row["IC50(nM)"]) <= BINDER_NM)
    return data


def area(score: np.ndarray, label: np.ndarray) -> float:
    """Area under the receiver operating characteristic, from ranks."""
    from scipy.stats import rankdata

    positive = int(label.sum())
    ranks = rankdata(score)[label].sum()
    return float((ranks - positive * (positive + 1) / 2) / (positive * (len(label) - positive)))


def fitted(members: Sequence[Member], bound: float, seed: int) -> JointModel:
    """Members joined, every matrix a site, and fitted."""
    plan = make_plan([discover(member, sites=SITES) for member in members])
    return fit(join(members, plan), max_error=bound, seed=seed)


def run(package: Path, options: argparse.Namespace) -> tuple[list[dict[str, Any]], list[str]]:
    data = read_data(package)
    files = {path.stem.removesuffix("_BA"): path for path in sorted(package.glob("saves/production/*_BA.h5"))}
    names = [
        name for name in files if name.startswith(options.family) and sum(data.get(name, ([], []))[1]) >= 20
    ]
    names = names[: options.members]

    def members() -> list[Member]:
        return [
            load_member(
                read_predictor(files[name]),
                name=name.replace(":", "").replace("/", "-"),
                inputs=Inputs((encode(data[name][0][:64]),)),
            )
            for name in names
        ]

    start = time.perf_counter()
    together = fitted(members(), options.max_error, options.seed)
    seconds = time.perf_counter() - start
    apart = [fitted([member], options.max_error, options.seed) for member in members()]
    results = []
    for name, alone in zip(names, apart, strict=True):
        key = alone.names[0]
        x, label = encode(data[name][0]), np.array(data[name][1])
        with torch.no_grad():
            original = read_predictor(files[name])(x)
            shared, single = together[key](x), alone[key](x)
        results.append({
            "allele": name, "peptides": len(label), "AUC": area(original.numpy()[:, 0], label),
            "AUC together": area(shared.numpy()[:, 0], label), "AUC apart": area(single.numpy()[:, 0], label),
            "error together": float((shared - original).norm() / original.norm()),
            "error apart": float((single - original).norm() / original.norm()),
        })  # fmt: skip
    whole = sum(together.report.original_bytes.values())
    one_by_one = sum(joint.report.stored_bytes for joint in apart)
    both = together.report.stored_bytes
    verdicts = [
        f"{len(names)} members, {whole:,} bytes; apart {one_by_one:,} ({one_by_one / whole:.1%}), together {both:,} "
        f"({both / whole:.1%}): {both / one_by_one:.3f} times as large",
        f"of what was saved together, sharing saved {together.report.saved['sharing']:,} bytes and precision "
        f"{together.report.saved['precision']:,}; fit together took {seconds:.1f} s",
    ]
    return results, verdicts


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--family", default="HLA-A02", help="alleles whose name begins so")
    parser.add_argument("--members", type=int, default=15, help="how many of them at most")
    parser.add_argument("--max-error", type=float, default=0.05)
    options = parser.parse_args(argv)
    if options.fast:
        options.members = min(options.members, 3)
    torch.set_num_threads(options.threads)
    found = importlib.util.find_spec("mhcnuggets")
    if found is None or not found.submodule_search_locations:
        sys.exit(
            "The models are in the package mhcnuggets, which is not installed: "
            "pip install --no-deps mhcnuggets==2.4.1 h5py"
        )
    results, verdicts = run(Path(found.submodule_search_locations[0]), options)
    show(
        f"Siblings together and apart, max-error {options.max_error:g}",
        make_header("siblings", options, argv),
        results,
        verdicts,
        options.json,
    )


if __name__ == "__main__":
    main()
