"""Families: models of one architecture with what they have learned, data and a score, made by recipe and seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.frontier.families.base import Batch, Choice, Family, Task

__all__ = ["FAMILIES", "Batch", "Choice", "Family", "Task", "make_family"]

FAMILIES = ("vit", "sentiment", "mhc", "noise")


def make_family(
    name: str,
    cache: Path,
    seed: int = 0,
    fast: bool = False,
    members: int | None = None,
    longer: int = 1,
    only: Sequence[str] | None = None,
    device: str = "cpu",
) -> Family:
    """A family, trained where the cache does not have it.

    Args:
        name: one of `FAMILIES`.
        cache: folder for trained weights; one of another recipe or seed is not taken.
        seed: of everything drawn at random.
        fast: tiny models, barely trained, on made-up data.
        members: how many at most; the others are not trained.
        longer: times the epochs of every fine-tune.
        only: names of members, of those; all by default.
        device: that members are trained on.
    """
    from benchmarks.frontier.families import mhc, noise, sentiment, vit

    makers: dict[str, Callable[[Path, Choice], Family]] = {
        "vit": vit.make, "sentiment": sentiment.make, "mhc": mhc.make, "noise": noise.make,
    }  # fmt: skip
    return makers[name](cache, Choice(seed, fast, members, longer, only and tuple(only), device))
