"""Groups: every tensor of every member to decide on, alone, as rows that siblings share, or from templates."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from surgery.anatomy.plan import Plan
from surgery.anatomy.sites import Site
from surgery.core.dictionary import index_dtype, master_dtype
from surgery.fitting.sensitivity import measured_sensitivities, sensitivities
from surgery.fitting.trial import Trial
from surgery.fitting.units import Arrangement, Group, SharedRows, Unit, measure, unit_bytes
from surgery.geometry.blocks import BlockGrid, tile
from surgery.methods.siblings.principal import principal_rows, sibling_groups
from surgery.methods.templates.arrangements import TemplateOptions, stack_group
from surgery.methods.templates.layers import read_stack
from surgery.storage.codecs import NATIVE, decode, encode, ladder
from surgery.util import progress

Key = tuple[str, str]  # member, tensor name


@dataclass(frozen=True)
class Scene:
    """What is being fitted: members that run, where their tensors go, and how sensitive they are to each.

    Attributes:
        trials: by member.
        plan: with stacks or without.
        sites: outside stacks.
        stacked: every tensor of the stacks' layers.
        sensitivity: relative squared output error per squared error.
        block: shape of blocks outside stacks, where it is given.
        seed: of everything random.
    """

    trials: Mapping[str, Trial]
    plan: Plan
    sites: Mapping[Key, Site]
    stacked: frozenset[Key]
    sensitivity: Mapping[Key, float]
    block: tuple[int, int] | None
    seed: int


def make_scene(trials: Mapping[str, Trial], plan: Plan, block: tuple[int, int] | None, seed: int) -> Scene:
    """Estimate sensitivities of all members."""
    in_stacks = {key for keys in plan.stacks.values() for key in keys}
    sites = {(p.site.member, p.site.name): p.site for p in plan.placements if p.bank not in in_stacks}
    stacked = frozenset((p.site.member, p.site.name) for p in plan.placements if p.bank in in_stacks)
    found: dict[Key, float] = {}
    for name, trial in trials.items():
        mine = sensitivities(trial, seed)
        if missing := [key for member, key in sorted(stacked) if member == name and key not in mine]:
            mine |= measured_sensitivities(trial, missing)
        found |= {(name, tensor): value for tensor, value in mine.items()}
    return Scene(trials, plan, sites, stacked, found, block, seed)


def make_groups(scene: Scene, templates: TemplateOptions) -> list[Group]:
    """Everything that has to be stored, each tensor in one group.

    Args:
        scene: as `make_scene` makes it.
        templates: which ones the plan's stacks may take.
    """
    originals = {(name, key): t for name, trial in scene.trials.items() for key, t in trial.originals.items()}
    insensitive = {
        key for key in originals if key not in scene.sensitivity and originals[key].is_floating_point()
    }
    loose = {key: t for key, t in originals.items() if key not in insensitive | scene.stacked}
    equal = _equal_tensors(loose)
    siblings = _siblings(scene, {key: originals[key] for key in scene.sites if key not in insensitive}, equal)
    groups: list[Group] = []
    with progress.task("Measuring precisions", len(originals)) as task:
        alone: dict[Key, Unit] = {}
        for keys in equal:
            alone[keys[0]] = _alone(scene, keys, originals)
            task.advance(len(keys))
        for keys in siblings:
            apart = Arrangement(tuple(alone.pop(key) for key in keys))
            groups.append(Group((apart, _shared(scene, [scene.sites[key] for key in keys], originals))))
        groups += [Group((Arrangement((unit,)),)) for unit in alone.values()]
        for name, trial in scene.trials.items():
            mine = {
                _plain_key(key): originals[key] for key in originals if key in insensitive and key[0] == name
            }
            groups += [Group((Arrangement((_bundle(trial, mine),)),))] if mine else []
            task.advance(len(mine))
    return [*groups, *(_of_stack(scene, name, originals, templates) for name in scene.plan.stacks)]


def _of_stack(scene: Scene, name: str, originals: Mapping[Key, Tensor], templates: TemplateOptions) -> Group:
    """The layers of a stack; a tensor elsewhere that equals one of theirs is decided on by itself."""
    tensors = read_stack(scene.plan, name, originals, scene.sensitivity)
    mine = {(site.member, site.name): originals[site.member, site.name] for t in tensors for site in t.sites}
    apart = Arrangement(tuple(_alone(scene, keys, originals) for keys in _equal_tensors(mine)))
    return stack_group(tensors, apart, templates, scene.seed)


def _alone(scene: Scene, keys: Sequence[Key], originals: Mapping[Key, Tensor]) -> Unit:
    """Equal tensors by themselves."""
    tensor = originals[keys[0]]
    return measure({_plain_key(key): tensor for key in keys}, _weights(scene, keys))


def _equal_tensors(tensors: Mapping[Key, Tensor]) -> list[list[Key]]:
    """Tensors by their bytes: equal ones are decided on and stored once."""
    found: dict[object, list[Key]] = defaultdict(list)
    for key, tensor in tensors.items():
        digest: object = key
        if tensor.numel() * tensor.element_size() >= 512:
            raw = tensor.contiguous().reshape(-1).view(torch.uint8).cpu().numpy()
            digest = (tuple(tensor.shape), tensor.dtype, hashlib.sha256(raw.tobytes()).digest())
        found[digest].append(key)
    return list(found.values())


def _siblings(scene: Scene, tensors: Mapping[Key, Tensor], equal: Sequence[Sequence[Key]]) -> list[list[Key]]:
    """Groups of resembling sites; tensors that are equal already share and take no part."""
    alone = {keys[0] for keys in equal if len(keys) == 1}
    alike: dict[object, list[Key]] = defaultdict(list)
    for key, site in scene.sites.items():
        if key in tensors and key in alone:
            alike[site.kind, site.shape, site.dtype, site.view].append(key)
    return [
        [keys[i] for i in group]
        for keys in alike.values()
        for group in sibling_groups([tensors[key] for key in keys], scene.seed)
    ]


def _shared(scene: Scene, sites: Sequence[Site], originals: Mapping[Key, Tensor]) -> Arrangement:
    """Siblings as principal rows: one unit for each row, the later ones droppable."""
    view = sites[0].view
    m, n = scene.block or view.shape[1:]
    grid = BlockGrid(*view.shape, m, n)
    keys = [(site.member, site.name) for site in sites]
    master = master_dtype(originals[keys[0]].dtype)
    blocks = torch.stack([tile(view.to_matrices(originals[key]), grid).to(master) for key in keys])
    sensitivity = torch.tensor([scene.sensitivity[key] for key in keys], device=blocks.device)
    rows, contexts, share = principal_rows(blocks, sensitivity)
    power = sensitivity.sqrt().mean().square().item()  # rows are scaled by root sensitivity over its mean
    units = []
    for j in range(len(sites)):
        weight: dict[str, float] = defaultdict(float)
        for i, site in enumerate(sites):
            weight[site.member] += power * share[i, :, j].mean().item()
        units.append(measure({f"rows.{j}": rows[j]}, dict(weight), droppable=j > 0))
    index_bytes = len(sites) * grid.locations * index_dtype(grid.locations).itemsize
    fixed = contexts.numel() * contexts.element_size() + index_bytes + 400.0
    bank = SharedRows(tuple(sites), grid, contexts)
    return Arrangement(tuple(units), fixed, (bank,))


def _bundle(trial: Trial, tensors: Mapping[str, Tensor]) -> Unit:
    """Tensors that no gradient reaches, such as running statistics: tried together, their effect measured."""
    options, nbytes, errors = [NATIVE], [unit_bytes(tensors, NATIVE)], [0.0]
    # Vectors such as running statistics bear little; matrices are here where a model cannot be
    # differentiated.
    for precision in ladder(list(tensors.values())):
        if precision.is_native:
            continue
        trial.set_weights({_name(key): decode(encode(t, precision)) for key, t in tensors.items()})
        error = trial.error() ** 2
        if error < 1.0:
            options.append(precision)
            nbytes.append(unit_bytes(tensors, precision))
            errors.append(error)
    trial.set_weights({_name(key): t for key, t in tensors.items()})
    return Unit(tensors, {trial.name: 1.0}, tuple(options), tuple(nbytes), tuple(errors))


def _weights(scene: Scene, keys: Sequence[Key]) -> dict[str, float]:
    weight: dict[str, float] = defaultdict(float)
    for key in keys:
        weight[key[0]] += scene.sensitivity.get(key, 0.0)
    return dict(weight)


def _plain_key(key: Key) -> str:
    return f"plain/{key[0]}/{key[1]}"


def _name(key: str) -> str:
    return key.split("/", 2)[2]
