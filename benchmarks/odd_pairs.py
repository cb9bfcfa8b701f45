"""Nets of the pairs in `benchmarks/pairs`: small ones of transformers' architectures, and a perceptron for tables.

    python -m benchmarks.joint_tables --table crossmodal --recipe benchmarks/pairs/vit_gpt.yaml --methods single own=0.3

Each function is a factory, as a recipe names it; weights are drawn by the recipe's seed. Widths are multiples of 16.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

Made = tuple[nn.Module, tuple[Tensor, ...]]
WIDTH = 64


def vit() -> Made:
    """A vision transformer for pictures `[B, 1, 28, 28]`, seen as 16 patches."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=28, patch_size=7, num_channels=1, hidden_size=WIDTH, num_hidden_layers=3,
        num_attention_heads=4, intermediate_size=2 * WIDTH,
    )  # fmt: skip
    config.num_labels = 10
    return ViTForImageClassification(config), (torch.zeros(2, 1, 28, 28),)


def gpt(words: int = 2000) -> Made:
    """A GPT-2 of two layers that scores the next word at every place of `[B, T]` words."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=words, n_positions=64, n_embd=WIDTH, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0,
        use_cache=False,
    )  # fmt: skip
    return GPT2LMHeadModel(config), (torch.zeros(2, 5, dtype=torch.long),)


def convnext() -> Made:
    """A ConvNeXt of two stages for pictures `[B, 1, 28, 28]`."""
    from transformers import ConvNextConfig, ConvNextForImageClassification

    config = ConvNextConfig(
        num_channels=1, patch_size=4, num_stages=2, hidden_sizes=[32, WIDTH], depths=[2, 2], image_size=28,
        layer_scale_init_value=0.1,
    )  # fmt: skip
    config.num_labels = 10
    return ConvNextForImageClassification(config), (torch.zeros(2, 1, 28, 28),)


def resnet() -> Made:
    """A ResNet of two stages for pictures `[B, 1, 28, 28]`, with batch norms."""
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        num_channels=1, embedding_size=32, hidden_sizes=[32, WIDTH], depths=[1, 1], layer_type="basic",
    )  # fmt: skip
    config.num_labels = 10
    return ResNetForImageClassification(config), (torch.zeros(2, 1, 28, 28),)


class ReadingBert(nn.Module):
    """A BERT of two layers that reads one-hot DNA `[B, 4, T]`.

    Args:
        width: of its hidden state.
        classes: scores in the output.
    """

    def __init__(self, width: int = WIDTH, classes: int = 3):
        super().__init__()
        from transformers import BertConfig, BertModel

        config = BertConfig(
            vocab_size=8, hidden_size=width, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=2 * width, max_position_embeddings=64,
        )  # fmt: skip
        self.stem = nn.Linear(4, width)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.output = nn.Linear(width, classes)

    def forward(self, bases: Tensor) -> Tensor:
        """Scores `[B, classes]`."""
        hidden = self.bert(inputs_embeds=self.stem(bases.transpose(1, 2))).last_hidden_state
        return self.output(hidden.mean(1))


def bert() -> Made:
    """A `ReadingBert` and two sequences of 60 bases."""
    return ReadingBert(), (torch.zeros(2, 4, 60),)


def perceptron(classes: int = 2) -> Made:
    """Four layers for examples `[B, 64]` of a table."""
    widths = (64, 2 * WIDTH, WIDTH, WIDTH)
    layers: list[nn.Module] = []
    for into, out in pairwise(widths):
        layers += [nn.Linear(into, out), nn.ReLU(), nn.Dropout(0.2)]
    return nn.Sequential(*layers, nn.Linear(WIDTH, classes)), (torch.zeros(2, 64),)
