"""Analysis of an alignment: which layers share against chance, and what sets shared hypermodules apart.

# MUiR, Fig. 3b and Table 4
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from surgery.artifact.shares import join_names
from surgery.core.joint import JointModel
from surgery.methods.rows.bank import RowsBank, rows_bank

MOST_LAYERS = 120  # rows of an overlap; longer members are shown in groups of consecutive layers
STATISTICS = ("stdev", "mean", "norm", "max")


def subsets(joint: JointModel) -> dict[str, int]:
    """How many hypermodules each set of members uses, the members' names joined by `+`. # Fig. 3a

    Those that collapse replaces by the blocks that they generate, because at most c locations use them, share nothing:
    they are counted under the empty name.
    """
    found: dict[str, int] = {}
    for key in joint.plan.keys_of("hypermodules"):
        bank, used = rows_bank(joint.dictionary[key]), users(joint, key)
        uses = torch.bincount(bank.psi, minlength=bank.hypermodules)[: bank.hypermodules]
        used[uses <= bank.context] = False
        patterns, counts = torch.unique(used, dim=0, return_counts=True)
        for pattern, count in zip(patterns.tolist(), counts.tolist(), strict=True):
            subset = join_names(name for name, uses in zip(joint.names, pattern, strict=True) if uses)
            found[subset] = found.get(subset, 0) + count
    return dict(sorted(found.items(), key=lambda item: (item[0].count("+"), item[0])))


def users(joint: JointModel, key: str) -> Tensor:
    """Which members use each hypermodule of a bank: `[K, members]`, boolean."""
    bank = rows_bank(joint.dictionary[key])
    uses = torch.zeros(bank.hypermodules, len(joint.names), dtype=torch.bool, device=bank.psi.device)
    for p in joint.plan.placements:
        if p.bank == key:
            uses[bank.psi[p.start : p.stop], joint.names.index(p.site.member)] = True
    return uses


def layer_overlap(joint: JointModel, key: str) -> dict[str, Any]:
    """How many hypermodules each two layers of a bank both use, and how many they would by chance.

    Chance deals the same alignment anew, every location alike. A hypermodule with n of the L locations misses a
    layer of `l` locations with probability `C(L - n, l) / C(L, l)`, so two layers both use it with probability
    `1 - P(l_i) - P(l_j) + P(l_i + l_j)`; on the diagonal it is `1 - P(l_i)`.

    Returns:
        `layers`: `[member, first site, last site]` in the order in which members run them; `observed` and
        `expected`: square lists of the same order.
    """
    bank = rows_bank(joint.dictionary[key])
    layers, rows = _layers(joint, key)
    uses = torch.stack([_counts(bank, row) for row in rows])  # [layers, K]
    used = (uses > 0).double()
    observed = used @ used.T
    sizes = uses.sum(1).double()
    total, often = float(sizes.sum()), uses.sum(0).double()
    kinds, times = torch.unique(often[often > 0], return_counts=True)
    expected = torch.zeros_like(observed)
    for n, count in zip(kinds, times.double(), strict=True):
        alone = _missed(total, n, sizes)
        both = _missed(total, n, sizes.unsqueeze(0) + sizes.unsqueeze(1))
        pair = 1 - alone.unsqueeze(0) - alone.unsqueeze(1) + both
        pair.diagonal().copy_(1 - alone)
        expected += count * pair
    return {
        "layers": layers,
        "observed": observed.long().tolist(),
        "expected": [[round(value, 4) for value in row] for row in expected.tolist()],
    }


def kinds_of_modules(joint: JointModel) -> list[dict[str, Any]]:
    """Generic hypermodules, which several members use, against specific ones, which one uses. # Table 4

    Of every hypermodule H (its basis blocks) and of the contexts z of the locations that use it: standard
    deviation, mean, norm and largest absolute value; of each the means of both kinds and the two-sided p-value
    of the Mann-Whitney U test. Hypermodules of all banks count together.

    Returns:
        One entry for each tensor and statistic, with `generic`, `specific`, `p` and how many there are of each
        kind; empty where there are not two of each.
    """
    keys = joint.plan.keys_of("hypermodules")
    found = [_statistics(joint, key) for key in keys if rows_bank(joint.dictionary[key]).hypermodules]
    if not found:
        return []
    generic = torch.cat([shared for shared, _ in found])
    values = torch.cat([numbers for _, numbers in found])
    if int(generic.sum()) < 2 or int((~generic).sum()) < 2:
        return []
    from scipy.stats import mannwhitneyu

    rows = []
    for column, (tensor, name) in enumerate((t, s) for t in ("H", "z") for s in STATISTICS):
        one, other = values[generic, column].numpy(), values[~generic, column].numpy()
        rows.append(
            {
                "tensor": tensor,
                "statistic": name,
                "generic": float(one.mean()),
                "specific": float(other.mean()),
                "p": float(mannwhitneyu(one, other, alternative="two-sided").pvalue),
                "counts": [len(one), len(other)],
            }
        )
    return rows


def _statistics(joint: JointModel, key: str) -> tuple[Tensor, Tensor]:
    """Whether each used hypermodule of a bank has several members, and its eight numbers `[K', 8]`."""
    bank = rows_bank(joint.dictionary[key])
    shared, c = users(joint, key).cpu(), bank.context
    rows = bank.rows.detach()[: bank.hypermodules * c].view(bank.hypermodules, -1).double().cpu()
    order = torch.argsort(bank.psi.cpu(), stable=True)
    uses = _counts(bank, torch.arange(bank.locations, device=bank.psi.device)).cpu()
    contexts = bank.coefficients.detach().double().cpu()[order]
    numbers = []
    for module, of_module in zip(rows, contexts[: int(uses.sum())].split(uses.tolist()), strict=True):
        numbers.append(torch.stack([*_four(module), *_four(of_module.reshape(-1))]))
    kept = uses > 0
    return (shared.sum(1) > 1)[kept], torch.stack(numbers)[kept]


def _four(values: Tensor) -> tuple[Tensor, ...]:
    if not len(values):
        return (values.new_zeros(()),) * 4
    return values.std(correction=0), values.mean(), values.norm(), values.abs().max()


def _counts(bank: RowsBank, locations: Tensor) -> Tensor:
    """How many of these locations each hypermodule of a bank has `[K]`."""
    psi = bank.psi[locations]
    return torch.bincount(psi[psi < bank.hypermodules], minlength=bank.hypermodules).cpu()


def _missed(total: float, n: Tensor, sizes: Tensor) -> Tensor:
    """`C(total - n, size) / C(total, size)`, 0 where the layer is too large to miss it."""
    room = total - n - sizes
    safe = room.clamp_min(0)
    log = torch.lgamma(total - n + 1) + torch.lgamma(total - sizes + 1)
    log = log - torch.lgamma(safe + 1) - torch.lgamma(torch.tensor(total + 1, dtype=sizes.dtype))
    return torch.where(room >= 0, log.exp(), torch.zeros_like(log))


def _layers(joint: JointModel, key: str) -> tuple[list[list[str]], list[Tensor]]:
    """Layers in the order of members and of execution, with their locations on hypermodules."""
    bank, names, rows = rows_bank(joint.dictionary[key]), [], []
    placed = joint.plan.in_bank(key)
    each = max(1, MOST_LAYERS // len(joint.names))
    for member in joint.names:
        own = sorted((p for p in placed if p.site.member == member), key=lambda p: p.site.order)
        for group in _split(own, each):
            places = torch.cat([torch.arange(p.start, p.stop, device=bank.psi.device) for p in group])
            names.append([member, group[0].site.name, group[-1].site.name])
            rows.append(places[bank.psi[places] < bank.hypermodules])
    return names, rows


def _split(items: Sequence[Any], parts: int) -> list[Sequence[Any]]:
    """Consecutive items in at most `parts` groups of almost one size."""
    parts = min(parts, len(items))
    ends = [round(k * len(items) / parts) for k in range(parts + 1)] if parts else []
    return [items[a:b] for a, b in itertools.pairwise(ends)]
