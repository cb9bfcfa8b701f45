"""Dead leaves: made-up pictures with edges, occlusion and shapes of all sizes, as photographs have them.

Shapes of random place, colour and shade fall on one another. The number of those of radius r goes with r^-3, so that
statistics are the same at all scales (Lee, Mumford and Huang 2001, "Occlusion models for natural images"); networks
learn features of photographs from such pictures alone (Baradad et al. 2021, arXiv 2106.05963).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

SHAPES = 120  # of a picture
SMALLEST, LARGEST = 0.04, 0.5  # radius, of the picture's side
COLOUR = 0.35  # the most that channels of a shape differ by
SHADE = 0.6  # the most that brightness changes within a shape, along the picture's side
GRAIN = 0.03  # standard deviation of noise on every pixel
SIDE = 128  # pixels of a side up to which pictures are drawn; larger ones are enlarged


def dead_leaves(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Pictures `[batch, channels, height, width]`, float32 in [0, 1].

    Args:
        shape: of the batch.
        generator: everything random is drawn from it.

    Example:
        >>> pictures = dead_leaves((2, 3, 16, 16), torch.Generator().manual_seed(0))
        >>> pictures.shape, bool((pictures >= 0).all()), bool((pictures <= 1).all())
        (torch.Size([2, 3, 16, 16]), True, True)
    """
    batch, channels, height, width = shape
    small = min(height, SIDE), min(width, SIDE)
    pictures = _drawn(batch, channels, *small, generator)
    if small != (height, width):
        pictures = F.interpolate(pictures, (height, width), mode="bilinear", align_corners=False)
    return (pictures + GRAIN * torch.randn(shape, generator=generator)).clamp_(0, 1)


def _drawn(batch: int, channels: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Shapes, the last on top; ellipses and rectangles by turns."""
    y, x = torch.linspace(0, 1, height)[:, None], torch.linspace(0, 1, width)
    pictures = torch.rand(batch, 1, 1, 1, generator=generator) + _colours(batch, channels, generator)
    pictures = pictures.expand(-1, -1, height, width)
    for number in range(SHAPES):
        drawn = torch.rand(8, batch, 1, 1, generator=generator)
        across, down, turn, size, flat, grey, right, below = drawn
        # Of a density of r^-3 between both radii.
        radius = (SMALLEST**-2 - size * (SMALLEST**-2 - LARGEST**-2)).rsqrt()
        dx, dy, cos, sin = x - across, y - down, (math.pi * turn).cos(), (math.pi * turn).sin()
        along = (dx * cos + dy * sin) / radius
        beside = (dy * cos - dx * sin) / (radius * (0.3 + 0.7 * flat))
        round_one = number % 2 == 0
        inside = along**2 + beside**2 < 1 if round_one else torch.maximum(along.abs(), beside.abs()) < 1
        lit = grey + SHADE * ((right - 0.5) * dx + (below - 0.5) * dy)
        pictures = torch.where(inside[:, None], lit[:, None] + _colours(batch, channels, generator), pictures)
    return pictures


def _colours(batch: int, channels: int, generator: torch.Generator) -> Tensor:
    """How much channels of one shape of each picture differ from its brightness: `[batch, channels, 1, 1]`."""
    return COLOUR * (torch.rand(batch, channels, 1, 1, generator=generator) - 0.5)
