"""Pictures: whole, in clips, or as rows of patches with a grid beside them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from surgery.inputs.sample import Sample, find, number
from surgery.inputs.text import text_length

GRID = 4  # patches along each side where a picture comes as rows of patches


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
    """Pictures `[batch, channels, height, width]`, or in the layout that forward's other arguments tell.

    Beside a grid (`grid_thw`) there is one row per patch of all pictures; beside `spatial_shapes` or
    `pixel_position_ids` rows per picture; beside `target_sizes` the patches of a picture side by side.
    """
    channels, height, width = picture_size(sample.config)
    patch = number(sample.config, "patch_size", 16, "vision")
    frames = find(sample.config, "temporal_patch_size", None, "vision")
    row = channels * (frames if isinstance(frames, int) else 1) * patch * patch
    merges = isinstance(frames, int) and find(sample.config, "spatial_merge_size", None, "vision") is not None
    if merges or sample.accepts & {"grid_thw", "image_grid_thw"}:
        return sample.normal(GRID * GRID, row)
    if sample.accepts & {"spatial_shapes", "pixel_position_ids", "image_position_ids"}:
        return sample.normal(sample.batch, GRID * GRID, channels * patch * patch)
    if "target_sizes" in sample.accepts:
        return sample.normal(1, channels, patch, GRID * GRID * patch)
    if "image_attention_mask" in sample.accepts:
        return sample.normal(sample.batch, 1, channels, height, width)
    length = find(sample.config, "num_frames frames_per_clip", None)
    if isinstance(length, int):
        return sample.normal(sample.batch, length, channels, height, width)
    return sample.normal(sample.batch, channels, height, width)


def clips(sample: Sample) -> Tensor | None:
    """Videos `[1, frames, channels, height, width]`."""
    picture = pixels(sample)
    return picture.flatten(0, -4)[None] if picture.dim() > 3 else None


def grid(sample: Sample) -> Tensor:
    """Of one picture, its patches along time, height and width `[1, 3]`."""
    return torch.tensor([[1, GRID, GRID]])


def places(sample: Sample) -> Tensor:
    """Where each row of patches lies `[batch, patches, 2]`."""
    rows = torch.cartesian_prod(torch.arange(GRID), torch.arange(GRID)).flip(-1)
    return rows.expand(sample.batch, -1, -1).clone()


def feature_mask(sample: Sample) -> Tensor:
    """Which of the rows of patches are real `[batch, patches]`: all."""
    return torch.ones(sample.batch, GRID * GRID, dtype=torch.long)


def text_sees_picture(sample: Sample) -> Tensor:
    """Which tokens attend to which picture `[batch, length, 1]`: all to the only one."""
    return torch.ones(sample.batch, text_length(sample), 1, dtype=torch.long)


def picture_places(sample: Sample) -> Tensor:
    """Which tokens stand for a picture `[batch, length]`: as many as it has embeddings, after the first."""
    mask = torch.zeros(sample.batch, text_length(sample), dtype=torch.bool)
    mask[:, 1 : 1 + number(sample.config, "latent_query_num", 1)] = True
    return mask
