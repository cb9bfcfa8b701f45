"""Cross-check: what two independent ways of tracing say of a module's parameters, compared.

The recorder sees Python calls, `torch.export` sees ATen operators. Where both serve, they must agree on what
each parameter is to the network.
"""

from __future__ import annotations

from torch import nn

from surgery.members.member import Inputs
from surgery.tracing.tiers import TIERS, Tier
from surgery.tracing.tracing import trace
from surgery.tracing.types import Trace


def crosscheck(
    module: nn.Module, inputs: Inputs, one: Tier = TIERS[0], other: Tier = TIERS[-1]
) -> dict[str, tuple[str, str]]:
    """Parameters of which two tiers say different things.

    Args:
        module: any module.
        inputs: with which it runs.
        one: a tier, the recorder on the meta device by default.
        other: another one, `torch.export` by default.

    Returns:
        By parameter what each of the two says; empty where they agree.

    Raises:
        TraceError: where a tier does not serve.

    Example:
        >>> import torch
        >>> crosscheck(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), Inputs((torch.zeros(1, 4),)))
        {}
    """
    first, second = (_facts(trace(module, inputs, [tier])) for tier in (one, other))
    names = sorted(set(first) | set(second))
    return {
        name: (first.get(name, "not reached"), second.get(name, "not reached"))
        for name in names
        if first.get(name) != second.get(name)
    }


def _facts(found: Trace) -> dict[str, str]:
    """What each parameter is, over all its uses, in words."""
    facts: dict[str, set[str]] = {}
    for use in found.uses:
        view = "" if use.view is None else f" as {use.view.pattern}"
        ends = (" first" if use.first else "") + (" last" if use.last else "")
        facts.setdefault(use.parameter, set()).add(f"{use.role} {use.kind}{view}{ends}")
    return {name: "; ".join(sorted(said)) for name, said in facts.items()}
