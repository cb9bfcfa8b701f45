"""Storage keys: what a stored tensor belongs to, as values; the only place where their text is made and parsed.

A tensor is stored for a member, under its name there, or as a part of a bank. In a manifest a key is written as text,
`plain/<member>/<name>` or `bank/<bank>/<part>`; in a file, whose folder says whose it is, as `<name>` or
`<bank>/<part>`. A tensor that is encoded in several pieces has `:<piece>` behind its name in the file.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PlainKey:
    """A tensor that a member keeps to itself.

    Attributes:
        member: whose it is.
        name: its first owner.

    Example:
        >>> str(PlainKey("vision", "fc.weight"))
        'plain/vision/fc.weight'
    """

    member: str
    name: str

    def __str__(self) -> str:
        return f"plain/{_quoted(self.member)}/{self.name}"

    def __lt__(self, other: StorageKey) -> bool:
        return str(self) < str(other)

    @property
    def in_file(self) -> str:
        """Its name in the files of the member."""
        return self.name


@dataclass(frozen=True, slots=True)
class PartKey:
    """A part of a bank.

    Attributes:
        bank: key of the bank.
        part: what the method calls it, such as `rows.0`.

    Example:
        >>> str(PartKey("16x16-float32", "rows.0"))
        'bank/16x16-float32/rows.0'
    """

    bank: str
    part: str

    def __str__(self) -> str:
        return f"bank/{self.in_file}"

    def __lt__(self, other: StorageKey) -> bool:
        return str(self) < str(other)

    @property
    def in_file(self) -> str:
        """Its name in the files of the dictionary."""
        return f"{_quoted(self.bank)}/{self.part}"

    @classmethod
    def of_file(cls, name: str) -> PartKey | None:
        """The inverse of `in_file`; None where no part of a bank is called so."""
        bank, slash, part = name.partition("/")
        return cls(_unquoted(bank), part) if slash else None


StorageKey = PlainKey | PartKey


def parse_key(text: str) -> StorageKey:
    """The inverse of `str`.

    Raises:
        ValueError: where the text is no storage key.

    Example:
        >>> parse_key("plain/vision/a/b:c")
        PlainKey(member='vision', name='a/b:c')
    """
    kind, _, rest = text.partition("/")
    owner, slash, name = rest.partition("/")
    if slash and kind in ("plain", "bank"):
        return (PlainKey if kind == "plain" else PartKey)(_unquoted(owner), name)
    raise ValueError(f"a storage key is written plain/MEMBER/NAME or bank/BANK/PART, not {text!r}")


def piece_name(name: str, piece: str) -> str:
    """What a piece of an encoded tensor is called in a file; the only piece of a plain tensor has no name.

    Example:
        >>> piece_name("fc.weight", "scale"), piece_name("fc.weight", "")
        ('fc.weight:scale', 'fc.weight')
    """
    return f"{name}:{piece}" if piece else name


def _quoted(owner: str) -> str:
    """An owner's name without slashes, of which the first one ends it."""
    return owner.replace("%", "%25").replace("/", "%2F")


def _unquoted(owner: str) -> str:
    return owner.replace("%2F", "/").replace("%25", "%")
