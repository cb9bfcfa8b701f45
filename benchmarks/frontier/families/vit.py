"""Fine-tunes of one small vision transformer on variants of Fashion-MNIST and MNIST.

The base learns clothes; each member goes on from it with all its weights. Seven are near relatives. `permuted` sees its
pixels in another order and trains long at a high rate: its difference from the base is not of low rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.frontier.families.base import (
    Batch,
    Cache,
    Choice,
    Family,
    State,
    Task,
    accuracy,
    generator_of,
)
from benchmarks.frontier.families.training import train

SIDE, CLASSES = 28, 10
CALIBRATION = 256  # pictures of a member


@dataclass(frozen=True)
class Variant:
    """One member's data, `fashion` or `mnist`; its views, of `surgery_recipes.views` or `permuted`; its training."""

    data: str
    views: str
    epochs: int
    rate: float = 3e-4


VARIANTS = {
    "rotated": Variant("fashion", "rotated", 3),
    "inverted": Variant("fashion", "inverted", 3),
    "sheared": Variant("fashion", "shear", 3),
    "small": Variant("fashion", "scale", 3),
    "digits": Variant("mnist", "plain", 6),
    "permuted": Variant("fashion", "permuted", 8, 2e-3),
    "digits-inverted": Variant("mnist", "inverted+rotated", 6),
    "digits-noisy": Variant("mnist", "shot", 6),
}


@dataclass(frozen=True)
class Sizes:
    """How large and how long."""

    width: int = 128
    depth: int = 3
    heads: int = 4
    base_epochs: int = 8
    base_rate: float = 1e-3
    fashion: int = 50_000  # pictures that the base sees
    fine: int = 12_000  # clothes that a member sees; of digits there are 7,000
    validation: int = 1_000
    test: int = 2_000
    batch: int = 128


TRAINED_BY = ("width", "depth", "heads", "base_epochs", "base_rate", "fashion", "batch")
FAST = Sizes(32, 2, 2, 1, 1e-3, 512, 256, 64, 64, 64)


def build(sizes: Sizes) -> nn.Module:
    """The architecture: patches of 7 pixels, layers of four matrices, a linear head on the mean."""
    import timm

    return timm.models.VisionTransformer(
        img_size=SIDE, patch_size=7, in_chans=1, num_classes=CLASSES, embed_dim=sizes.width, depth=sizes.depth,
        num_heads=sizes.heads, mlp_ratio=4.0, global_pool="avg",
    )  # fmt: skip


Source = Callable[[str, str], tuple[Tensor, Tensor]]


def make(cache: Path, choice: Choice) -> Family:
    """The family; trained in about sixteen minutes of one core."""
    sizes, variants, source = chosen(choice)
    kept = Cache(cache, "vit")
    base, recipe = base_of(kept, choice)
    states, tasks = {}, {}
    for name in choice.of(variants):
        variant = variants[name]
        train_part = see_some(
            *source(variant.data, "train"),
            variant.views,
            sizes.fine,
            generator_of(choice.seed, name, "train"),
        )
        held = {
            part: see_some(*source(variant.data, part), variant.views, count, generator_of(0, name, part))
            for part, count in (("validation", sizes.validation), ("test", sizes.test))
        }
        epochs = choice.longer * (1 if choice.fast else variant.epochs)

        def fine_tune(
            name: str = name, variant: Variant = variant, data: Batch = train_part, epochs: int = epochs
        ) -> State:
            net = build(sizes)
            net.load_state_dict(base)
            train(
                net, data, F.cross_entropy, epochs=epochs, batch=sizes.batch, rate=variant.rate, decay=0.05,
                generator=generator_of(choice.seed, name, "order"), device=choice.device,
            )  # fmt: skip
            return net.state_dict()

        own = {**recipe, **asdict(variant), "epochs": epochs, "fine": sizes.fine}
        states[name] = kept.get(name, own, fine_tune)
        tasks[name] = Task(train_part.rows(slice(0, CALIBRATION)), held["validation"], held["test"], accuracy)
    return Family("vit", lambda: build(sizes), states, base, tasks, "accuracy", seconds=kept.seconds)


def chosen(choice: Choice) -> tuple[Sizes, dict[str, Variant], Source]:
    """Sizes, members and data."""
    if choice.fast:
        return FAST, {name: VARIANTS[name] for name in ("rotated", "digits", "permuted")}, made_up
    return Sizes(), VARIANTS, pictures_of


def base_of(kept: Cache, choice: Choice) -> tuple[State, dict[str, Any]]:
    """The weights that all members start from, and their recipe."""
    sizes, _, source = chosen(choice)
    recipe = {
        **{name: getattr(sizes, name) for name in TRAINED_BY},
        "made up": choice.fast,
        "seed": choice.seed,
        **choice.trained_on,
    }
    return kept.get("base", recipe, lambda: train_base(sizes, source, choice)), recipe


def train_base(sizes: Sizes, source: Source, choice: Choice) -> State:
    """Learn clothes, mirrored at random, from random weights."""
    seed = choice.seed
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = build(sizes)
    data = see_some(*source("fashion", "train"), "plain", sizes.fashion, generator_of(seed, "base"))

    def mirror(batch: Batch, generator: torch.Generator) -> Batch:
        (pictures,) = batch.args
        flip = torch.rand(len(pictures), 1, 1, 1, generator=generator) < 0.5
        return Batch(batch.target, (torch.where(flip, pictures.flip(3), pictures),))

    train(
        net, data, F.cross_entropy, epochs=sizes.base_epochs, batch=sizes.batch, rate=sizes.base_rate, decay=0.05,
        generator=generator_of(seed, "base", "order"), augment=mirror, device=choice.device,
    )  # fmt: skip
    return net.state_dict()


def pictures_of(data: str, part: str) -> tuple[Tensor, Tensor]:
    """Pictures `[N, 1, 28, 28]` in [0, 1] and their classes, in the split of the recipes."""
    from surgery_recipes.fashion import DEVIATION, MEAN, fashion_mnist
    from surgery_recipes.mnist import mnist

    if data == "fashion":
        batches, mean, deviation = fashion_mnist(batch=4096)[part], MEAN, DEVIATION
    else:
        from surgery_recipes import mnist as digits

        batches, mean, deviation = mnist(batch=4096)[part], digits.MEAN, digits.DEVIATION
    found = list(batches)
    pictures = torch.cat([x for x, _ in found]) * deviation + mean
    return pictures, torch.cat([y for _, y in found])


def made_up(data: str, part: str) -> tuple[Tensor, Tensor]:
    """A few hundred pictures of ten random patterns in noise."""
    patterns = torch.rand(CLASSES, 1, SIDE, SIDE, generator=generator_of(0, data))
    generator = generator_of(0, data, part)
    target = torch.randint(CLASSES, (512,), generator=generator)
    noise = torch.rand(len(target), 1, SIDE, SIDE, generator=generator)
    return (patterns[target] + noise) / 2, target


def see_some(pictures: Tensor, target: Tensor, views: str, count: int, generator: torch.Generator) -> Batch:
    """Some examples through views; what views draw at random comes from the generator."""
    from surgery_recipes.views import see

    rows = torch.randperm(len(pictures), generator=generator)[:count]
    chosen = pictures[rows]
    if views == "permuted":
        order = torch.randperm(SIDE * SIDE, generator=torch.Generator().manual_seed(0))
        chosen = chosen.flatten(1)[:, order].view_as(chosen)
    else:
        with torch.random.fork_rng():  # views draw from the global generator
            torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
            chosen = see(chosen, views)
    return Batch(target[rows], ((chosen - 0.286) / 0.353,))
