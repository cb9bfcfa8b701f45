"""The codec of tensors rounded to bfloat16."""

from __future__ import annotations

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

    def span(self, settings: None = None) -> int:
        """Every value by itself."""
        return 1
