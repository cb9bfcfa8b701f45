"""Figure 7 of the Gumbel-Matrix with many runs side by side, written from the paper's text alone.

Two pairs of equal tasks choose among four components of 16 units, as in `benchmarks.gumbel_matrix pairs`, but without
this package: one tensor holds a weight of all runs, so that twenty of them take a minute of one core. What training by
recipe should come to, and what it would come to otherwise:

    no budget           nothing limits what a task uses
    budget 0.75, 0.5    the mean probability of being on is penalised above that, with a weight of 1
    penalty 3           a budget of 0.5 with a weight of 3
    together            a budget of 0.5, and one step of the optimizer for the batches of all four tasks
    sum                 no budget, and the sum of the components that are on in place of their mean
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.harness import make_header, make_parser, show

D, HIDDEN, COMPONENTS, BATCH, TASKS, TERMS, LR = 128, 16, 4, 64, 4, 6, 0.01
WAYS: Mapping[str, Mapping[str, Any]] = {
    "no budget": {},
    "budget 0.75": {"budget": 0.75, "penalty": 1.0},
    "budget 0.5": {"budget": 0.5, "penalty": 1.0},
    "penalty 3": {"budget": 0.5, "penalty": 3.0},
    "together": {"budget": 0.5, "penalty": 1.0, "together": True},
    "sum": {"summed": True},
}


def train(
    runs: int,
    rounds: int,
    seed: int,
    budget: float = 1.0,
    penalty: float = 0.0,
    together: bool = False,
    summed: bool = False,
) -> dict[str, Any]:
    """Train all runs and say what they ended with, on average and how often."""
    import torch
    from torch import Tensor

    draw = torch.Generator().manual_seed(seed)
    u = torch.linalg.qr(torch.randn(runs, D, 2, generator=draw))[0]
    w = torch.stack([u[..., 0], u[..., 0], u[..., 1], u[..., 1]], 1)  # [R, T, D]

    def glorot(fan: int, *shape: int) -> Tensor:
        return ((torch.rand(shape, generator=draw) * 2 - 1) * math.sqrt(6 / fan)).requires_grad_()

    layers = glorot(D + HIDDEN, runs, COMPONENTS, D, HIDDEN)
    bias = torch.zeros(runs, COMPONENTS, 1, HIDDEN, requires_grad=True)
    heads, offset = glorot(HIDDEN + 1, runs, TASKS, HIDDEN), torch.zeros(runs, TASKS, requires_grad=True)
    logits = torch.full((runs, TASKS, COMPONENTS, 2), math.log(0.5)).requires_grad_()
    weights, every = [layers, bias, heads, offset], [layers, bias, heads, offset, logits]
    adam = torch.optim.Adam([{"params": weights}, {"params": [logits], "lr": TASKS * LR}], lr=LR)

    def loss(task: int, z: Tensor) -> Tensor:
        x = torch.randn(runs, BATCH, D, generator=draw)
        f = torch.relu(torch.einsum("rbd,rcdh->rcbh", x, layers) + bias)
        g = z if summed else z / z.sum(-1, keepdim=True).clamp_min(1)
        found = ((g[:, :, None, None] * f).sum(1) * heads[:, task, None]).sum(-1) + offset[:, task, None]
        at = (x @ w[:, task, :, None]).squeeze(-1)
        waves = torch.stack([torch.sin(i * at + (i - 1) ** 2) for i in range(1, TERMS + 1)]).sum(0)
        return (found - at - waves - 0.1 * torch.randn(runs, BATCH, generator=draw)).square().mean(1)

    passes = 0
    for _ in range(rounds):
        for place, task in enumerate(torch.randperm(TASKS, generator=draw).tolist()):
            temperature = max(0.5, 50 / math.sqrt(passes + 1))
            passes += 1
            uniform = torch.rand(runs, COMPONENTS, 2, generator=draw).clamp(1e-20, 1 - 2**-24)
            noisy = logits[:, task] - (-uniform.log()).log()
            soft = torch.softmax(noisy / temperature, -1)[..., 0]
            z = (noisy[..., 0] >= noisy[..., 1]).float() + soft - soft.detach()
            p = torch.softmax(logits[:, task], -1)[..., 0].mean(-1)
            (loss(task, z) + penalty * (p - budget).clamp_min(0)).sum().backward()
            if not together or place == TASKS - 1:
                norm = torch.stack([_grad(p).flatten(1).square().sum(1) for p in every]).sum(0).sqrt()
                for p in every:
                    _grad(p).mul_((1 / (norm + 1e-6)).clamp_max(1).view(-1, *[1] * (p.dim() - 1)))
                adam.step()
                adam.zero_grad()
    on = (logits[..., 0] >= logits[..., 1]).float().detach()
    with torch.no_grad():
        left = torch.stack([loss(task, on[:, task]) for task in range(TASKS)]).mean().item()
    return {"runs": runs, "loss": left, **_shared(on)}


def _grad(parameter: Any) -> Any:
    return parameter.grad


def _shared(on: Any) -> dict[str, float]:
    """What tasks of a pair and of two pairs have in common, of components that are on `[R, T, N]`."""
    import torch

    both = torch.einsum("rac,rbc->rab", on, on)
    count = on.sum(-1)
    share = both / (count[:, :, None] + count[:, None] - both).clamp_min(1)  # [R, T, T]
    pair = torch.stack([share[:, 0, 1], share[:, 2, 3]], 1)
    others = torch.stack([share[:, a, b] for a in (0, 1) for b in (2, 3)], 1)
    return {
        "on": count.mean().item(), "of a pair": pair.mean().item(), "of two pairs": others.mean().item(),
        "pairs alike": (pair == 1).all(1).float().mean().item(),
        "as in the paper": ((pair == 1).all(1) & (others == 0).all(1)).float().mean().item(),
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Train by some ways."""
    parser = make_parser(__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--ways", nargs="+", choices=tuple(WAYS), default=list(WAYS))
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3000, help="batches of each task")
    options = parser.parse_args(argv)
    import torch

    torch.set_num_threads(options.threads)
    runs, rounds = (2, 3) if options.fast else (options.runs, options.rounds)
    rows = [{"way": way, **train(runs, rounds, options.seed, **WAYS[way])} for way in options.ways]
    show("Figure 7, side by side", make_header("gumbel_reference", options, argv), rows, [], options.json)


if __name__ == "__main__":
    main()
