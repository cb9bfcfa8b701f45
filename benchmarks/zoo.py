"""Real pretrained models from installed packages, found without importing them, and tiny ones instead."""

from __future__ import annotations

from pathlib import Path

import torch
from surgery_cli.demo_weights import (
    EFFICIENTNET,
    EFFICIENTNET_SHA256,
    MINILM,
    MINILM_SHA256,
    known_file,
    to_timm_names,
)

from surgery import Member, load_member

TINY_BERT = {
    "model_type": "bert", "architectures": ["BertModel"], "vocab_size": 30522, "hidden_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128,
}  # fmt: skip
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json")


def minilm_folder() -> Path:
    """The folder of all-MiniLM-L6-v2, as transformers reads it."""
    return known_file(*MINILM, MINILM_SHA256).parent


def minilm() -> Member:
    """all-MiniLM-L6-v2."""
    return load_member(str(minilm_folder()), name="minilm")


def efficientnet() -> Member:
    """EfficientNet-Lite0 as timm's architecture, with its ImageNet weights."""
    import timm

    from surgery.members.origins.weights import read_weights

    net = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    net.load_state_dict(to_timm_names(read_weights(known_file(*EFFICIENTNET, EFFICIENTNET_SHA256))))
    return load_member(net, name="efficientnet")


def tiny_text(folder: Path, seed: int = 0) -> Member:
    """A two-layer BERT with random weights and MiniLM's tokenizer."""
    return load_member(str(tiny_text_folder(folder, seed)), name="minilm")


def tiny_text_folder(folder: Path, seed: int = 0) -> Path:
    """Write the tiny BERT as a transformers folder.

    Args:
        folder: where it goes; made if need be.
        seed: of its weights.
    """
    from transformers import BertConfig, BertModel
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        BertModel(BertConfig.from_dict(TINY_BERT)).save_pretrained(folder)
    source = minilm_folder()
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            (folder / name).write_bytes((source / name).read_bytes())
    return folder


def tiny_vision(seed: int = 0) -> Member:
    """timm's smallest EfficientNet, with random weights."""
    import timm

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = timm.create_model("test_efficientnet", pretrained=False)
    return load_member(net, name="efficientnet")
