"""What a codec is, the values that name one and hold what it made, and the registry of codecs by name.

A *codec* is a way of storing a tensor, a *precision* is a codec with its settings, as choices and manifests hold it,
and an *encoded* tensor is what is stored. A codec stores every row of a tensor, which is what an index of its first
axis gives, independently of the other rows; a vector is one row.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

Settings = TypeVar("Settings", bound=Hashable)
Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Dtype and shape of each part of an encoded tensor, by name; a length that depends on the values is `ANY_LENGTH`."""
ANY_LENGTH = -1


@dataclass(frozen=True)
class Statistics:
    """What is known of the inputs of the linear map that a tensor is.

    Attributes:
        second_moment: mean of `x x^T` over the inputs x, `[in, in]`, float32; None where it is not known.
        count: number of inputs x that the mean is over.
        rows: what an error of each row counts, `[out]`, in any unit; None where all count the same.
        outputs: mean of `g g^T` over the gradients g at its outputs, `[out, out]`, float32, in any unit; None where it
            is not known.
    """

    second_moment: Tensor | None
    count: int
    rows: Tensor | None = None
    outputs: Tensor | None = None


@dataclass(frozen=True)
class Precision:
    """A codec, by name, with settings: how a tensor is stored.

    Attributes:
        name: of the codec.
        settings: its own, a value that can be compared and hashed; None for a codec that has none.

    Example:
        >>> precision = Precision.parse("int4/64")
        >>> precision.name, precision.settings, str(precision)
        ('int', Grouping(bits=4, group=64), 'int4/64')
    """

    name: str
    settings: Any = None

    def __str__(self) -> str:
        return self.name + self.codec.write(self.settings)

    @classmethod
    def parse(cls, text: str) -> Precision:
        """Read what `str` wrote.

        Raises:
            ValueError: where the text names no registered codec, or settings that the codec does not have.
        """
        codec = next((each for name, each in CODECS.items() if text.startswith(name)), None)
        try:
            if codec is not None:
                return cls(codec.name, codec.read(text.removeprefix(codec.name)))
        except ValueError:
            pass
        *first, last = [each.form for each in CODECS.values()]
        raise ValueError(f"'{text}' is not a precision: {', '.join(first)} or {last}")

    @property
    def codec(self) -> Codec[Any]:
        """The codec of this name.

        Raises:
            ValueError: where none is registered.
        """
        if self.name not in CODECS:
            raise ValueError(
                f"codec must be one of {', '.join(CODECS)}, found '{self.name}'; import the module that registers it"
            )
        return CODECS[self.name]

    @property
    def is_native(self) -> bool:
        """Whether tensors are stored as they are, in their own dtype."""
        return self.name == NATIVE.name

    @property
    def shown(self) -> str:
        """What it does to values, as reports and pictures say it."""
        return self.codec.shown(self.settings)


NATIVE = Precision("native")
"""Every tensor in its own dtype; the only precision of tensors that hold no real numbers."""


@dataclass(frozen=True)
class Encoded:
    """A stored tensor: its precision, what it decodes to, and the tensors that hold it."""

    precision: Precision
    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: Mapping[str, Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.numel() * part.element_size() for part in self.parts.values())


class Codec(ABC, Generic[Settings]):
    """A way of storing floating-point tensors.

    Tensors that a codec is asked to store have axes and are not empty, and all their values are finite and below
    `surgery.storage.codecs.LARGEST`: others are always stored natively.

    Attributes:
        name: as it is registered, lower-case; the beginning of every precision's text.
        form: the text of its precisions, as errors say it; by default the name.
    """

    name: str
    form: str

    def __init_subclass__(cls) -> None:
        if "name" in cls.__dict__ and "form" not in cls.__dict__:
            cls.form = cls.name

    @abstractmethod
    def encode(
        self, tensor: Tensor, settings: Settings, statistics: Statistics | None = None
    ) -> Mapping[str, Tensor]:
        """The parts of a stored tensor by name, in the dtypes and shapes that `layout` gives.

        Args:
            tensor: any shape and floating dtype, without gradient.
            settings: of this codec.
            statistics: of the tensor's inputs, where they are known.
        """

    def encode_together(
        self, tensors: Sequence[Tensor], settings: Sequence[Settings], statistics: Statistics | None
    ) -> list[Mapping[str, Tensor]]:
        """About what `encode` makes of each of some tensors whose inputs are the same; by default exactly that.

        Args:
            tensors: as of `encode`.
            settings: of each.
            statistics: of the inputs of all.
        """
        return [self.encode(*each, statistics) for each in zip(tensors, settings, strict=True)]

    @abstractmethod
    def decode(self, encoded: Encoded) -> Tensor:
        """The tensor that `encoded` stands for, in its shape and dtype, in a storage that holds nothing else.

        Where `layout` is the same for two dtypes, parts that one of them was encoded to also decode to the other.
        """

    def decoder(self, encoded: Encoded) -> Callable[[], Tensor]:
        """What gives `decode(encoded)` again and again, with what depends on sizes alone made once; by default nothing.

        Args:
            encoded: by this codec; it is kept, and nothing else that takes memory worth mentioning.
        """
        return partial(self.decode, encoded)

    @abstractmethod
    def layout(self, shape: tuple[int, ...], dtype: torch.dtype, settings: Settings) -> Layout:
        """Dtype and shape of every part that `encode` makes of such a tensor."""

    def take_rows(self, encoded: Encoded, rows: Tensor) -> Mapping[str, Tensor]:
        """The parts of `decode(encoded)[rows]`, without encoding anew; by default the rows of each part.

        Args:
            encoded: by this codec.
            rows: int64 `[R]`, indices along the first axis.

        Raises:
            ValueError: where the tensor has no rows to take.
        """
        if any(part.shape[:1] != encoded.shape[:1] for part in encoded.parts.values()):
            raise ValueError(f"{encoded.precision} of a tensor of shape {encoded.shape} has no rows to take")
        return {name: part[rows] for name, part in encoded.parts.items()}

    def stack_rows(self, encoded: Sequence[Encoded]) -> Mapping[str, Tensor]:
        """The parts of the rows of several tensors, one after the other; by default each part's, likewise.

        Args:
            encoded: by this codec, with the same settings.

        Raises:
            ValueError: where a tensor has no rows.
        """
        for each in encoded:
            if any(part.shape[:1] != each.shape[:1] for part in each.parts.values()):
                raise ValueError(f"{each.precision} of a tensor of shape {each.shape} has no rows to stack")
        return {name: torch.cat([each.parts[name] for each in encoded]) for name in encoded[0].parts}

    def of_rows(self, encoded: Encoded, rows: Tensor) -> Settings:
        """The settings of what `take_rows` gives; by default those of the whole."""
        return encoded.precision.settings

    def write(self, settings: Settings) -> str:
        """Settings as text that follows the codec's name in a manifest; what follows a `/` is not shown in pictures."""
        return ""

    def read(self, text: str) -> Settings:
        """The inverse of `write`.

        Raises:
            ValueError: where the text names no settings of this codec.
        """
        if text:
            raise ValueError(f"codec {self.name} must have no settings, found '{text}'")
        return None  # type: ignore[return-value]

    def ladder(self, tensors: Sequence[Tensor]) -> tuple[Settings, ...]:
        """Settings that a fit tries for tensors that it stores alike, the finest first; by default none."""
        return ()

    def shown(self, settings: Settings) -> str:
        """What it does to values, as reports and pictures say it; by default the precision's text."""
        return self.name + self.write(settings)

    def expected_bytes(self, shape: tuple[int, ...], dtype: torch.dtype, settings: Settings) -> int:
        """Bytes of all parts that `encode` makes of such a tensor, about where they depend on the values."""
        return sum(
            math.prod(size) * kind.itemsize for kind, size in self.layout(shape, dtype, settings).values()
        )

    def pieces(self, shape: tuple[int, ...], settings: Settings) -> list[tuple[Precision, tuple[int, ...]]]:
        """Precisions and shapes that a tensor is stored as; by default one, itself."""
        return [(Precision(self.name, settings), shape)]

    def has_streams(self, settings: Settings) -> bool:
        """Whether `streams` says how what is stored can be coded in fewer bytes; by default not."""
        return False

    def streams(self, encoded: Encoded) -> list[Tensor]:
        """What is stored, as flat uint8 tensors: bytes of one of them are alike, and some of them frequent."""
        raise NotImplementedError(f"codec {self.name} has no streams")

    def stream_sizes(self, shape: tuple[int, ...], dtype: torch.dtype, settings: Settings) -> list[int]:
        """Bytes of each stream of such a tensor."""
        raise NotImplementedError(f"codec {self.name} has no streams")

    def from_streams(
        self, streams: Sequence[Tensor], shape: tuple[int, ...], dtype: torch.dtype, settings: Settings
    ) -> Mapping[str, Tensor]:
        """The inverse of `streams`: parts by name."""
        raise NotImplementedError(f"codec {self.name} has no streams")

    def decode_streams(
        self, streams: Sequence[Tensor], shape: tuple[int, ...], dtype: torch.dtype, settings: Settings
    ) -> Tensor:
        """What `decode` makes of the parts of streams.

        Raises:
            ValueError: where `fault` finds something wrong with the parts.
        """
        parts = self.from_streams(streams, shape, dtype, settings)
        if fault := self.fault(parts):
            raise ValueError(fault)
        return self.decode(Encoded(Precision(self.name, settings), shape, dtype, parts))

    def span(self, settings: Settings) -> int:
        """Values along a row that are stored independently of its other values; 0 for a whole row."""
        return 0

    def fault(self, parts: Mapping[str, Tensor]) -> str:
        """What is wrong with parts that were read from a file and have the right layout, as words after "with"."""
        return ""


CODECS: dict[str, Codec[Any]] = {}
"""All codecs by name, in the order in which a fit tries them."""


def register(codec: Codec[Any]) -> None:
    """Make a codec known by its name: precisions of it can be stored, written and read from then on.

    A codec of the same class replaces the one that it was registered as before.

    Raises:
        ValueError: where the name is not made of lower-case letters, digits and `_`, or begins with another
            codec's name or begins another's, so that the text of a precision would be ambiguous.
    """
    name = codec.name
    if not (name.replace("_", "").isascii() and name.replace("_", "").isalnum() and name == name.lower()):
        raise ValueError(
            f"a codec's name must be of lower-case letters, digits and _, found '{name}'; rename it"
        )
    others = [each for each in CODECS if each != name or type(CODECS[each]) is not type(codec)]
    if clash := [each for each in others if each.startswith(name) or name.startswith(each)]:
        raise ValueError(
            f"no codec's name may begin another's, found '{name}' beside '{clash[0]}'; rename the new one"
        )
    CODECS[name] = codec
