"""Reports of templates: how the layers of stacks are stored after a fit."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from surgery.anatomy.plan import Plan
from surgery.core.sizes import count_tensors
from surgery.fitting.report import StackReport
from surgery.methods.rows.parts import parts_of_singles
from surgery.methods.templates.layers import distinct_layers
from surgery.storage.stored import Stored


def report_stacks(
    plan: Plan, stored: Stored, originals: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, StackReport]:
    """How the layers of each stack of a plan are stored.

    Args:
        plan: as it was before the fit.
        stored: what the fit made.
        originals: by member.
    """
    size = {(row.member, row.name): row for row in count_tensors(stored)}
    found = {}
    for name, keys in plan.stacks.items():
        layers = {key: sorted(plan.in_bank(key), key=lambda p: p.start) for key in keys}
        rows = [size[p.site.member, p.site.name] for placed in layers.values() for p in placed]
        # A layer that no other draws on may have become plain: it is a template of its own.
        counts = [
            _templates_in(stored, bank.key) + len(layers[bank.key]) - bank.locations
            for bank in stored.plan.banks
            if bank.stack == name
        ]
        if not counts:
            tensors = [[originals[p.site.member][p.site.name] for p in placed] for placed in layers.values()]
            counts = [int(distinct_layers(tensors).max()) + 1]
        total = sum(row.original for row in rows), sum(row.nbytes for row in rows)
        found[name] = StackReport(len(layers[keys[0]]), max(counts), *total)
    return found


def _templates_in(stored: Stored, key: str) -> int:
    """How many templates a stored bank has a tensor of."""
    parts = stored.parts(key)
    rows = sum(part.startswith("rows.") for part in parts)
    return rows or sum(parts[part].shape[0] for part in parts_of_singles(parts))
