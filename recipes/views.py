"""Changes of pictures in [0, 1]: other views of the same things, for several tasks from one data set."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from surgery.errors import PlanError


def _affine(pictures: Tensor, matrices: Tensor) -> Tensor:
    """Pictures seen through matrices `[B, 2, 3]` from output to input, black beyond their edges."""
    grid = F.affine_grid(matrices, list(pictures.shape), align_corners=False)
    return F.grid_sample(pictures, grid, align_corners=False, padding_mode="zeros")


def _identity(count: int) -> Tensor:
    return torch.eye(2, 3).expand(count, 2, 3).clone()


def shear(pictures: Tensor) -> Tensor:
    """Each sheared sideways, by up to 0.8 of its height."""
    matrices = _identity(len(pictures))
    matrices[:, 0, 1] = 1.6 * torch.rand(len(pictures)) - 0.8
    return _affine(pictures, matrices)


def scale(pictures: Tensor) -> Tensor:
    """Each made smaller, to 0.5 to 1 of its size."""
    return _affine(pictures, _identity(len(pictures)) / (0.5 + 0.5 * torch.rand(len(pictures), 1, 1)))


def shot(pictures: Tensor) -> Tensor:
    """Shot noise, as of few photons: Poisson numbers of mean 5 for white."""
    return (torch.poisson(pictures.clamp_min(0) * 5) / 5).clamp_max(1)


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda pictures: pictures,
    "rotated": lambda pictures: pictures.rot90(1, (2, 3)),
    "inverted": lambda pictures: 1 - pictures,
    "shear": shear,
    "scale": scale,
    "shot": shot,
}


def see(pictures: Tensor, views: str) -> Tensor:
    """Pictures `[B, 1, H, W]` in [0, 1] through views, one after the other, such as `rotated+shear`.

    What is random in them is drawn from torch's global generator.

    Raises:
        PlanError: for a view that is not known.
    """
    for view in views.split("+"):
        if view not in VIEWS:
            raise PlanError(f"The option view must be of {', '.join(VIEWS)}, joined by +, found '{view}'.")
        pictures = VIEWS[view](pictures)
    return pictures
