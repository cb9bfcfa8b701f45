"""Hardening: routes that take what each task likes best, and nothing else is kept."""

from __future__ import annotations

from dataclasses import replace

import torch

from surgery.core.joining import join_anew
from surgery.core.joint import JointModel
from surgery.core.replacing import Swaps
from surgery.errors import PlanError
from surgery.members.replacement import Replaced
from surgery.methods.routes.gates import IDENTITY, LearnedGates, make_gates
from surgery.methods.routes.groups import harden_gates, routes_in
from surgery.methods.routes.layers import Pool, RoutedLayer
from surgery.methods.routes.plan import NAME, Recorded
from surgery.methods.routes.sharing import routed_layers


def harden(joint: JointModel) -> JointModel:
    """Fix every task's route through the layers (of members joined by the method `routes`), and drop unused layers.

    Of `gumbel` routes each component is on where that is likelier than off, or as many layers stay as the settings say;
    of `soft` ones the component with the largest share stays. Members whose tasks all take one route, with one
    component at each depth, can then be exported as plain models.

    Args:
        joint: with routes; it is changed in place.

    Returns:
        the same joint model.

    Raises:
        PlanError: where it has no routes.

    Example:
        >>> import surgery
        >>> member = surgery.load_member("text=./text")
        >>> plan = surgery.plan_modules([member], "routes", {"routing": "soft"})
        >>> surgery.harden(surgery.join([member], plan)).extract("text").config.num_hidden_layers
        2
    """
    routes = [depths for name in joint.names for depths in routes_in(joint[name]).values()]
    if not routes:
        raise PlanError("Only routes can be hardened, but no member has any: plan them with method routes.")
    with torch.no_grad():
        harden_gates(routes)
    return drop_unused(joint)


def is_hard(joint: JointModel) -> bool:
    """Whether nothing is left to learn of any layer's route, and something was."""
    learned = [g for name in joint.names for layer in routed_layers(joint, name).values()
               if isinstance(g := layer.gates, LearnedGates)]  # fmt: skip
    return bool(learned) and all(gates.hard is not None for gates in learned)


def drop_unused(joint: JointModel) -> JointModel:
    """Fix hard routes, and drop components that no task of a member uses, with their probabilities.

    Args:
        joint: whose routes are hard; it is changed in place.
    """
    return join_anew(joint, _drop_from)


def _drop_from(joint: JointModel, name: str) -> tuple[Replaced, ...]:
    """Fix the routes of one member, whose parameters are ordinary ones; what is recorded of them then."""
    layers = routed_layers(joint, name)
    used: dict[int, set[str]] = {}
    for layer in layers.values():
        used.setdefault(id(layer.pool), set()).update(_used(layer))
    swaps, pools, fixed = Swaps(), dict[int, Pool](), dict[str, dict]()
    for path, layer in layers.items():
        pool = pools.setdefault(id(layer.pool), Pool())
        kept = {n: m for n, m in zip(layer.own, layer.held, strict=True) if n in used[id(layer.pool)]}
        gates = layer.gates
        chosen = gates.likely() if not isinstance(gates, LearnedGates) else (gates.hard or gates.likely())
        said = {task: tuple(gates.names[i] for i in numbers) for task, numbers in chosen.items()}
        fixed[path] = {"chosen": said, "held": tuple(kept)}
        names = list(dict.fromkeys(name for some in said.values() for name in some))
        numbers = {task: [names.index(name) for name in some] for task, some in said.items()}
        new = make_gates(
            gates.route, gates.depth, names, gates.tasks, gates.settings, None, numbers, gates.per_layer
        )
        new.serve(gates.task)
        new.train(gates.training)
        swaps.put(joint[name], layer, layer.again(kept, new, pool))
    return tuple(_recorded(each, fixed) for each in joint.members[name].replaced)


def _used(layer: RoutedLayer) -> set[str]:
    gates = layer.gates
    chosen = gates.likely() if not isinstance(gates, LearnedGates) else (gates.hard or gates.likely())
    return {gates.names[i] for numbers in chosen.values() for i in numbers} - {IDENTITY}


def _recorded(each: Replaced, fixed: dict[str, dict]) -> Replaced:
    if each.replacement.method != NAME or each.path not in fixed:
        return each
    how = Recorded.model_validate({**each.replacement.settings, **fixed[each.path]})
    if how.lent:
        lenders = {name.rpartition("/")[0] for name in how.held or ()}
        how = how.model_copy(update={"lent": {k: v for k, v in how.lent.items() if k in lenders}})
    settings = how.model_dump(mode="json", exclude_unset=True)
    return replace(each, replacement=replace(each.replacement, settings=settings))
