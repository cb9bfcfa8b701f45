"""BitDelta (Liu et al., 2402.10193): the sign of each difference from the base, and one scale for each matrix.

The scale starts at the mean absolute difference, which is the least-squares one, and is then trained so that the
member's outputs on calibration data are those of the original.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from itertools import product

import torch
from torch import Tensor

from benchmarks.frontier.packing import Grid, Package
from benchmarks.frontier.peers.base import Peer, Setting, as_matrix, rest_bits_for, rest_of, room_for
from benchmarks.frontier.peers.shared import shared_bytes, shared_grid, shared_leaves
from benchmarks.frontier.scene import Scene

STEPS, RATE, BATCH = 60, 0.01, 32  # of the scales' training; the rate is of their logarithm


def signs_of(difference: Tensor) -> tuple[Tensor, Tensor]:
    """`sign(D)` as codes 0 and 1 `[out, in]`, and the scale that is nearest to D, `mean |D|`.

    Args:
        difference: `[out, in]`.
    """
    return (difference > 0).to(torch.uint8), difference.abs().mean()


def distil(
    scene: Scene, member: str, base: Mapping[str, Tensor], signs: Mapping[str, Tensor], scales: Tensor
) -> Tensor:
    """Scales `[matrices]` trained so that outputs are the original's, in relative mean square.

    Args:
        scene: with a family that runs.
        member: whose outputs.
        base: by matrix, what signs are added to.
        signs: by matrix, -1 and 1.
        scales: where they start.
    """
    assert scene.family is not None
    module = scene.family.module(dict(scene.states[member]))
    data = scene.family.tasks[member].calibration
    logarithms = torch.zeros_like(scales, requires_grad=True)
    optimizer = torch.optim.Adam([logarithms], lr=RATE)
    pieces = list(data.split(BATCH))
    with torch.no_grad():
        wanted = [piece.run(module) for piece in pieces]
    best, least = scales, torch.inf
    for step in range(STEPS):
        piece, target = pieces[step % len(pieces)], wanted[step % len(pieces)]
        now = scales * logarithms.exp()
        weights = {name: base[name] + now[n] * signs[name] for n, name in enumerate(signs)}
        found = torch.func.functional_call(module, weights, piece.args, dict(piece.kwargs or {}))
        loss = (found - target).square().sum() / target.square().sum().clamp_min(1e-12)
        if step % len(pieces) == 0 and float(loss.detach()) < least:
            best, least = now.detach(), float(loss.detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return best


def settings(scene: Scene, size: int) -> Iterator[Setting]:
    """The base in 8 or 4 bits, with and without training; embeddings with signs or the base's."""
    centre = "mean" if scene.base is None else "base"
    tables = {name for name, h in scene.moments().items() if h.dim() == 1}

    def package(levels: int, trained: bool, all_of_them: bool, rest_bits: int) -> Package | None:
        names = [name for name in scene.matrices if all_of_them or name not in tables]
        rest = rest_of(scene, rest_bits)
        signs_bytes = sum(scene.matrix(scene.names[0], name).numel() // 8 for name in names) * len(
            scene.names
        )
        if room_for(scene, size, rest, shared_bytes(scene, levels)) < signs_bytes:
            return None
        for member in scene.names:
            shared = {
                n: as_matrix(shared_grid(scene, centre, n, levels, False), scene.matrix(member, n))
                for n in names
            }
            found = {name: signs_of(scene.matrix(member, name) - shared[name]) for name in names}
            scales = torch.stack([scale for _, scale in found.values()])
            if trained:
                like = scene.states[member]
                signs = {
                    name: (codes.float() * 2 - 1).view_as(like[name]) for name, (codes, _) in found.items()
                }
                base = {name: shared[name].view_as(like[name]) for name in names}
                key = ("bitdelta", member, levels, all_of_them)
                scales = scene.once(key, partial(distil, scene, member, base, signs, scales))
            for n, (name, (codes, _)) in enumerate(found.items()):
                shape = tuple(scene.states[member][name].shape)
                rest[member][name] = Grid(codes, 2 * scales[n].view(1, 1), 2, 0, shape)
        return Package(shared_leaves(scene, centre, levels, False), rest)

    runs = (False, True) if scene.family is not None else (False,)
    for levels, trained, every, rest_bits in product(
        (16, 256), runs, (True, False) if tables else (True,), rest_bits_for(scene, size)
    ):
        words = (
            f"{centre} int{levels.bit_length() - 1}, scales {'trained' if trained else 'as they are'}, "
            f"{'' if every else 'embeddings shared, '}rest {rest_bits} bits"
        )
        yield words, partial(package, levels, trained, every, rest_bits)


BITDELTA = Peer("BitDelta", "2402.10193", settings, True)
