"""Run log: one JSON object a line, so that pictures and reports can be made while a run goes on and after it.

`start` says what is trained; a `generation` line follows each generation; `end` says why the run ended.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surgery.artifact.shares import join_names
from surgery.errors import TrainingError
from surgery.joint import JointModel

NAME = "log.jsonl"
STRIP = 1024  # locations up to which a bank's whole alignment is logged


class RunLog:
    """Appends lines to a file, or to nothing where there is no folder."""

    def __init__(self, folder: Path | None):
        self.path = None if folder is None else folder / NAME

    def begin(self) -> None:
        """Take away what an earlier run wrote that ended before it saved a state."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def write(self, event: str, **fields: Any) -> None:
        """Append a line."""
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"event": event, **fields}) + "\n")

    def cut(self, generation: int) -> None:
        """Take away what was written after `generation` generations, by a run that was then killed."""
        if self.path is None or not self.path.exists():
            return
        kept = [
            line
            for line in read_log(self.path)
            if line["event"] == "start" or (line["event"] == "generation" and line["generation"] < generation)
        ]
        beside = self.path.with_name(f".{NAME}.new")
        beside.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        beside.replace(self.path)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; a last one that a kill cut off is left out.

    Raises:
        TrainingError: where there is no log.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise TrainingError(
            f"{path} must be the log of a training run, but cannot be read: {error}"
        ) from error
    lines = []
    for line in text.splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def first_validation(lines: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Each task's first scores on validation data, as JSON."""
    found: dict[str, dict[str, Any]] = {}
    for line in lines:
        if line["event"] == "generation":
            found = line.get("validation", {}) | found
    return found


def find_log(source: str | Path) -> Path:
    """The log of an artifact, of a run's own folder, or of the run that is to become the artifact.

    Raises:
        TrainingError: where there is none.
    """
    folder = Path(source).expanduser()
    places = [folder / "training" / NAME, folder / NAME, Path(f"{folder}.training") / NAME]
    for path in [folder, *places] if folder.suffix == ".jsonl" else places:
        if path.is_file():
            return path
    raise TrainingError(
        f"{source} must be a folder that surgery train wrote or is writing, but there is no {NAME} in it."
    )


def subsets(joint: JointModel) -> dict[str, int]:
    """How many hypermodules each set of members uses, the members' names joined by `+`. # Fig. 3a

    Those that collapse replaces by the blocks that they generate, because at most c locations use them, share nothing:
    they are counted under the empty name.
    """
    found: dict[str, int] = {}
    for key in (bank.key for bank in joint.plan.banks if not bank.stack):
        bank, used = joint.dictionary[key], users(joint, key)
        uses = torch.bincount(bank.psi, minlength=bank.hypermodules)[: bank.hypermodules]
        used[uses <= bank.context] = False
        patterns, counts = torch.unique(used, dim=0, return_counts=True)
        for pattern, count in zip(patterns.tolist(), counts.tolist(), strict=True):
            subset = join_names(name for name, uses in zip(joint.names, pattern, strict=True) if uses)
            found[subset] = found.get(subset, 0) + count
    return dict(sorted(found.items(), key=lambda item: (item[0].count("+"), item[0])))


def users(joint: JointModel, key: str) -> Tensor:
    """Which members use each hypermodule of a bank: `[K, members]`, boolean."""
    bank = joint.dictionary[key]
    uses = torch.zeros(bank.hypermodules, len(joint.names), dtype=torch.bool, device=bank.psi.device)
    for p in joint.plan.placements:
        if p.bank == key:
            uses[bank.psi[p.start : p.stop], joint.names.index(p.site.member)] = True
    return uses
