"""Templates for the layers of pretrained stacks: K given, or the fewest within an error, or the most in a budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from surgery import progress
from surgery.dictionary import Bank, exact_bank
from surgery.errors import PlanError
from surgery.fitting.report import bytes_of
from surgery.fitting.sensitivity import sensitivities
from surgery.generation import to_blocks
from surgery.mixtures import Templates, open_stack
from surgery.plan import Plan
from surgery.precision import NATIVE, encode
from surgery.settle import settle_banks
from surgery.sharing.names import Mixing
from surgery.storage import Stored, bank_tensors, deduplicate

if TYPE_CHECKING:
    from surgery.fitting.trial import Trial


@dataclass(frozen=True)
class TemplateRequest:
    """What templates were asked for: their number, or an error or a budget that decides it."""

    count: int | None
    max_error: float
    budget: float | None
    mixing: Mixing
    seed: int


class TemplateFit:
    """Templates of any number for the stacks of a plan; everything else is plain.

    Args:
        plan: with stacks.
        originals: by member, its tensors by first owner.
        ties: as `surgery.storage.ties` returns them.
        trials: members that run, whose sensitivity to each tensor decides how much its error counts.
        request: what was asked for.
    """

    def __init__(
        self,
        plan: Plan,
        originals: Mapping[str, Mapping[str, Tensor]],
        ties: Mapping[str, Mapping[str, tuple[str, ...]]],
        trials: Mapping[str, Trial],
        request: TemplateRequest,
    ):
        self.originals, self.ties, self.request = originals, ties, request
        stacked = {key for keys in plan.stacks.values() for key in keys}
        self.plan = replace(
            plan,
            banks=tuple(bank for bank in plan.banks if bank.key in stacked),
            placements=tuple(p for p in plan.placements if p.bank in stacked),
        )
        self.layers = max(bank.locations for bank in self.plan.banks)
        self.banks: dict[str, Bank] = {}
        for bank in self.plan.banks:
            mine = [p for p in self.plan.placements if p.bank == bank.key]
            blocks = torch.cat([to_blocks(originals[p.site.member][p.site.name], p) for p in mine])
            self.banks[bank.key] = exact_bank(blocks, bank.block)
        self.weights = _weights(self.plan, trials, request.seed)
        self.whole = sum(bytes_of(state) for state in originals.values())

    def of_count(self, count: int) -> Stored:
        """At most `count` templates for each stack, where they are smaller than the layers."""
        generator = torch.Generator().manual_seed(self.request.seed)
        how = Templates(count, self.request.mixing)
        opened: dict[str, Bank] = {}
        for keys in self.plan.stacks.values():
            opened |= open_stack({key: self.banks[key] for key in keys}, how, generator, self.weights)
        settled = settle_banks(self.plan, opened)
        tensors = {
            key: encode(tensor, NATIVE)
            for bank in settled.plan.banks
            for key, tensor in bank_tensors(bank, settled.banks[bank.key]).items()
        }
        generated = {(p.site.member, p.site.name) for p in settled.plan.placements}
        for name, state in self.originals.items():
            for key, tensor in state.items():
                if (name, key) not in generated:
                    plain = settled.plain.get((name, key), tensor)
                    tensors[f"plain/{name}/{key}"] = encode(plain, NATIVE)
        return deduplicate(Stored(settled.plan, tensors, ties=self.ties))

    def within_budget(self, budget: float) -> Stored:
        """As many templates as `budget` times the members' bytes hold.

        Raises:
            PlanError: where one template for each stack takes more.
        """
        for count in range(self.layers, 0, -1):
            stored = self.of_count(count)
            if stored.nbytes <= budget * self.whole:
                return stored
        least = stored.nbytes / self.whole
        raise PlanError(
            f"A budget of {budget:g} cannot be met with templates: one for each stack takes {least:.3f} of the "
            f"members' bytes; use --budget {np.ceil(least * 100) / 100:.2f} or more, or --method hypermodules."
        )

    def within_error(
        self, bound: float, measure: Callable[[Stored], np.ndarray]
    ) -> tuple[Stored, np.ndarray]:
        """The fewest templates whose measured errors stay within `bound`; as many as layers always do.

        Args:
            bound: of every member's relative error.
            measure: errors of a stored form by member.
        """
        low, high, best = 0, self.layers, self.of_count(self.layers)
        errors = measure(best)
        with progress.task("Fitting to the error bound", max(1, self.layers.bit_length())) as work:
            while high - low > 1:
                middle = (low + high) // 2
                stored = self.of_count(middle)
                found = measure(stored)
                if bool((found <= bound).all()):
                    high, best, errors = middle, stored, found
                else:
                    low = middle
                work.advance()
        return best, errors


def _weights(plan: Plan, trials: Mapping[str, Trial], seed: int) -> dict[str, float]:
    """How much a squared error in each bank's tensors moves outputs: the mean over layers."""
    found = {
        (name, tensor): value
        for name, trial in trials.items()
        for tensor, value in sensitivities(trial, seed).items()
    }
    weights = {}
    for bank in plan.banks:
        mine = [found.get((p.site.member, p.site.name), 0.0) for p in plan.placements if p.bank == bank.key]
        weights[bank.key] = sum(mine) / len(mine)
    return weights
