"""The codec of tensors rounded to bfloat16."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from surgery.storage.codecs.codec import Codec, Encoded, Layout, Precision, Statistics
from surgery.util.memory import compact

BFLOAT16 = Precision("bfloat16")


class BFloat16(Codec[None]):
    """Half of float32's bytes, with 8 significant bits."""

    name = BFLOAT16.name

    def encode(
        self, tensor: Tensor, settings: None = None, statistics: Statistics | None = None
    ) -> Mapping[str, Tensor]:
        """Each value rounded to the nearest."""
        return {"bf16": tensor.bfloat16()}

    def decode(self, encoded: Encoded) -> Tensor:
        """The rounded values in the tensor's dtype."""
        return compact(encoded.parts["bf16"].to(encoded.dtype))

    def layout(self, shape: tuple[int, ...], dtype: torch.dtype, settings: None = None) -> Layout:
        """One part of the same shape."""
        return {"bf16": (torch.bfloat16, shape)}

    def ladder(self, tensors: Sequence[Tensor]) -> tuple[None, ...]:
        """Worth trying where some tensor gets smaller."""
        return (None,) if any(tensor.element_size() > 2 for tensor in tensors) else ()

    def has_streams(self, settings: None = None) -> bool:
        """Exponents of weights are alike."""
        return True

    def streams(self, encoded: Encoded) -> list[Tensor]:
        """The lower bytes of all values, then the higher ones: sign and exponent."""
        return split_bytes(encoded.parts["bf16"])

    def stream_sizes(self, shape: tuple[int, ...], dtype: torch.dtype, settings: None = None) -> list[int]:
        """A byte of each value in each of the two."""
        return [math.prod(shape)] * 2

    def from_streams(
        self, streams: Sequence[Tensor], shape: tuple[int, ...], dtype: torch.dtype, settings: None = None
    ) -> Mapping[str, Tensor]:
        """Lower and higher bytes together."""
        return {"bf16": joined_bytes(*streams).view(shape)}

    def span(self, settings: None = None) -> int:
        """Every value by itself."""
        return 1


def split_bytes(values: Tensor) -> list[Tensor]:
    """The lower and the higher bytes of bfloat16 values.

    Example:
        >>> [part.tolist() for part in split_bytes(torch.tensor([1.0, -2.0], dtype=torch.bfloat16))]
        [[128, 0], [63, 192]]
    """
    pairs = values.contiguous().reshape(-1).view(torch.uint8).view(-1, 2)
    return [pairs[:, 0].contiguous(), pairs[:, 1].contiguous()]


def joined_bytes(low: Tensor, high: Tensor) -> Tensor:
    """The inverse of `split_bytes`, flat."""
    return torch.stack([low, high], 1).view(-1).view(torch.bfloat16)
