"""Isometric nets, whose blocks map one space to itself and can be mixtures of templates.

Blocks of the CNN are inverted residuals with squeeze-and-excitation, as in the paper on compositional models. Each
function is a factory, as `surgery_recipes.isometric:cnn?layers=8` in a recipe.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

Made = tuple[nn.Module, tuple[Tensor, ...]]


class Block(nn.Module):
    """Expansion, depthwise convolution, squeeze-and-excitation, projection, added to the input.

    Args:
        channels: of input and output.
        expansion: hidden channels are so many times the channels.
    """

    def __init__(self, channels: int, expansion: int):
        super().__init__()
        hidden = channels * expansion
        self.expand = nn.Conv2d(channels, hidden, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(hidden)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False)
        self.norm2 = nn.BatchNorm2d(hidden)
        self.squeeze = nn.Conv2d(hidden, channels, 1)
        self.excite = nn.Conv2d(channels, hidden, 1)
        self.project = nn.Conv2d(hidden, channels, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, channels, H, W]` to the same."""
        found = nn.functional.hardswish(self.norm1(self.expand(x)))
        found = nn.functional.hardswish(self.norm2(self.depthwise(found)))
        gate = self.excite(self.squeeze(found.mean((2, 3), keepdim=True)).relu())
        return x + self.norm3(self.project(found * nn.functional.hardsigmoid(gate)))


class Cnn(nn.Module):
    """A stem that makes pictures smaller by `stride`, isometric blocks, and a linear head on their mean."""

    def __init__(self, layers: int, channels: int, expansion: int, classes: int, colours: int, stride: int):
        super().__init__()
        self.stem = nn.Conv2d(colours, channels, 5, stride=stride, padding=2)
        self.blocks = nn.ModuleList(Block(channels, expansion) for _ in range(layers))
        self.head = nn.Linear(channels, classes)

    def forward(self, pictures: Tensor) -> Tensor:
        """Scores `[B, classes]` of pictures `[B, colours, H, W]`."""
        x = self.stem(pictures)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


def cnn(
    layers: int = 8,
    channels: int = 24,
    expansion: int = 3,
    classes: int = 10,
    colours: int = 1,
    side: int = 28,
    stride: int = 4,
) -> Made:
    """An isometric CNN and two blank pictures."""
    net = Cnn(layers, channels, expansion, classes, colours, stride)
    return net, (torch.zeros(2, colours, side, side),)


def vit(
    layers: int = 8,
    width: int = 48,
    heads: int = 4,
    patch: int = 7,
    classes: int = 10,
    colours: int = 1,
    side: int = 28,
) -> Made:
    """A small vision transformer and two blank pictures."""
    import timm

    net = timm.models.VisionTransformer(
        img_size=side, patch_size=patch, in_chans=colours, num_classes=classes, embed_dim=width, depth=layers,
        num_heads=heads, mlp_ratio=2.0, global_pool="avg",
    )  # fmt: skip
    return net, (torch.zeros(2, colours, side, side),)
