"""Copies of one network, each with noise of its own on every matrix: differences of full rank, nothing to be found.

The network is the base of `vit`, on clothes. Whoever claims to share here anything but the common part is mistaken.
"""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.frontier.families import vit
from benchmarks.frontier.families.base import Cache, Choice, Family, State, Task, accuracy, generator_of

COPIES = 6
AMOUNT = 0.05  # deviation of the noise, of each matrix' own


def make(cache: Path, choice: Choice) -> Family:
    """The family, from the trained base of `vit`."""
    base, _ = vit.base_of(Cache(cache, "vit"), choice)
    sizes, _, source = vit.chosen(choice)
    parts = {
        part: vit.see_some(*source("fashion", part), "plain", count, generator_of(0, "noise", part))
        for part, count in (
            ("train", vit.CALIBRATION),
            ("validation", sizes.validation),
            ("test", sizes.test),
        )
    }
    task = Task(parts["train"], parts["validation"], parts["test"], accuracy)
    states: dict[str, State] = {}
    for name in choice.of(f"copy{number}" for number in range(2 if choice.fast else COPIES)):
        generator = generator_of(choice.seed, "noise", name.removeprefix("copy"))
        states[name] = {
            own: t + AMOUNT * t.std() * torch.randn(t.shape, generator=generator)
            if t.dim() > 1
            else t.clone()
            for own, t in base.items()
        }
    return Family("noise", lambda: vit.build(sizes), states, base, dict.fromkeys(states, task), "accuracy")
