"""Plain training of one network, the same on every machine for one seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from benchmarks.frontier.families.base import Batch


def train(
    module: nn.Module,
    data: Batch,
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    epochs: int,
    batch: int,
    rate: float,
    decay: float,
    generator: torch.Generator,
    augment: Callable[[Batch, torch.Generator], Batch] | None = None,
    device: str = "cpu",
) -> None:
    """Train in place with AdamW, a linear warm-up over a tenth of the steps and a cosine to nothing.

    Args:
        module: whatever of it requires gradients.
        data: all examples.
        loss: of outputs and targets.
        epochs: how often each example is seen.
        batch: examples in a step.
        rate: largest rate of learning.
        decay: of weights with two or more axes.
        generator: draws the order and what `augment` draws.
        augment: changes a batch before it is used.
        device: where it is trained; the module comes back.
    """
    module.to(device)
    weights = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in weights if p.dim() > 1], "weight_decay": decay},
        {"params": [p for p in weights if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=rate)
    steps = epochs * -(-len(data) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=max(steps, 2), pct_start=0.1, cycle_momentum=False
    )
    module.train()
    with torch.random.fork_rng():
        torch.manual_seed(generator.initial_seed())  # of dropout, which knows no other generator
        for step, rows in enumerate(_orders(len(data), batch, epochs, generator)):
            piece = data.rows(rows)
            piece = piece if augment is None else augment(piece, generator)
            piece = piece.to(device)
            loss(piece.run(module), piece.target).backward()
            nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if step + 1 < steps:
                schedule.step()
    module.to("cpu").eval()


def _orders(count: int, batch: int, epochs: int, generator: torch.Generator) -> Iterator[Tensor]:
    for _ in range(epochs):
        yield from torch.randperm(count, generator=generator).split(batch)
