"""Opening: every single row of a dictionary becomes a trainable hypermodule that generates the same blocks."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from surgery.anatomy.plan import Placement, Plan
from surgery.dictionary.dictionary import Dictionary
from surgery.dictionary.mixtures import Templates, has_templates, reopen_stack, run_lengths
from surgery.dictionary.opening import fixed_bank, open_bank, open_rest
from surgery.settings.names import Scale


def open_dictionary(
    plan: Plan,
    dictionary: Dictionary,
    generator: torch.Generator,
    context: int | None = None,
    templates: Templates | None = None,
    scale: Scale = "contexts",
) -> Plan:
    """Open the banks of a dictionary in place; the plan with their contexts. See `JointModel.open`.

    Args:
        plan: what the dictionary generates.
        dictionary: its banks that have single rows, or stacks without templates, are replaced.
        generator: of the new basis blocks.
        context: c; by default what the plan says. With 0 the rows become hypermodules of one basis block.
        templates: how stacks of layers are opened; by default so that nothing changes.
        scale: whether contexts or rows carry the deviations of layers.
    """
    for keys in plan.stacks.values():
        stack = {key: dictionary[key] for key in keys}
        if not has_templates(stack):
            runs = run_lengths([p for p in plan.placements if p.bank == keys[0]])
            dictionary.banks.update(reopen_stack(stack, templates, generator, runs))
    for key in [key for key in dictionary if dictionary[key].singles]:
        bank, c = dictionary[key], plan.bank(key).context if context is None else context
        if not c and not bank.hypermodules:
            dictionary.banks[key] = fixed_bank(bank)
            continue
        sigma = _deviations(bank.blocks(), [p for p in plan.placements if p.bank == key])
        if bank.hypermodules:
            dictionary.banks[key] = open_rest(bank, generator, sigma, scale)
        else:
            dictionary.banks[key] = open_bank(bank, c, generator, sigma, scale)
    return replace(plan, banks=tuple(replace(b, context=dictionary[b.key].context) for b in plan.banks))


@torch.no_grad()
def _deviations(blocks: Tensor, placements: list[Placement]) -> Tensor:
    """The deviation of the weights of each location's site `[L]`, of the blocks of a bank `[L, m*n]`."""
    sigma = blocks.new_ones(len(blocks))
    for p in placements:
        size = p.grid.stack * p.grid.out * p.grid.into  # padding does not count
        sigma[p.start : p.stop] = (blocks[p.start : p.stop].square().sum() / size).sqrt()
    return sigma
