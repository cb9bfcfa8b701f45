"""Fine-tunes of all-MiniLM-L6-v2 on human ratings of sentiment in four domains.

A member is the encoder with the mean of its tokens; its output is that embedding. A linear readout of each task,
trained with it, belongs to the score and is not compressed. Scores are correlations with people's ratings, on texts of
other reviews and editorials.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.frontier.families.base import Batch, Cache, Choice, Family, State, Task, generator_of
from benchmarks.frontier.families.training import train

CALIBRATION, VALIDATION, TEST = 128, 160, 400  # texts of a member
LENGTH = 40  # tokens after which a text is cut off


class Embedder(nn.Module):
    """An encoder and the mean of its tokens: `[B, length]` ids to `[B, width]`."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * mask).sum(1) / mask.sum(1).clamp_min(1)


class WithReadout(nn.Module):
    """An embedder and a linear map of what it gives."""

    def __init__(self, body: nn.Module, width: int):
        super().__init__()
        self.body, self.readout = body, nn.Linear(width, 1)
        nn.init.zeros_(self.readout.weight)
        nn.init.zeros_(self.readout.bias)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.readout(self.body(input_ids, attention_mask)).squeeze(1)


@dataclass(frozen=True)
class Recipe:
    """How members are trained."""

    epochs: int = 2
    most: int = 4000  # training texts
    batch: int = 16
    rate: float = 5e-5
    decay: float = 0.01


def build(fast: bool) -> Embedder:
    """The architecture; a tiny one where it has to be fast."""
    from transformers import AutoConfig, BertConfig, BertModel

    from surgery.util.quiet import quiet

    if fast:
        config = BertConfig(
            vocab_size=200, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
            max_position_embeddings=64,
        )  # fmt: skip
    else:
        from benchmarks.zoo import minilm_folder

        config = AutoConfig.from_pretrained(minilm_folder())
    with quiet(), torch.random.fork_rng():
        torch.manual_seed(0)
        return Embedder(BertModel(config, add_pooling_layer=False))


def pretrained(fast: bool) -> State:
    """MiniLM's own weights, of its encoder."""
    net = build(fast)
    if fast:
        return net.state_dict()
    from benchmarks.zoo import minilm_folder

    found = load_file(minilm_folder() / "model.safetensors")
    names = {name.removeprefix("bert."): t.float() for name, t in found.items() if t.is_floating_point()}
    wanted = net.encoder.state_dict()
    net.encoder.load_state_dict({name: names.get(name, wanted[name]) for name in wanted})
    missing = [name for name in wanted if name not in names]
    if missing:
        raise ValueError(f"MiniLM's file must hold {', '.join(missing)}.")
    return net.state_dict()


def correlation(outputs: Tensor, target: Tensor) -> float:
    """Pearson's, of numbers `[N]`."""
    return float(torch.corrcoef(torch.stack([outputs, target.to(outputs.dtype)]))[0, 1])


def make(cache: Path, choice: Choice) -> Family:
    """The family; trained in about a quarter of an hour of two cores."""
    fast = choice.fast
    recipe = Recipe(1, 64) if fast else Recipe()
    recipe = replace(recipe, epochs=choice.longer * recipe.epochs)
    domains = ("tweets", "movies") if fast else ("tweets", "movies", "nyt", "amazon")
    kept = Cache(cache, "sentiment")
    base = pretrained(fast)
    states: dict[str, State] = {}
    tasks: dict[str, Task] = {}
    for domain in choice.of(domains):
        parts = made_up(domain) if fast else texts_of(domain)
        rows = torch.randperm(len(parts["train"]), generator=generator_of(choice.seed, domain))
        data = parts["train"].rows(rows[: recipe.most])
        own = {**asdict(recipe), "domain": domain, "seed": choice.seed, "made up": fast, **choice.trained_on}
        readout = kept.path(domain, own).with_suffix(".readout")

        def fine_tune(data: Batch = data, domain: str = domain, readout: Path = readout) -> State:
            net = WithReadout(build(fast), data_width(fast))
            net.body.load_state_dict(base)
            train(
                net, data, F.mse_loss, epochs=recipe.epochs, batch=recipe.batch, rate=recipe.rate, decay=recipe.decay,
                generator=generator_of(choice.seed, domain, "order"), device=choice.device,
            )  # fmt: skip
            readout.parent.mkdir(parents=True, exist_ok=True)
            save_file(net.readout.state_dict(), readout)
            return net.body.state_dict()

        states[domain] = kept.get(domain, own, fine_tune)
        weights = load_file(readout)

        def score(outputs: Tensor, target: Tensor, weights: dict[str, Tensor] = weights) -> float:
            return correlation(F.linear(outputs, weights["weight"], weights["bias"]).squeeze(1), target)

        tasks[domain] = Task(
            data.rows(slice(0, CALIBRATION)), parts["validation"].rows(slice(0, VALIDATION)),
            parts["test"].rows(slice(0, TEST)), score,
        )  # fmt: skip
    return Family("sentiment", lambda: build(fast), states, base, tasks, "correlation", seconds=kept.seconds)


def data_width(fast: bool) -> int:
    """Of an embedding."""
    return 32 if fast else 384


def texts_of(domain: str) -> dict[str, Batch]:
    """Tokens and ratings, in the split of the recipe: texts of one review or editorial are in one part."""
    from surgery_recipes.sentiment import sentiment

    made = {}
    for part, batches in sentiment(domain, batch=1 << 20, length=LENGTH).items():
        ((inputs, target),) = list(batches)
        made[part] = Batch(
            target.float(), (), {name: inputs[name] for name in ("input_ids", "attention_mask")}
        )
    generator = torch.Generator().manual_seed(0)
    return {part: each.rows(torch.randperm(len(each), generator=generator)) for part, each in made.items()}


def made_up(domain: str) -> dict[str, Batch]:
    """Random tokens; the rating is the share of low numbers."""
    made = {}
    for part in ("train", "validation", "test"):
        generator = generator_of(0, domain, part)
        ids = torch.randint(1, 200, (64, 12), generator=generator)
        target = (ids < 100).float().mean(1) * 4 - 2
        made[part] = Batch(target, (), {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    return made
