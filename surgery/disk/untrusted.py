"""Reads, parses and quotes files that somebody else may have written, within bounds.

A folder from elsewhere may hold a pipe that never answers, a document of a terabyte, numbers of a thousand digits,
lists in lists without end, or aliases that unfold to gigabytes. What is read as a document goes through here: a file
has to be a regular one of at most a stated size, its text has to be what its format says, and what is printed of it
is short. `UnreadableError` holds the end of a sentence; who reads says which file it is and what to do.
"""

from __future__ import annotations

import json
import math
import os
import re
import reprlib
import stat
import struct
import zipfile
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from surgery.errors import first_few

if TYPE_CHECKING:
    import yaml
    from pydantic import ValidationError

DOCUMENT_BYTES = 1 << 26  # of a manifest, a configuration, a line of a log: room for some million names
RECIPE_BYTES = 1 << 20
HEADER_BYTES = 100_000_000  # of a safetensors file: the format's own limit
LOG_BYTES = 1 << 31
TEXT_BYTES = 1 << 30  # of calibration texts and rows of a task
DEEPEST = 64  # levels of lists and mappings
MOST_NODES = 1_000_000  # values of a YAML document, aliases unfolded
LARGEST_INTEGER = (1 << 63) - 1

_KINDS = (
    (stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"),
)  # fmt: skip
_LONE_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class UnreadableError(ValueError):
    """Why a file or a document cannot be read, as the end of a sentence that begins with its name."""


# -- files -------------------------------------------------------------------------------------------------


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading; a pipe, a device, a socket or a folder is never waited for.

    Links are followed, as the hub's cache needs it; where they may lead is for the caller to say.

    Raises:
        UnreadableError: where there is none, or it may not be read.

    Example:
        >>> open_regular(Path("/dev/zero"))
        Traceback (most recent call last):
        surgery.disk.untrusted.UnreadableError: must be a regular file, but is a device
    """
    try:
        _check_regular(os.stat(path).st_mode)  # opening a device can have effects of its own
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (OSError, ValueError) as error:
        if isinstance(error, UnreadableError):
            raise
        raise UnreadableError(_why(error)) from None
    try:
        _check_regular(os.fstat(handle).st_mode)  # it may have been exchanged in between
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def read_regular(path: Path, limit: int) -> bytes:
    """All bytes of a regular file of at most `limit` bytes.

    Raises:
        UnreadableError: where there is none, it is larger, or it cannot be read.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size <= limit:
            try:
                data = file.read(limit + 1)
            except OSError as error:
                raise UnreadableError(_why(error)) from None
            if len(data) <= limit:
                return data
            size = len(data)
    raise UnreadableError(f"must have at most {limit:,} bytes, but has {size:,} or more")


def regular_size(path: Path) -> int:
    """Bytes of a regular file, links followed.

    Raises:
        UnreadableError: where there is none.
    """
    try:
        found = os.stat(path)
        _check_regular(found.st_mode)
    except (OSError, ValueError) as error:
        raise error if isinstance(error, UnreadableError) else UnreadableError(_why(error)) from None
    return found.st_size


def check_archive(path: Path) -> None:
    """Whether a file is a regular one and, where it is a zip archive, does not unfold to a multiple of its size.

    Raises:
        UnreadableError: where it is none, or unfolds to more than a GiB and more than 100 times its size.
    """
    size = regular_size(path)
    try:
        with zipfile.ZipFile(path) as archive:
            unfolded = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, EOFError, struct.error):
        return  # whoever reads it says what is wrong with it
    if unfolded > max(1 << 30, 100 * size):
        raise UnreadableError(f"must unfold to what it holds, but claims {unfolded:,} bytes in {size:,}")


def is_regular(path: Path) -> bool:
    """Whether there is a regular file, links followed; a link that leads to itself is none."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False


def _check_regular(mode: int) -> None:
    if not stat.S_ISREG(mode):
        what = next((word for test, word in _KINDS if test(mode)), "something else")
        raise UnreadableError(f"must be a regular file, but is {what}")


def _why(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "does not exist"
    words = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return f"cannot be read: {words}"


# -- documents ---------------------------------------------------------------------------------------------


def parse_json(data: bytes | str, *, finite: bool = True, unique: bool = True) -> Any:
    """A JSON document of bounded depth, with what the format leaves open refused.

    Args:
        data: bytes have to be UTF-8.
        finite: whether NaN and infinities are refused, which Python writes and other programs do not read.
        unique: whether a key that repeats is refused.

    Raises:
        UnreadableError: where it is no such document.

    Example:
        >>> parse_json(b'{"a": [1, 2.5, null]}')
        {'a': [1, 2.5, None]}
    """
    raw = data if isinstance(data, bytes) else data.encode("utf-8", "surrogatepass")
    if raw.startswith(b"\xef\xbb\xbf"):
        raise UnreadableError("begins with a byte order mark, which JSON does not have")
    try:
        hooks: dict[str, Any] = {"object_pairs_hook": _object} if unique else {}
        hooks |= {"parse_constant": _no_constant} if finite else {}
        document = json.loads(raw.decode(), **hooks)
    except UnreadableError:
        raise
    except UnicodeDecodeError as error:
        raise UnreadableError(f"is not UTF-8 at byte {error.start:,}") from None
    except RecursionError:
        raise UnreadableError(f"must nest at most {DEEPEST} levels deep, but goes deeper") from None
    except ValueError as error:  # numbers of too many digits are such errors too
        raise UnreadableError(f"is no JSON: {shown_text(str(error))}") from None
    _check_tree(document, bool(_LONE_SURROGATE.search(raw)), finite)
    return document


def parse_yaml(text: str) -> Any:
    """A YAML document of plain values; aliases count as often as they are used, and repeated keys are refused.

    Raises:
        UnreadableError: where it is no such document.

    Example:
        >>> parse_yaml("a: [1, two]")
        {'a': [1, 'two']}
    """
    import yaml

    base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        _check_events(yaml.parse(text, Loader=base))
        document = yaml.load(text, Loader=_loader(base))  # a safe loader's subclass
    except UnreadableError:
        raise
    except yaml.YAMLError as error:
        raise UnreadableError(f"is no YAML: {shown_text(' '.join(str(error).split()))}") from None
    except RecursionError:
        raise UnreadableError(f"must nest at most {DEEPEST} levels deep, but goes deeper") from None
    except (ValueError, TypeError, OverflowError, AttributeError) as error:  # of dates, numbers, odd keys
        raise UnreadableError(f"holds a value that YAML cannot read: {shown_text(str(error))}") from None
    _check_tree(document, strings=True, finite=False)
    return document


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise UnreadableError(f"must have every key once, but {shown(twice)} is there more than once")
    return found


def _no_constant(name: str) -> Any:
    raise UnreadableError(f"must hold finite numbers, but holds {name}")


def _check_tree(document: Any, strings: bool, finite: bool) -> None:
    """Depth, numbers and, where it is worth looking, characters of a parsed document."""
    level: list[Any] = [document]
    for _ in range(DEEPEST + 1):
        below: list[Any] = []
        for value in level:
            kind = type(value)  # of a parser, so no subclass: a document has a hundred thousand of these
            if kind is dict:
                below.extend(value.values())
                if strings:
                    below.extend(value)
            elif kind is list or kind is tuple or kind is set:
                below.extend(value)
            elif kind is float and finite and not math.isfinite(value):
                raise UnreadableError("must hold finite numbers, but one is too large for a float")
            elif kind is str and strings and not _is_text(value):
                raise UnreadableError("must hold text, but has half of a surrogate pair")
        if not below:
            return
        level = below
    raise UnreadableError(f"must nest at most {DEEPEST} levels deep, but goes deeper")


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_events(events: Iterable[Any]) -> None:
    """Depth and size of a YAML document before anything is made of it."""
    import yaml

    sizes: dict[str, int] = {}  # of what anchors stand for, aliases unfolded
    opened: list[tuple[str | None, int]] = []
    total = 0
    for event in events:
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise UnreadableError(
                    f"has an alias *{shown_text(event.anchor, 40)} for what is not there yet"
                )
            total += sizes[event.anchor]
        elif isinstance(event, yaml.CollectionStartEvent):
            opened.append((event.anchor, total))
            total += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = opened.pop()
            if anchor is not None:
                sizes[anchor] = total - before
        elif isinstance(event, yaml.ScalarEvent):
            total += 1
            if event.anchor is not None:
                sizes[event.anchor] = 1
        if total > MOST_NODES:
            raise UnreadableError(f"must hold at most {MOST_NODES:,} values, but its aliases unfold to more")
        if len(opened) > DEEPEST:
            raise UnreadableError(f"must nest at most {DEEPEST} levels deep, but goes deeper")


def _loader(base: type) -> Any:
    """A safe loader that refuses a mapping whose keys repeat."""

    class Loader(base):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            own = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
            seen: set[Hashable] = set()
            for key in own:
                name = self.construct_object(key, deep=True)
                if isinstance(name, Hashable):
                    if name in seen:
                        raise UnreadableError(
                            f"must have every key once, but {shown(name)} is there again in line "
                            f"{key.start_mark.line + 1}"
                        )
                    seen.add(name)
            return super().construct_mapping(node, deep=deep)

    return Loader


# -- what is shown of them ---------------------------------------------------------------------------------


class _Short(reprlib.Repr):
    def __init__(self, most: int):
        super().__init__()
        self.maxlevel, self.maxdict, self.maxlist, self.maxtuple, self.maxset = 2, 3, 4, 4, 4
        self.maxstring = self.maxother = most

    def repr_int(self, x: int, level: int) -> str:
        if abs(x) > LARGEST_INTEGER:
            return f"a number of about {round(x.bit_length() * math.log10(2)):,} digits"
        return repr(x)


def shown(value: Any, most: int = 60) -> str:
    """A value as an error shows it: its `repr`, shortened to about `most` characters, whatever its size.

    Example:
        >>> shown("abc"), shown(list(range(1000))), shown(10**59)
        ("'abc'", '[0, 1, 2, 3, ...]', 'a number of about 59 digits')
    """
    return shown_text(_Short(most).repr(value), 3 * most)


def shown_text(text: str, most: int = 200) -> str:
    """The beginning of a text, and how much more there is; control characters and half characters escaped.

    Example:
        >>> shown_text("abcdefgh", 4)
        'abcd... (8 characters)'
    """
    cut = text if len(text) <= most else f"{text[:most]}... ({len(text):,} characters)"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in cut)


def broken_rules(error: ValidationError, most: int = 10) -> list[str]:
    """What a typed document breaks, each with its place and what was found, the first `most` of them."""
    rules = []
    found = error.errors(include_url=False, include_context=False)
    for each in found[:most]:
        place = ".".join(shown_text(str(part), 40) for part in each["loc"][:12])
        message = shown_text(each["msg"].removeprefix("Value error, "), 300)
        given = "" if each["type"] in ("missing", "value_error") else f", found {shown(each['input'])}"
        rules.append(f"{place}: {message}{given}" if place else f"{message}{given}")
    return first_few([*rules, *found[most:]], most)


def as_mapping(value: Any) -> Mapping[str, Any]:
    """A document that has to be a mapping.

    Raises:
        UnreadableError: where it is none.
    """
    if not isinstance(value, Mapping):
        raise UnreadableError(f"must be a mapping of names to values, but is {shown(value)}")
    return value
