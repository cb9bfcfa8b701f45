"""Values for one forward argument of a transformers model, from its configuration alone.

A new argument is one new line in `FIELDS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """What an argument's value depends on.

    Attributes:
        config: the model's transformers configuration.
        generator: seeded; every random value comes from it.
        dtype: of floating-point values.
        batch: examples.
        length: tokens of text.
    """

    config: Any
    generator: torch.Generator
    dtype: torch.dtype
    batch: int = 2
    length: int = 16

    def normal(self, *shape: int) -> Tensor:
        """Small normal values."""
        return (0.1 * torch.randn(shape, generator=self.generator)).to(self.dtype)


def configs(config: Any, prefer: str = "") -> Iterator[Any]:
    """A configuration and the ones nested in it, those whose name holds a word of `prefer` first."""
    nested = [(key, value) for key, value in vars(config).items() if hasattr(value, "to_dict")]
    words = prefer.split()
    first = [value for key, value in nested if any(word in key for word in words)]
    for value in first:
        yield from configs(value, prefer)
    yield config
    for _, value in nested:
        if not any(value is other for other in first):
            yield from configs(value, prefer)


def find(config: Any, names: str, default: Any, prefer: str = "") -> Any:
    """The first of the attributes `names` that a configuration or one nested in it has."""
    for part in configs(config, prefer):
        for name in names.split():
            value = getattr(part, name, None)
            if value is not None and not callable(value):
                return value
    return default


def number(config: Any, names: str, default: int, prefer: str = "") -> int:
    """Like `find`, a whole number; of a list its first."""
    value = find(config, names, default, prefer)
    if isinstance(value, (list, tuple)) and value:
        value = value[0]
    return int(value) if isinstance(value, (int, float)) else default


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


def picture_size(config: Any) -> tuple[int, int, int]:
    """Channels, height and width."""
    channels = number(config, "num_channels in_channels in_chans num_input_channels", 3, "vision image")
    size = find(config, "image_size img_size input_size crop_size", 224, "vision image")
    if isinstance(size, dict):
        size = (
            size.get("height", size.get("shortest_edge", 224)),
            size.get("width", size.get("shortest_edge", 224)),
        )
    if isinstance(size, (list, tuple)) and size and isinstance(size[0], int):
        return channels, int(size[0]), int(size[-1])
    side = int(size) if isinstance(size, (int, float)) else 224
    return channels, side, side


def pixels(sample: Sample) -> Tensor:
    """Pictures `[batch, channels, height, width]`, or one row per patch where the model takes a grid."""
    channels, height, width = picture_size(sample.config)
    frames = find(sample.config, "temporal_patch_size", None, "vision")
    patch = number(sample.config, "patch_size", 16, "vision")
    if isinstance(frames, int) and find(sample.config, "spatial_merge_size", None, "vision") is not None:
        return sample.normal(16, channels * frames * patch * patch)
    length = find(sample.config, "num_frames frames_per_clip", None)
    if isinstance(length, int):
        return sample.normal(sample.batch, length, channels, height, width)
    return sample.normal(sample.batch, channels, height, width)


def waveform(sample: Sample) -> Tensor:
    """One second of sound `[batch, time]`; a spectrogram or channels where the model takes them."""
    bins = find(sample.config, "num_mel_bins", None)
    if isinstance(bins, int):
        return sample.normal(sample.batch, number(sample.config, "max_length", 1024), bins)
    channels = find(sample.config, "audio_channels", None)
    if isinstance(channels, int):
        return sample.normal(sample.batch, channels, 16000)
    return sample.normal(sample.batch, 16000)


def spectrogram(sample: Sample) -> Tensor:
    """Log-mel features: `[batch, bins, time]` for models with a fixed window, else `[batch, time, bins]`."""
    bins = number(sample.config, "num_mel_bins input_feat_per_channel feature_size input_dim", 80, "audio")
    window = find(sample.config, "max_source_positions", None, "audio")
    convolved = find(sample.config, "input_feat_per_channel feature_size", None, "audio") is not None
    if isinstance(window, int) and not convolved:
        return sample.normal(sample.batch, bins, 2 * window)
    return sample.normal(sample.batch, 128, bins)


def hidden(sample: Sample) -> Tensor:
    """Embeddings `[batch, length, width]`."""
    width = number(sample.config, "hidden_size d_model n_embd dim embed_dim", 64, "text")
    return sample.normal(sample.batch, text_length(sample), width)


def history(sample: Sample) -> Tensor:
    """Past values of a time series `[batch, time, channels]`; `[batch, time]` for one channel with lags."""
    lags = find(sample.config, "lags_sequence", None)
    length = number(sample.config, "context_length prediction_length", 32)
    if isinstance(lags, (list, tuple)):
        size = number(sample.config, "input_size", 1)
        shape = (sample.batch, length + max(lags, default=0))
        return sample.normal(*shape) if size == 1 else sample.normal(*shape, size)
    return sample.normal(sample.batch, length, number(sample.config, "num_input_channels", 1))


def history_features(sample: Sample) -> Tensor:
    """Time features beside past values."""
    past = history(sample)
    return sample.normal(past.shape[0], past.shape[1], number(sample.config, "num_time_features", 1) or 1)


def ones(sample: Sample) -> Tensor:
    """A mask that hides nothing `[batch, length]`."""
    return torch.ones(sample.batch, text_length(sample), dtype=torch.long)


def zeros(sample: Sample) -> Tensor:
    """Type or position ids that are all the first `[batch, length]`."""
    return torch.zeros(sample.batch, text_length(sample), dtype=torch.long)


FIELDS: dict[str, Callable[[Sample], Any]] = {
    **dict.fromkeys(("input_ids", "decoder_input_ids", "text_input_ids", "qformer_input_ids"), token_ids),
    **dict.fromkeys(("attention_mask", "decoder_attention_mask", "text_attention_mask"), ones),
    **dict.fromkeys(("token_type_ids", "position_ids"), zeros),
    **dict.fromkeys(("pixel_values", "images", "flow_pixel_values"), pixels),
    "pixel_values_videos": lambda sample: (
        pixels(sample).flatten(0, -4)[None] if pixels(sample).dim() > 3 else None
    ),
    **dict.fromkeys(
        ("image_grid_thw", "grid_thw", "video_grid_thw"), lambda sample: torch.tensor([[1, 4, 4]])
    ),
    **dict.fromkeys(("input_values", "audio_values", "waveform"), waveform),
    **dict.fromkeys(("input_features", "audio_features"), spectrogram),
    **dict.fromkeys(
        ("inputs_embeds", "decoder_inputs_embeds", "encoder_hidden_states", "hidden_states"), hidden
    ),
    "bbox": lambda sample: torch.zeros(sample.batch, text_length(sample), 4, dtype=torch.long),
    "spatial_shapes": lambda sample: torch.tensor([[4, 4]] * sample.batch),
    "pixel_attention_mask": lambda sample: torch.ones(sample.batch, 16, dtype=torch.long),
    **dict.fromkeys(
        ("input_features_mask", "feature_attention_mask"),
        lambda sample: torch.ones(sample.batch, spectrogram(sample).shape[1], dtype=torch.long),
    ),
    "query_embeds": hidden,
    "merge_sizes": lambda sample: torch.tensor([1]),
    "visual_feats": lambda sample: sample.normal(
        sample.batch, 4, number(sample.config, "visual_feat_dim", 2048)
    ),
    "visual_pos": lambda sample: sample.normal(sample.batch, 4, number(sample.config, "visual_pos_dim", 4)),
    **dict.fromkeys(("task_inputs", "classes_input_ids", "tasks_input_ids"), token_ids),
    **dict.fromkeys(("prompt_pixel_values", "prompt_masks"), pixels),
    "states": lambda sample: sample.normal(sample.batch, 4, number(sample.config, "state_dim", 17)),
    "actions": lambda sample: sample.normal(sample.batch, 4, number(sample.config, "act_dim", 4)),
    **dict.fromkeys(("rewards", "returns_to_go"), lambda sample: sample.normal(sample.batch, 4, 1)),
    "timesteps": lambda sample: torch.arange(4).expand(sample.batch, 4).clone(),
    "inputs": lambda sample: sample.normal(sample.batch, 16, number(sample.config, "d_model", 64)),
    "past_values_padding": lambda sample: torch.zeros(history(sample).shape[:2], dtype=torch.long),
    "freq": lambda sample: torch.zeros(sample.batch, 1, dtype=torch.long),
    "past_values": history,
    "past_observed_mask": lambda sample: torch.ones_like(history(sample)),
    "past_time_features": history_features,
    "flattened_patches": lambda sample: sample.normal(
        sample.batch, 32, number(sample.config, "patch_embed_hidden_size", 768, "vision") + 2
    ),
}
"""How to make the value of each argument, by its name in forward."""
