"""Codecs: ways of storing a tensor, a file each.

codec      what a codec is, precisions and encoded tensors, the registry
coding     encoding and decoding with any registered codec
native     tensors as they are
bfloat16   tensors rounded to bfloat16
integers   integers of 2 to 12 bits with a scale for each group of values
mixed      integers whose bits differ from row to row
huffman    what another codec stores, in fewer bytes
feedback   rounding that makes up for its errors in later columns, where the inputs' second moment is known

A new codec is a file here and its name in the loop below; or, outside of this package, a module that registers it when
it is imported (docs/add_a_codec.md). A fit tries what codecs offer in the order in which they were registered.
"""

from surgery.storage.codecs.bfloat16 import BFLOAT16, BFloat16
from surgery.storage.codecs.codec import (
    ANY_LENGTH,
    CODECS,
    NATIVE,
    Codec,
    Encoded,
    Layout,
    Precision,
    Statistics,
    register,
)
from surgery.storage.codecs.coding import (
    LARGEST,
    Decoded,
    Encoding,
    always_native,
    as_dtype,
    decode,
    decoder,
    encode,
    encode_native,
    encode_together,
    expected_bytes,
    is_tame,
    ladder,
    part_layout,
    rounded,
    stack_rows,
    stored_bytes,
    stored_precision,
    take_rows,
)
from surgery.storage.codecs.huffman import Huffman, packed, unpacked
from surgery.storage.codecs.integers import (
    Grouping,
    Integers,
    codes_of,
    grouped,
    grouping_of,
    in_bytes,
)
from surgery.storage.codecs.mixed import Classes, Mixed, by_row, mixtures, row_costs
from surgery.storage.codecs.native import Native
from surgery.storage.codecs.planes import PLANES

for _codec in (Native(), BFloat16(), Integers(), Mixed(), Huffman()):
    register(_codec)

__all__ = [
    "ANY_LENGTH", "BFLOAT16", "CODECS", "LARGEST", "NATIVE", "PLANES", "BFloat16", "Classes", "Codec",
    "Decoded", "Encoded", "Encoding", "Grouping", "Huffman", "Integers", "Layout", "Mixed", "Native", "Precision",
    "Statistics", "always_native", "as_dtype", "by_row", "codes_of", "decode", "decoder", "encode", "encode_native",
    "encode_together", "expected_bytes", "grouped", "grouping_of", "in_bytes", "is_tame", "ladder", "mixtures",
    "packed", "part_layout", "register", "rounded", "row_costs", "stack_rows", "stored_bytes", "stored_precision",
    "take_rows", "unpacked",
]  # fmt: skip
