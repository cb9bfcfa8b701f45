"""The codec of Huffman-coded tensors: what another codec stores, in fewer bytes and without loss.

Codes of rounded weights are not equally frequent: most lie near zero. Short words for frequent codes save 5 to 9% of
their bytes, and a third of the bytes of their scales. Codes of up to 4 bits are coded as many together as a byte holds,
without which whole bits for each of a few codes would leave little of that.

What is written is Deflate (RFC 1951) with Huffman codes alone, 1% from the entropy, or one run. It is read at 2 ns a
code, where an arithmetic coder (constriction 0.5) took 35.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

try:
    from isal import isal_zlib as inflate  # twice as fast
except ImportError:  # no wheel for this platform
    import zlib as inflate

from surgery.errors import UndecodableError
from surgery.storage.codecs.codec import ANY_LENGTH, Codec, Encoded, Layout, Precision, Statistics

PART = "z"
_FAULTS: Any = (ValueError, zlib.error, inflate.error)  # of bytes that are no stream
_RAW = -zlib.MAX_WBITS  # Deflate without a header and a checksum: files have theirs
_TYPICAL = (512, 1024)  # of a tensor by whose bytes others are foretold
_TABLE = 60  # bytes that code lengths take, about, in all streams of a tensor
_HEAD = 1 << 16  # bytes in which all lengths are
_NAME = 64  # bytes of a part's entry in a file's header, about


class Huffman(Codec[Precision]):
    """What another codec stores, Huffman-coded; its settings are the other precision."""

    name = "huffman"
    form = "huffman:PRECISION of int, mixed or bfloat16"

    def encode(
        self, tensor: Tensor, settings: Precision, statistics: Statistics | None = None
    ) -> Mapping[str, Tensor]:
        """One part `z`: for every stream of the other codec its length, then all of them."""
        parts = settings.codec.encode(tensor, settings.settings, statistics)
        return self._pack(Encoded(settings, tuple(tensor.shape), tensor.dtype, parts))

    def decode(self, encoded: Encoded) -> Tensor:
        """What the other codec makes of its streams.

        Raises:
            ArtifactError: where the bytes are no such streams.
        """
        return self.decode_inflated(encoded, self.inflate(encoded))

    @staticmethod
    def inflated_bytes(encoded: Encoded) -> int:
        """Bytes that `inflate` gives."""
        inner: Precision = encoded.precision.settings
        return sum(inner.codec.stream_sizes(encoded.shape, encoded.dtype, inner.settings))

    @staticmethod
    def inflate(encoded: Encoded) -> list[Tensor]:
        """The streams of the other codec; the first half of `decode`, which takes most of its time without Python.

        Raises:
            ArtifactError: where the bytes are no such streams.
        """
        inner: Precision = encoded.precision.settings
        sizes = inner.codec.stream_sizes(encoded.shape, encoded.dtype, inner.settings)
        content = encoded.parts[PART].cpu().contiguous().numpy().data
        try:
            spans = _split(content, len(content))
            if len(spans) != len(sizes):
                raise ValueError(f"{len(spans)} streams where {inner} has {len(sizes)}")
            return [
                _stream(content[start:stop], size, raw)
                for (start, stop, raw), size in zip(spans, sizes, strict=True)
            ]
        except _FAULTS as error:
            raise _damaged(encoded, error) from error

    @staticmethod
    def decode_inflated(encoded: Encoded, streams: Sequence[Tensor]) -> Tensor:
        """What the other codec makes of its streams; the second half of `decode`.

        Raises:
            ArtifactError: where it can make nothing of them.
        """
        inner: Precision = encoded.precision.settings
        try:
            value = inner.codec.decode_streams(streams, encoded.shape, encoded.dtype, inner.settings)
        except ValueError as error:
            raise _damaged(encoded, error) from error
        return value.to(encoded.parts[PART].device)

    def layout(self, shape: tuple[int, ...], dtype: torch.dtype, settings: Precision) -> Layout:
        """A vector of bytes; how many depends on the values."""
        settings.codec.layout(shape, dtype, settings.settings)
        return {PART: (torch.uint8, (ANY_LENGTH,))}

    def take_rows(self, encoded: Encoded, rows: Tensor) -> Mapping[str, Tensor]:
        """Those that the other codec takes, coded anew: the values stay what they were."""
        whole = unpacked(encoded)
        codec = whole.precision.codec
        parts = codec.take_rows(whole, rows)
        precision = Precision(codec.name, codec.of_rows(whole, rows))
        return self._pack(Encoded(precision, (len(rows), *encoded.shape[1:]), encoded.dtype, parts))

    def of_rows(self, encoded: Encoded, rows: Tensor) -> Precision:
        """That of the rows by the other codec."""
        whole = unpacked(encoded)
        return Precision(whole.precision.name, whole.precision.codec.of_rows(whole, rows))

    def write(self, settings: Precision) -> str:
        """The other precision after a colon."""
        return f":{settings}"

    def read(self, text: str) -> Precision:
        """The inverse of `write`."""
        found = Precision.parse(text.removeprefix(":"))
        if not text.startswith(":") or not found.codec.has_streams(found.settings):
            raise ValueError(f"'{text}' must be {self.form.removeprefix(self.name)}")
        return found

    def shown(self, settings: Precision) -> str:
        """As the other precision: the values are the same."""
        return settings.shown

    def expected_bytes(self, shape: tuple[int, ...], dtype: torch.dtype, settings: Precision) -> int:
        """About what normally distributed values take."""
        total = settings.codec.expected_bytes(shape, dtype, settings.settings)
        for piece, own in settings.codec.pieces(shape, settings.settings):
            size = piece.codec.expected_bytes(own, dtype, piece.settings)
            total -= max(math.floor(size * (1 - _typical_share(piece))) - _TABLE, 0)
        return total

    def span(self, settings: Precision) -> int:
        """That of the other codec."""
        return settings.codec.span(settings.settings)

    def fault(self, parts: Mapping[str, Tensor]) -> str:
        """The lengths must be those of streams that are there; what is in them shows when they are decoded."""
        try:
            _split(parts[PART][:_HEAD].cpu().numpy().tobytes(), parts[PART].numel())
        except ValueError as error:
            return str(error)
        return ""

    def _pack(self, whole: Encoded) -> Mapping[str, Tensor]:
        streams = whole.precision.codec.streams(whole)
        if streams is None:
            raise ValueError(f"{whole.precision} has no streams to code")
        heads, bodies = bytearray([len(streams)]), bytearray()
        for stream in streams:
            plain = stream.cpu().numpy().tobytes()
            short = _deflate(plain)
            kept = min(short, plain, key=len)
            heads += _varint(2 * len(kept) + (kept is plain))
            bodies += kept
        packed = torch.frombuffer(heads + bodies, dtype=torch.uint8)
        return {PART: packed.to(next(iter(whole.parts.values())).device)}


def _damaged(encoded: Encoded, error: Exception) -> UndecodableError:
    return UndecodableError(
        f"A tensor of shape {encoded.shape} held as {encoded.precision} must decode, but its bytes give '{error}'; "
        "copy the artifact again."
    )


def packed(encoded: Encoded) -> Encoded:
    """A stored tensor, Huffman-coded where that takes fewer bytes, names of parts included, and as it is elsewhere.

    Example:
        >>> from surgery.storage.codecs import Precision, encode
        >>> whole = encode(torch.randn(64, 256, generator=torch.Generator().manual_seed(0)), Precision.parse("int4/64"))
        >>> whole.nbytes, packed(whole).nbytes, str(packed(whole).precision)
        (8704, 8023, 'huffman:int4/64')
    """
    if not encoded.precision.codec.has_streams(encoded.precision.settings):
        return encoded
    parts = _HUFFMAN._pack(encoded)
    found = replace(encoded, precision=Precision(Huffman.name, encoded.precision), parts=parts)
    names = _NAME * (len(encoded.parts) - 1)  # its one part has one
    return found if found.nbytes < encoded.nbytes + names else encoded


def unpacked(encoded: Encoded) -> Encoded:
    """The other codec's form of a Huffman-coded tensor, and any other tensor as it is."""
    if encoded.precision.name != Huffman.name:
        return encoded
    inner: Precision = encoded.precision.settings
    streams = Huffman.inflate(encoded)
    parts = inner.codec.from_streams(streams, encoded.shape, encoded.dtype, inner.settings)
    device = encoded.parts[PART].device
    return replace(encoded, precision=inner, parts={name: part.to(device) for name, part in parts.items()})


def _deflate(plain: bytes) -> bytes:
    # Of one value, as biases that nothing has trained, words add up.
    strategy = zlib.Z_RLE if plain.count(plain[:1]) == len(plain) else zlib.Z_HUFFMAN_ONLY
    coder = zlib.compressobj(9, zlib.DEFLATED, _RAW, 9, strategy)
    return coder.compress(plain) + coder.flush()


def _stream(content: memoryview, size: int, raw: bool) -> Tensor:
    """One stream of a known size, whatever its bytes claim."""
    if raw:
        found, over = bytearray(content), b""
    else:
        coder = inflate.decompressobj(_RAW)
        found = bytearray(coder.decompress(content, max(size, 1)))
        over = coder.unused_data or (b"" if coder.eof else coder.decompress(coder.unconsumed_tail, 1))
    if len(found) != size or over:
        raise ValueError(f"a stream of other than {size:,} bytes")
    return torch.frombuffer(found, dtype=torch.uint8) if size else torch.zeros(0, dtype=torch.uint8)


def _varint(value: int) -> bytes:
    """A whole number in groups of 7 bits, the lowest first; all but the last have the highest bit set."""
    found = bytearray()
    while value >= 128:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])


def _split(content: Sequence[int], length: int) -> list[tuple[int, int, bool]]:
    """Where every stream begins and ends, and whether it is as it was.

    Raises:
        ValueError: where the lengths are not those of `length` bytes.
    """
    sizes, place, count = [], 1, content[0] if length else 0
    for _ in range(count):
        value = shift = 0
        while True:
            if place >= len(content) or shift > 56:
                raise ValueError("lengths of streams that do not end")
            value |= (content[place] & 127) << shift
            place, shift, more = place + 1, shift + 7, content[place] & 128
            if not more:
                break
        sizes.append(value)
    spans = []
    for value in sizes:
        spans.append((place, place + value // 2, bool(value & 1)))
        place += value // 2
    if not count or place != length:
        raise ValueError(f"streams of {place:,} bytes, but {length:,} are there")
    return spans


@lru_cache
def _typical_share(precision: Precision) -> float:
    """What coding leaves of a large tensor of normally distributed values."""
    values = torch.randn(_TYPICAL, generator=torch.Generator().manual_seed(0))
    whole = Encoded(precision, _TYPICAL, values.dtype, precision.codec.encode(values, precision.settings))
    return min(packed(whole).nbytes / whole.nbytes, 1.0)


_HUFFMAN = Huffman()
