"""Fields: how to make a value for one forward argument of a transformers model, by the argument's name.

A new argument is one new line in `FIELDS`; names of one pattern are a line in `ENDINGS`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import surgery.inputs.pictures as pictures
import surgery.inputs.sound as sound
import surgery.inputs.text as text
from surgery.inputs.sample import Sample, number

Field = Callable[[Sample], Any]


def make(name: str, sample: Sample) -> Any:
    """A value for the argument `name`; None where nothing is known about it.

    Example:
        >>> import types
        >>> config = types.SimpleNamespace(vocab_size=50, to_dict=dict)
        >>> make("prompt_input_ids", Sample(config, torch.Generator(), torch.float32)).shape
        torch.Size([2, 16])
    """
    if name in FIELDS:
        return FIELDS[name](sample)
    return next((field(sample) for ending, field in ENDINGS.items() if name.endswith(ending)), None)


def known(name: str) -> bool:
    """Whether `make` has a value for an argument of this name."""
    return name in FIELDS or name.endswith(tuple(ENDINGS))


def _states(name: str, width: int) -> Field:
    return lambda sample: sample.normal(sample.batch, 4, number(sample.config, name, width))


FIELDS: dict[str, Field] = {
    **dict.fromkeys(("input_ids", "qformer_input_ids"), text.token_ids),
    "decoder_input_ids": text.codes,
    "attention_mask": text.ones,
    **dict.fromkeys(("token_type_ids", "mm_token_type_ids", "position_ids"), text.zeros),
    "task_inputs": text.task_ids,
    "lang_ids": lambda sample: torch.zeros(sample.batch, dtype=torch.long),
    **dict.fromkeys(("inputs_embeds", "noise_embeds", "action_embeds"), text.hidden),
    **dict.fromkeys(("query_embeds", "context_hidden_states", "decoder_input_values"), text.hidden),
    "encoder_hidden_states": text.encoded,
    "hidden_states": lambda sample: (
        pictures.pixels(sample) if "grid_thw" in sample.accepts else text.hidden(sample)
    ),
    "classes_structure": lambda sample: torch.ones(sample.batch, dtype=torch.long),
    **dict.fromkeys(("marks", "num_options"), lambda sample: torch.ones(1, 1, dtype=torch.long)),
    "question_type_ids": lambda sample: torch.zeros(1, 1, dtype=torch.long),
    **dict.fromkeys(("pixel_values", "images", "flow_pixel_values"), pictures.pixels),
    **dict.fromkeys(("prompt_pixel_values", "prompt_masks"), pictures.pixels),
    "pixel_values_videos": pictures.clips,
    **dict.fromkeys(("image_grid_thw", "grid_thw", "video_grid_thw"), pictures.grid),
    **dict.fromkeys(
        ("merge_sizes", "image_merge_sizes", "video_merge_sizes"), lambda sample: torch.tensor([1])
    ),
    "image_sizes": lambda sample: torch.tensor([pictures.picture_size(sample.config)[1:]] * sample.batch),
    "spatial_shapes": lambda sample: torch.tensor([[pictures.GRID] * 2] * sample.batch),
    "target_sizes": lambda sample: torch.tensor([[pictures.GRID] * 2]),
    "pixel_attention_mask": pictures.feature_mask,
    **dict.fromkeys(("pixel_position_ids", "image_position_ids"), pictures.places),
    "image_attention_mask": pictures.text_sees_picture,
    "image_embeds_position_mask": pictures.picture_places,
    "bbox": lambda sample: torch.zeros(sample.batch, text.text_length(sample), 4, dtype=torch.long),
    "visual_feats": _states("visual_feat_dim", 2048),
    "visual_pos": _states("visual_pos_dim", 4),
    **dict.fromkeys(("input_values", "audio_values", "waveform"), sound.waveform),
    "inputs": lambda sample: (
        sound.waveform(sample)
        if "input_values" in sample.accepts
        else sample.normal(sample.batch, 16, number(sample.config, "d_model", 64))
    ),
    **dict.fromkeys(("input_features", "audio_features", "audio_mel"), sound.spectrogram),
    **dict.fromkeys(("input_features_mask", "feature_attention_mask"), sound.spectrogram_mask),
    "audio_mel_mask": lambda sample: sound.spectrogram_mask(sample) == 0,
    "latents": sound.latents,
    "past_values": sound.history,
    "past_observed_mask": lambda sample: torch.ones_like(sound.history(sample)),
    "past_values_padding": lambda sample: torch.zeros(sound.history(sample).shape[:2], dtype=torch.long),
    "past_time_features": sound.history_features,
    "freq": lambda sample: torch.zeros(sample.batch, 1, dtype=torch.long),
    "states": _states("state_dim", 17),
    "actions": _states("act_dim", 4),
    **dict.fromkeys(("rewards", "returns_to_go"), lambda sample: sample.normal(sample.batch, 4, 1)),
    "timesteps": lambda sample: torch.arange(4).expand(sample.batch, 4).clone(),
    "flattened_patches": lambda sample: sample.normal(
        sample.batch, 32, number(sample.config, "patch_embed_hidden_size", 768, "vision") + 2
    ),
}
"""How to make the value of each argument, by its name in forward."""

ENDINGS: dict[str, Field] = {
    "_input_ids": text.token_ids,
    "_token_type_ids": text.zeros,
    "_attention_mask": text.ones,
}
"""How to make the value of an argument whose name ends so and is not in `FIELDS`."""
