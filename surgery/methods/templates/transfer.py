"""Transfer: the templates of a trained joint model serve a new task, which trains its mixtures and little else.

The new member begins as the member of the source that suits it best: with its mixtures of the same templates, and with
its other tensors where names and shapes agree. # Compositional models, 3.4
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from surgery.anatomy.plan import Placement
from surgery.core.generation import to_blocks
from surgery.core.joint import JointModel
from surgery.core.tensor_method import States
from surgery.errors import PlanError
from surgery.methods.rows.bank import exact_bank, rows_bank
from surgery.methods.templates.mixtures import Templates, gram_of, mix_banks, sure_mixtures
from surgery.methods.templates.settings import TemplateSettings, settings_in
from surgery.methods.templates.solving import fit_mixtures, solve_templates
from surgery.slots.slots import locate


def candidates(joint: JointModel, states: States) -> tuple[str, ...]:
    """The members of a source whose layers have the tensors of every stack of a joint model.

    Raises:
        PlanError: where there is none, naming what is missing.
    """
    wanted = {(p.site.name, p.site.shape) for p in _stacked(joint)}
    if not wanted:
        raise PlanError("Transfer needs stacks of layers: set method templates in the recipe.")
    lacking = {
        name: [key for key, shape in wanted if key not in state or tuple(state[key].shape) != shape]
        for name, state in states.items()
    }
    found = tuple(name for name, missing in lacking.items() if not missing)
    if not found:
        name, missing = min(lacking.items(), key=lambda item: len(item[1]))
        raise PlanError(
            f"Transfer needs a source with the layers of {', '.join(joint.names)}, but of the nearest member, "
            f"{name}, {len(missing)} tensors are missing or of another shape: {', '.join(sorted(missing)[:4])}."
        )
    return found


@torch.no_grad()
def transfer(joint: JointModel, states: States, like: str, settings: TemplateSettings, seed: int) -> None:
    """Open the stacks of a joint model with a source's templates, every member with the mixtures of `like`.

    Templates are found from what the source's members generate, K of them: where these were trained with as many, they
    are given back exactly, if perhaps as other corners of the same simplex; where layers are no more than K, each layer
    is sure of a template of its own, as after `open`.

    Args:
        joint: as `join` made it, of the plan of `plan_templates`, which says how many templates there are.
        states: of the source.
        like: the source's member whose mixtures and other tensors are the start.
        settings: of the run.
        seed: of a clustering.

    Raises:
        PlanError: where the source lacks the layers, or the plan does not say how many templates there are.
    """
    names = candidates(joint, states)
    if like not in names:
        raise PlanError(f"The source's member must be one of {', '.join(names)}, found '{like}'.")
    said = settings_in(joint.plan)
    if said.templates is None:
        raise PlanError("Transfer needs the number of templates: give `settings.templates=K`.")
    how = Templates.of(said, settings.start, settings.sure)
    for keys in joint.plan.stacks.values():
        _open(joint, keys, states, names, like, how, seed)
    _copy_sites(joint, states[like])
    generated = {(p.site.member, owner) for p in joint.plan.placements for owner in p.site.owners}
    for name in joint.names:
        for key in joint.owners[name]:
            own, given = getattr(*locate(joint[name], key)), states[like].get(key)
            if (name, key) not in generated and given is not None and given.shape == own.shape:
                own.copy_(given)
    joint.refresh()


def _open(
    joint: JointModel,
    keys: Sequence[str],
    states: States,
    names: Sequence[str],
    like: str,
    how: Templates,
    seed: int,
) -> None:
    placed = {
        key: sorted((p for p in _stacked(joint) if p.bank == key), key=lambda p: p.start) for key in keys
    }
    # Layers that several members of the joint model have under one name are one layer of the source.
    own = {key: list({p.site.name: p for p in found}.values()) for key, found in placed.items()}
    depth = len(own[keys[0]])
    blocks = {
        key: torch.cat([to_blocks(states[name][p.site.name], p) for name in names for p in found])
        for key, found in own.items()
    }
    count = min(how.count or depth, len(names) * depth)
    generator = torch.Generator().manual_seed(seed)
    if count == len(names) * depth:
        mixtures = sure_mixtures(torch.arange(count), count, how)
        combine = solve_templates(mixtures)
    else:
        mixtures, combine = fit_mixtures(gram_of(blocks), count, how.mixing, generator)
    first = names.index(like) * depth
    order = {p.site.name: first + place for place, p in enumerate(own[keys[0]])}
    chosen = mixtures[[order[p.site.name] for p in placed[keys[0]]]]
    rows = {key: (combine @ each.double()).to(each.dtype) for key, each in blocks.items()}
    banks = {key: rows_bank(joint.dictionary[key]) for key in keys}
    for key, bank in mix_banks(banks, rows, chosen, how.mixing).items():
        joint.dictionary.banks[key] = bank


def _copy_sites(joint: JointModel, state: Mapping[str, Tensor]) -> None:
    """Give the sites outside stacks the weights of a state dict where it has them; all stay single rows."""
    for plan in joint.plan.banks:
        bank = joint.dictionary[plan.key]
        if plan.stack or bank.hypermodules:
            continue
        blocks = bank.settled_blocks().clone()
        for p in joint.plan.placements:
            given = state.get(p.site.name) if p.bank == plan.key else None
            if given is not None and tuple(given.shape) == p.site.shape:
                blocks[p.start : p.stop] = to_blocks(given, p).to(blocks.device)
        joint.dictionary.banks[plan.key] = exact_bank(blocks, bank.block)


def _stacked(joint: JointModel) -> list[Placement]:
    keys = {key for keys in joint.plan.stacks.values() for key in keys}
    return [p for p in joint.plan.placements if p.bank in keys]
