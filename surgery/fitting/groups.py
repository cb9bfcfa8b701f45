"""Groups: every tensor of every member to decide on, alone, with related ones, or as a method arranges it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from surgery.fitting.arranging import arrange_made
from surgery.fitting.related import ways
from surgery.fitting.scene import Scene, equal_tensors
from surgery.fitting.trial import Trial
from surgery.fitting.units import Arrangement, Group, Key, Unit, unit_bytes
from surgery.storage.codecs import NATIVE, decode, encode, ladder
from surgery.storage.keys import PlainKey
from surgery.util import memory, progress


def make_groups(scene: Scene) -> list[Group]:
    """Everything that has to be stored, each tensor in one group."""
    originals, claimed = scene.originals, scene.claimed
    insensitive = {
        key
        for key, tensor in originals.items()
        if key not in scene.sensitivity and tensor.is_floating_point() and key not in claimed
    }
    equal = equal_tensors({key: t for key, t in originals.items() if key not in insensitive | claimed})
    kin = ([key for key in keys if key not in insensitive] for keys in scene.kin)
    related = [keys for keys in kin if len(keys) > 1]
    groups: list[Group] = []
    with progress.task("Measuring precisions", len(originals)) as task:
        alone: dict[Key, Unit] = {}
        for keys in equal:
            alone[keys[0]] = scene.alone(keys)
            task.advance(len(keys))
        for keys in related:
            apart = Arrangement(tuple(alone.pop(key) for key in keys))
            sites = [scene.sites[key] for key in keys]
            groups.append(Group((apart, *(way(scene, sites) for way in ways()))))
            scene.forget_metrics(sites)
            memory.give_back()
        groups += [Group((Arrangement((unit,)),)) for unit in alone.values()]
        for name, trial in scene.trials.items():
            mine = {
                PlainKey(*key): originals[key] for key in originals if key in insensitive and key[0] == name
            }
            groups += [Group((Arrangement((_bundle(trial, mine),)),))] if mine else []
            task.advance(len(mine))
    for method, plan in scene.claims:
        arranged = method.arrange(scene, plan)
        groups += arrange_made(method, scene, plan) if arranged is None else arranged
    return groups


def _bundle(trial: Trial, tensors: Mapping[PlainKey, Tensor]) -> Unit:
    """Tensors that no gradient reaches, such as running statistics: tried together, their effect measured."""
    options, nbytes, errors = [NATIVE], [unit_bytes(tensors, NATIVE)], [0.0]
    # Vectors such as running statistics bear little; matrices are here where a model cannot be differentiated.
    for precision in ladder(list(tensors.values())):
        if precision.is_native:
            continue
        trial.set_weights({key.name: decode(encode(t, precision)) for key, t in tensors.items()})
        error = trial.error() ** 2
        if error < 1.0:
            options.append(precision)
            nbytes.append(unit_bytes(tensors, precision))
            errors.append(error)
    trial.set_weights({key.name: t for key, t in tensors.items()})
    return Unit(tensors, {trial.name: 1.0}, tuple(options), tuple(nbytes), tuple(errors))
