"""K templates for each stack at the members' precision: the start for training, as a bank of K hypermodules is.

Where an error or a budget is given, `surgery.methods.templates.arrangements` decides on templates and bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from surgery.anatomy.plan import Plan
from surgery.core.generation import to_blocks
from surgery.core.settle import settle_banks
from surgery.fitting.sensitivity import sensitivities
from surgery.methods.rows.bank import RowsBank
from surgery.methods.rows.exact import exact_bank
from surgery.methods.templates.mixtures import Templates, open_stack
from surgery.settings.names import Mixing
from surgery.storage.codecs import encode_native
from surgery.storage.stored import Stored, bank_tensors, deduplicate

if TYPE_CHECKING:
    from surgery.fitting.trial import Trial


@dataclass(frozen=True)
class TemplateRequest:
    """How many templates were asked for, in which mixtures."""

    count: int
    mixing: Mixing
    seed: int


def template_bank(
    plan: Plan,
    originals: Mapping[str, Mapping[str, Tensor]],
    ties: Mapping[str, Mapping[str, tuple[str, ...]]],
    trials: Mapping[str, Trial],
    request: TemplateRequest,
) -> Stored:
    """At most K templates for each stack, where they are smaller than the layers; everything else is plain.

    Args:
        plan: with stacks.
        originals: by member, its tensors by first owner.
        ties: as `surgery.storage.stored.ties` returns them.
        trials: members that run, whose sensitivity to each tensor decides how much its error counts.
        request: what was asked for.
    """
    stacked = {key for keys in plan.stacks.values() for key in keys}
    plan = replace(
        plan,
        banks=tuple(bank for bank in plan.banks if bank.key in stacked),
        placements=tuple(p for p in plan.placements if p.bank in stacked),
    )
    banks: dict[str, RowsBank] = {}
    for bank in plan.banks:
        mine = [p for p in plan.placements if p.bank == bank.key]
        blocks = torch.cat([to_blocks(originals[p.site.member][p.site.name], p) for p in mine])
        banks[bank.key] = exact_bank(blocks, bank.block)
    weights = _weights(plan, trials, request.seed)
    generator = torch.Generator().manual_seed(request.seed)
    how = Templates(request.count, request.mixing)
    opened: dict[str, RowsBank] = {}
    for keys in plan.stacks.values():
        opened |= open_stack({key: banks[key] for key in keys}, how, generator, weights)
    settled = settle_banks(plan, opened)
    tensors = {
        key: encode_native(tensor)
        for bank in settled.plan.banks
        for key, tensor in bank_tensors(bank, settled.banks[bank.key]).items()
    }
    generated = {(p.site.member, p.site.name) for p in settled.plan.placements}
    for name, state in originals.items():
        for key, tensor in state.items():
            if (name, key) not in generated:
                plain = settled.plain.get((name, key), tensor)
                tensors[f"plain/{name}/{key}"] = encode_native(plain)
    return deduplicate(Stored(settled.plan, tensors, ties=ties))


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
