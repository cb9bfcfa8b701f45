"""K templates for each stack at the members' precision: the start for training, as a bank of K hypermodules is.

Where an error or a budget is given, `surgery.methods.templates.arrangements` decides on templates and bits.
"""

from __future__ import annotations

import torch

from surgery.anatomy.plan import Plan
from surgery.core.settle import Settled, settle_banks
from surgery.fitting.scene import Scene, key_of
from surgery.methods.rows.bank import RowsBank, exact_bank
from surgery.methods.templates.mixtures import Templates, open_stack
from surgery.methods.templates.settings import settings_in


def templates_of_number(scene: Scene, plan: Plan) -> Settled:
    """At most K templates for each stack, where they are smaller than the layers.

    Args:
        scene: whose sensitivity to each tensor decides how much its error counts.
        plan: of the stacks.
    """
    banks: dict[str, RowsBank] = {}
    weights: dict[str, float] = {}
    for bank in plan.banks:
        mine = plan.in_bank(bank.key)
        banks[bank.key] = exact_bank(scene.blocks(mine), bank.block)
        moved = [scene.sensitivity.get(key_of(p.site), 0.0) for p in mine]
        weights[bank.key] = sum(moved) / len(moved)
    generator = torch.Generator().manual_seed(scene.seed)
    said = settings_in(plan)
    how = Templates(said.templates, said.mixture)
    opened: dict[str, RowsBank] = {}
    for keys in plan.stacks.values():
        opened |= open_stack({key: banks[key] for key in keys}, how, generator, weights)
    return settle_banks(plan, opened)
