"""The codec of tensors as they are, in their own dtype: one part, without a name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from surgery.storage.codecs.codec import NATIVE, Codec, Encoded, Layout, Statistics
from surgery.util.memory import compact


class Native(Codec[None]):
    """Every tensor as it is; lossless for all dtypes."""

    name = NATIVE.name

    def encode(
        self, tensor: Tensor, settings: None = None, statistics: Statistics | None = None
    ) -> Mapping[str, Tensor]:
        """The tensor itself."""
        return {"": tensor}

    def decode(self, encoded: Encoded) -> Tensor:
        """The tensor itself, or a copy where its storage holds more."""
        return compact(encoded.parts[""])

    def layout(self, shape: tuple[int, ...], dtype: torch.dtype, settings: None = None) -> Layout:
        """One part of the same shape and dtype."""
        return {"": (dtype, shape)}

    def ladder(self, tensors: Sequence[Tensor]) -> tuple[None, ...]:
        """The one way of storing a tensor as it is, which every fit tries."""
        return (None,)

    def span(self, settings: None = None) -> int:
        """1: every value is stored by itself."""
        return 1
