"""Keys of tensors in artifacts and in states of runs, as values; the only place where their text is made and parsed.

A tensor is stored for a member, under its name there, or as a part of a bank. In a manifest a key is written as text,
`plain/<member>/<name>` or `bank/<bank>/<part>`; in a file, whose folder says whose it is, as `<name>` or
`<bank>/<part>`. A tensor that is encoded in several pieces has `:<piece>` behind its name in the file.

The state of a run is one file of names `<kind>/<owner>/<name>`; those of its joint model have `model/` in front.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeVar


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


_NAMED = ("bank", "member", "optimizer", "loss", "random", "contest", "method")
_WHOLE = ("extra", "running", "identity")
_MODEL = "model/"


@dataclass(frozen=True, slots=True)
class StateKey:
    """A tensor of a run's state, or of a joint model that is trained.

    Attributes:
        kind: what it belongs to: a `bank`, a `member` or its `extra` state; the `optimizer`, a `loss`, the means of a
            task's `running` loss, `random` generators; a `contest` and the `identity` of hypermodules; or a `method`.
        owner: which of these, such as the key of a bank or the number of a parameter.
        name: of the tensor there; None where the owner has one alone.
        model: whether it is the joint model's within a state.

    Example:
        >>> str(StateKey("bank", "8x8-float32", "rows", model=True))
        'model/bank/8x8-float32/rows'
    """

    kind: str
    owner: str | None = None
    name: str | None = None
    model: bool = False

    def __str__(self) -> str:
        parts = [self.kind]
        if self.owner is not None:
            parts.append(self.owner if self.kind in _WHOLE else _quoted(self.owner))
        if self.name is not None:
            parts.append(self.name)
        return f"{_MODEL if self.model else ''}{'/'.join(parts)}"

    @classmethod
    def parse(cls, text: str) -> StateKey:
        """The inverse of `str`; what is none of these has its text as its kind.

        Example:
            >>> StateKey.parse("optimizer/0/exp_avg"), StateKey.parse("running/a/b")
            (StateKey(kind='optimizer', owner='0', name='exp_avg', model=False), \
StateKey(kind='running', owner='a/b', name=None, model=False))
        """
        model = text.startswith(_MODEL)
        kind, slash, rest = text.removeprefix(_MODEL).partition("/")
        if slash and kind in _WHOLE:
            return cls(kind, rest, model=model)
        if slash and kind in _NAMED:
            owner, named, name = rest.partition("/")
            return cls(kind, _unquoted(owner), name if named else None, model)
        return cls(text)

    def in_model(self) -> StateKey:
        """The same tensor of a joint model, within a state."""
        return replace(self, model=True)


Value = TypeVar("Value")


def of_owner(entries: Mapping[StateKey, Value], kind: str, owner: object) -> dict[str, Value]:
    """The entries of one owner, by their names.

    Args:
        entries: of a joint model, or of a state without its joint model.
        kind: of the owner.
        owner: which.
    """
    found = ((key, value) for key, value in entries.items() if (key.kind, key.owner) == (kind, str(owner)))
    return {key.name: value for key, value in found if key.name is not None and not key.model}


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
