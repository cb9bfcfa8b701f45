"""Exactly: what settings ask for, in the members' precision, and everything else as it is; only sharing saves bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from surgery.core.registry import find_method
from surgery.core.sizes import bytes_alone
from surgery.core.tensor_method import TensorMethod
from surgery.fitting.arranging import make_banks
from surgery.fitting.assembly import with_plain
from surgery.fitting.attempts import measure_errors
from surgery.fitting.scene import Scene
from surgery.fitting.search import Outcome
from surgery.storage.codecs import Encoded, encode_native
from surgery.storage.keys import PlainKey, StorageKey
from surgery.storage.stored import Stored, bank_tensors, deduplicate


def make_exactly(scene: Scene, ties: Mapping[str, Mapping[str, tuple[str, ...]]]) -> Outcome:
    """Store the banks that settings ask for, and all other tensors plainly.

    Args:
        scene: what is being fitted.
        ties: as `surgery.storage.stored.ties` returns them.

    Raises:
        PlanError: where there are no such banks.
    """
    plain, tensors = dict(scene.originals), dict[StorageKey, Encoded]()
    plan = replace(scene.plan, banks=(), placements=())
    for name in scene.asked:
        method, asked = find_method(name, TensorMethod), scene.plan.of_method(name)
        settled = method.exactly(scene, asked) or make_banks(method, scene, asked)
        plain |= settled.plain
        for bank in settled.plan.banks:
            parts = bank_tensors(bank, settled.banks[bank.key])
            tensors |= {key: encode_native(tensor) for key, tensor in parts.items()}
        banks, placements = settled.plan.banks, settled.plan.placements
        plan = replace(plan, banks=(*plan.banks, *banks), placements=(*plan.placements, *placements))
    for p in plan.placements:
        del plain[p.site.member, p.site.name]
    tensors |= {PlainKey(*key): encode_native(tensor) for key, tensor in plain.items()}
    whole = with_plain(scene.plan, plan.banks, plan.placements)
    stored = deduplicate(Stored(whole, tensors, ties=ties))
    saved = sum(bytes_alone(stored).values()) - stored.nbytes
    target = ", ".join(scene.asked.values())
    return Outcome(target, stored, measure_errors(stored, scene.trials), True, saved)
