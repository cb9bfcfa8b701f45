"""Sound, as waves, spectra or latents, and time series."""

from __future__ import annotations

import torch
from torch import Tensor

from surgery.inputs.sample import Sample, find, number

_BINS = "num_mel_bins input_feat_per_channel input_feat_size feature_size input_dim"


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
    bins = number(sample.config, _BINS, 80, "audio")
    window = find(sample.config, "max_source_positions", None, "audio")
    convolved = find(sample.config, "input_feat_per_channel feature_size", None, "audio") is not None
    if isinstance(window, int) and not convolved:
        return sample.normal(sample.batch, bins, 2 * window)
    return sample.normal(sample.batch, 128, bins)


def spectrogram_mask(sample: Sample) -> Tensor:
    """Which steps of the features are real `[batch, time]`: all."""
    features = spectrogram(sample)
    bins = number(sample.config, _BINS, 80, "audio")
    time = features.shape[2] if features.shape[1] == bins and features.shape[2] != bins else features.shape[1]
    return torch.ones(sample.batch, time, dtype=torch.long)


def latents(sample: Sample) -> Tensor:
    """What a codec's encoder hands to its decoder `[batch, width, time]`."""
    return sample.normal(sample.batch, number(sample.config, "hidden_size latent_dim", 64), 16)


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
