"""Text: token ids, masks, embeddings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from surgery.inputs.sample import Sample, configs, find, number


def vocabulary(config: Any) -> Tensor:
    """All token ids that are neither special nor outside the vocabulary, ascending."""
    size = number(config, "vocab_size", 100, "text decoder")
    special = {
        value
        for part in configs(config)
        for key, value in vars(part).items()
        if key.endswith(("token_id", "token_index")) and isinstance(value, int)
    }
    usual = [token for token in range(min(5, size - 1), size) if token not in special]
    return torch.tensor(usual or [0])


def token_ids(sample: Sample) -> Tensor:
    """Random ordinary ids `[batch, length]`, closed with the end token where heads may look for it."""
    allowed = vocabulary(sample.config)
    ids = allowed[
        torch.randint(len(allowed), (sample.batch, text_length(sample)), generator=sample.generator)
    ]
    end = end_token(sample.config)
    if end is not None:
        ids[:, -1] = end
    return ids


def end_token(config: Any) -> int | None:
    """The id that must close a text: encoder-decoders and models with a text tower pool at its place."""
    pools = getattr(config, "is_encoder_decoder", False) or getattr(config, "text_config", None) is not None
    end = find(config, "eos_token_id", None, "text") if pools else None
    known = isinstance(end, int) and 0 <= end < number(config, "vocab_size", 100, "text decoder")
    return end if known else None


def text_length(sample: Sample) -> int:
    """Tokens, no more than the model has positions for (two are lost to padding offsets)."""
    most = number(sample.config, "max_position_embeddings n_positions n_ctx", 1 << 20, "text")
    return max(1, min(sample.length, most - 2)) if most > 2 else 1


def task_ids(sample: Sample) -> Tensor:
    """Ids of a task's name `[batch, length]`, as long as the configuration says."""
    length = number(sample.config, "task_seq_len", text_length(sample))
    return torch.ones(sample.batch, length, dtype=torch.long)


def codes(sample: Sample) -> Tensor:
    """Ids of a decoder; `[batch, length, channels]` where it reads several streams at once."""
    channels = find(getattr(sample.config, "decoder_config", sample.config), "num_channels", None)
    ids = token_ids(sample)
    speaks = getattr(sample.config, "delay_pattern", None) is not None
    return ids[..., None].expand(*ids.shape, channels).clone() if speaks and channels else ids


def hidden(sample: Sample) -> Tensor:
    """Embeddings `[batch, length, width]`."""
    width = number(sample.config, "hidden_size d_model n_embd dim embed_dim", 64, "text")
    return sample.normal(sample.batch, text_length(sample), width)


def encoded(sample: Sample) -> Tensor:
    """What an encoder gives to a decoder `[batch, length, width]`."""
    width = number(sample.config, "encoder_hidden_size cross_attention_hidden_size", 0)
    return sample.normal(sample.batch, text_length(sample), width) if width else hidden(sample)


def ones(sample: Sample) -> Tensor:
    """A mask that hides nothing `[batch, length]`."""
    return torch.ones(sample.batch, text_length(sample), dtype=torch.long)


def zeros(sample: Sample) -> Tensor:
    """Type or position ids that are all the first `[batch, length]`."""
    return torch.zeros(sample.batch, text_length(sample), dtype=torch.long)
