"""How stored forms are held in memory that are decoded again and again: a few bytes more, where they save most time.

Codes of 3, 5, 6 or 7 bits lie in planes, which take two to three times as long to decode as whole bytes; short
vectors take longer to decode than to read. A room of spare bytes goes to the forms that save most time for a byte.
Values stay what they are, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from surgery.storage.codecs import PLANES, Encoded, decode, encode_native, grouping_of, in_bytes

NANOSECONDS = {2: 0.8, 3: 1.2, 4: 0.8, 5: 1.3, 6: 1.4, 7: 1.8, 8: 0.6, 10: 1.6, 12: 1.3}
"""Of one thread to decode an element, by bits: of 0.15M elements in groups of 64, without a GPU."""
OTHERS = 0.5  # of other codecs
CALL, PLANE = 15e3, 9e3  # nanoseconds of a decoder, and of each plane, however few elements there are
SMALL = 1 << 12
"""Elements below which a tensor may be decoded when it is loaded."""


@dataclass(frozen=True)
class _Choice:
    """Another form of a tensor: bytes that it takes more, and nanoseconds that each use takes less."""

    key: int
    wide: bool
    more: int
    saves: float


def held_faster(
    forms: Sequence[Encoded], uses: Mapping[int, float], room: int, looked_up: Collection[int] = ()
) -> dict[int, Encoded]:
    """What to hold in place of some stored forms.

    Args:
        forms: all of them, Huffman coding taken off.
        uses: how often each, by id, is decoded in a forward pass of some member.
        room: bytes that all of them together may take more.
        looked_up: ids of tables of which rows are looked up, and nothing else is decoded.

    Returns:
        other forms of the same values by the id of the one that they replace.
    """
    by_key = {id(each): each for each in forms}
    choices = [
        choice
        for key, each in by_key.items()
        if key not in looked_up
        for choice in _choices(key, each, uses.get(key, 1.0))
    ]
    found: dict[int, Encoded] = {}
    for choice in sorted(choices, key=lambda c: -c.saves / max(c.more, 1)):
        if choice.key not in found and choice.more <= room:
            form = by_key[choice.key]
            found[choice.key] = in_bytes(form) if choice.wide else encode_native(decode(form))
            room -= choice.more
    return found


def _choices(key: int, form: Encoded, uses: float) -> list[_Choice]:
    if form.precision.is_native:
        return []
    count, how = math.prod(form.shape), grouping_of(form)
    bits = 0 if how is None else how.bits
    takes = CALL + PLANE * len(PLANES.get(bits, ())) + count * NANOSECONDS.get(bits, OTHERS)
    found = []
    if how is not None and bits < 8:
        then = CALL + PLANE + count * NANOSECONDS[8]
        more = form.parts["scale"].numel() * how.group - sum(
            part.numel() for name, part in form.parts.items() if name != "scale"
        )
        found.append(_Choice(key, True, more, uses * (takes - then)))
    if count < SMALL:
        found.append(_Choice(key, False, count * form.dtype.itemsize - form.nbytes, uses * takes))
    return [each for each in found if each.saves > 0]
