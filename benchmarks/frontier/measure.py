"""How far outputs moved and what is left of the score, and how long making and loading took."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import mean

import torch
from torch import Tensor

from benchmarks.frontier.families import Batch, Family

CHUNK = 128  # examples of a forward pass


@dataclass(frozen=True)
class Quality:
    """Of one package on one part of the data, by member.

    Attributes:
        errors: relative L2 distance of outputs from the original's.
        kept: the score, of the original's.
    """

    errors: Mapping[str, float]
    kept: Mapping[str, float]

    @property
    def error(self) -> float:
        """The mean error of the members."""
        return mean(self.errors.values())

    @property
    def worst_error(self) -> float:
        """The largest."""
        return max(self.errors.values())

    @property
    def mean_kept(self) -> float:
        """The mean of what is kept of the score."""
        return mean(self.kept.values())

    @property
    def worst_kept(self) -> float:
        """The least."""
        return min(self.kept.values())


def outputs_of(module: torch.nn.Module, batch: Batch) -> Tensor:
    """Outputs `[N, ...]` for all examples."""
    with torch.no_grad():
        return torch.cat([piece.run(module) for piece in batch.split(CHUNK)])


class Judge:
    """Compares members' outputs with those of their original weights, which are computed once for each part.

    Args:
        family: the members.
        most: by part, examples of a member that are used; all by default.
    """

    def __init__(self, family: Family, most: Mapping[str, int] | None = None):
        self.most = most or {}
        self.family, self.module = family, family.build().eval().requires_grad_(False)
        self._originals: dict[tuple[str, str], Tensor] = {}

    def outputs(self, state: Mapping[str, Tensor], member: str, part: str) -> Tensor:
        """Of some weights, for a member's examples."""
        self.module.load_state_dict(dict(state))
        return outputs_of(self.module, self.examples(member, part))

    def examples(self, member: str, part: str) -> Batch:
        """A member's examples."""
        return getattr(self.family.tasks[member], part).rows(slice(0, self.most.get(part)))

    def original(self, member: str, part: str) -> Tensor:
        """Of a member as it was."""
        if (member, part) not in self._originals:
            self._originals[member, part] = self.outputs(self.family.states[member], member, part)
        return self._originals[member, part]

    def judge(self, states: Mapping[str, Mapping[str, Tensor]], part: str) -> Quality:
        """Weights of all members on `validation` or `test`."""
        errors, kept = {}, {}
        for member, state in states.items():
            wanted, found = self.original(member, part), self.outputs(state, member, part)
            errors[member] = float((found - wanted).norm() / wanted.norm())
            task = self.family.tasks[member]
            target = self.examples(member, part).target
            if task.score is not None:
                kept[member] = task.score(found, target) / max(task.score(wanted, target), 1e-9)
        return Quality(errors, kept)

    def scores(self, part: str = "test") -> dict[str, float]:
        """Of the original members."""
        return {
            name: task.score(self.original(name, part), self.examples(name, part).target)
            for name, task in self.family.tasks.items()
            if task.score is not None
        }
