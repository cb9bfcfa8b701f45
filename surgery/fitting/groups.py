"""Groups: every tensor of every member as something to decide on, alone or as rows shared by siblings."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from surgery import progress
from surgery.blocks import BlockGrid, tile
from surgery.dictionary import master_dtype
from surgery.fitting.sensitivity import sensitivities
from surgery.fitting.trial import Trial
from surgery.fitting.units import (
    GROUP,
    MATRICES,
    VECTORS,
    Arrangement,
    Group,
    Siblings,
    Unit,
    measure,
    unit_bytes,
)
from surgery.precision import BFLOAT16, NATIVE, decode, encode
from surgery.settle import index_dtype
from surgery.sharing.siblings import principal_rows, sibling_groups
from surgery.sites import Site

Key = tuple[str, str]  # member, tensor name


@dataclass(frozen=True)
class Scene:
    """What is being fitted: members that run, their sites, and how sensitive they are to each tensor."""

    trials: Mapping[str, Trial]
    sites: Mapping[Key, Site]
    sensitivity: Mapping[Key, float]
    block: tuple[int, int] | None
    seed: int


def make_scene(
    trials: Mapping[str, Trial], sites: Sequence[Site], block: tuple[int, int] | None, seed: int
) -> Scene:
    """Estimate sensitivities of all members."""
    found = {
        (name, tensor): value
        for name, trial in trials.items()
        for tensor, value in sensitivities(trial, seed).items()
    }
    return Scene(trials, {(s.member, s.name): s for s in sites}, found, block, seed)


def make_groups(scene: Scene) -> list[Group]:
    """Everything that has to be stored, each tensor in one group."""
    originals = {(name, key): t for name, trial in scene.trials.items() for key, t in trial.originals.items()}
    insensitive = {
        key for key in originals if key not in scene.sensitivity and originals[key].is_floating_point()
    }
    equal = _equal_tensors({key: t for key, t in originals.items() if key not in insensitive})
    siblings = _siblings(scene, {key: originals[key] for key in scene.sites if key not in insensitive}, equal)
    groups: list[Group] = []
    with progress.task("Measuring precisions", len(originals)) as task:
        alone: dict[Key, Unit] = {}
        for keys in equal:
            tensor = originals[keys[0]]
            tensors = {_plain_key(key): tensor for key in keys}
            alone[keys[0]] = measure(tensors, _weights(scene, keys))
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
    return groups


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
    return Arrangement(tuple(units), fixed, Siblings(tuple(sites), grid, contexts))


def _bundle(trial: Trial, tensors: Mapping[str, Tensor]) -> Unit:
    """Tensors that no gradient reaches, such as running statistics: tried together, their effect measured."""
    options, nbytes, errors = [NATIVE], [unit_bytes(tensors, NATIVE)], [0.0]
    # Vectors such as running statistics bear little; matrices are here where a model cannot be
    # differentiated.
    matrices = any(tensor.ndim > 1 and tensor.numel() >= GROUP for tensor in tensors.values())
    for precision in (BFLOAT16, *(MATRICES if matrices else VECTORS)):
        trial.wear({_name(key): decode(encode(t, precision)) for key, t in tensors.items()})
        error = trial.error() ** 2
        if error < 1.0:
            options.append(precision)
            nbytes.append(unit_bytes(tensors, precision))
            errors.append(error)
    trial.wear({_name(key): t for key, t in tensors.items()})
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
