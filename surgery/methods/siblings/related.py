"""Siblings' way of storing related sites: rows along their principal directions, each with a precision of its own."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from surgery.anatomy.sites import Site
from surgery.disk.aside import stack_aside
from surgery.fitting.metric import mean_metric
from surgery.fitting.related import register_way
from surgery.fitting.scene import Scene, key_of, private_view
from surgery.fitting.units import BANK_BYTES, Arrangement, measure
from surgery.geometry.blocks import BlockGrid, tile, untile
from surgery.handles.handle import Made
from surgery.handles.state import LazyState
from surgery.methods.rows.shared import SharedRows
from surgery.methods.siblings import differences  # noqa: F401  # a second way, registered by the import
from surgery.methods.siblings.principal import principal_rows
from surgery.util.dtypes import master_dtype


@register_way("siblings")
def principal_directions(scene: Scene, sites: Sequence[Site]) -> Arrangement:
    """Related sites as principal rows: one unit for each row, the later ones droppable."""
    view = sites[0].view
    private = view == private_view(sites[0].shape)
    m, n = view.shape[1:] if private or not scene.target.block else scene.target.block
    grid = BlockGrid(*view.shape, m, n)
    originals = [scene.originals[key_of(site)] for site in sites]
    master = master_dtype(originals[0].dtype)
    device = originals[0].device
    sensitivity = torch.tensor([scene.sensitivity[key_of(site)] for site in sites], device=device)

    def made() -> tuple[Tensor, Tensor, Tensor]:
        cut = (tile(view.to_matrices(each), grid).to(master) for each in originals)
        return principal_rows(stack_aside(len(originals), cut), sensitivity)

    rows, contexts, share = scene.again(made)
    power = sensitivity.sqrt().mean().square().item()  # rows are scaled by root sensitivity over its mean
    mean = mean_metric([scene.metric(site) for site in sites])
    bank = SharedRows(tuple(sites), grid, contexts, coarse=True)
    units = []
    for j in range(len(sites)):
        weight: dict[str, float] = defaultdict(float)
        for i, site in enumerate(sites):
            weight[site.member] += power * share[i, :, j].mean().item()
        unit = measure({f"rows.{j}": rows[j]}, dict(weight), droppable=j > 0)
        if j:  # a row that is left out is no error of independent entries
            row = untile(rows[j], grid).flatten(0, 1)
            structure = mean.price(row) / max(mean.sensitivity * float(row.square().sum()), 1e-300)
            unit = replace(unit, errors=(*unit.errors[:-1], unit.errors[-1] * max(structure, 1.0)))
        # All rows together are as large as the originals: those that are tried are made again.
        again = Made(tuple(rows[j].shape), master, device, lambda j=j: scene.again(made)[0][j].clone())
        units.append(replace(unit, tensors=LazyState({f"rows.{j}": again})))
    return Arrangement(tuple(units), bank.fixed_bytes + BANK_BYTES, (bank,))
