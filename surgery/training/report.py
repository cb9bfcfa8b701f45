"""What a training run reached, and how large its dictionary has become."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from surgery.joint import JointModel
from surgery.training.losses import adapts_by
from surgery.training.tasks import Task
from surgery.training.validation import Score


@dataclass(frozen=True)
class TrainReport:
    """How a run went.

    Attributes:
        generations: that were done.
        best: the generation whose state was kept.
        scores: by task, of the state that was kept, on validation data.
        tests: by task, of the state that was kept, on test data.
        hypermodules: by bank.
        templates: by stack.
        numbers: in the dictionary now, and in the sites that it generates.
        trained: how many numbers training changed.
        adapted: by task that adapted to another domain, by which losses and to what; see `adapted_of`.
        stopped: why the run ended.
        seconds: in all, resumed runs together.
    """

    generations: int
    best: int
    scores: Mapping[str, Score] = field(default_factory=dict)
    tests: Mapping[str, Score] = field(default_factory=dict)
    hypermodules: Mapping[str, int] = field(default_factory=dict)
    templates: Mapping[str, int] = field(default_factory=dict)
    numbers: tuple[int, int] = (0, 0)
    trained: int = 0
    adapted: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    stopped: str = "done"
    seconds: float = 0.0

    def document(self) -> dict[str, Any]:
        """As JSON."""
        scores = {name: score.document() for name, score in self.scores.items()}
        tests = {name: score.document() for name, score in self.tests.items()}
        sizes = {"hypermodules": dict(self.hypermodules), "templates": dict(self.templates)}
        return {**vars(self), "scores": scores, "tests": tests, **sizes}


def adapted_of(task: Task) -> dict[str, Any] | None:
    """How a task adapts, as JSON: losses with weights, and where the features come from; None where it does not."""
    ways = adapts_by(task.loss)
    return {"by": ways, **task.source.document()} if ways and task.source is not None else None


def dictionary_numbers(joint: JointModel) -> tuple[int, int]:
    """Numbers in the dictionary after collapse, and in the sites that it generates.

    A hypermodule that at most c locations use counts as the blocks that it generates:
    `(L - Lo)*c + K*c*m*n + Lo*m*n`. Coefficients that stay 1 do not count, diagonals do. Templates that are used count
    as they are, where they are fewer than the layers, and mixtures that are trained once for all tensors of a stack.
    """
    now = whole = 0
    for plan in joint.plan.banks:
        bank = joint.dictionary[plan.key]
        if plan.stack and bank.hypermodules:
            used = int((bank.coefficients != 0).any(0).sum())
            now += min(used, bank.locations) * bank.width
            whole += bank.locations * bank.width
            if plan.key == joint.plan.stacks[plan.stack][0] and bank.contexts.requires_grad:
                now += bank.contexts.numel()
            continue
        uses = torch.bincount(bank.psi, minlength=bank.hypermodules)
        own = bank.context if bank.contexts.requires_grad else 0
        own += 0 if bank.diagonals is None else bank.diagonals.shape[1]
        rare = uses <= bank.context
        lonely = int(uses[rare].sum())
        width = bank.width
        kept = int((~rare).sum())
        now += (bank.locations - lonely) * own + kept * bank.context * width + lonely * width
        whole += bank.locations * width
    return now, whole
