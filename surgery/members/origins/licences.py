"""What a model card says of the licence, which goes where the model goes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from surgery.disk.untrusted import UnreadableError, is_regular, read_regular

CARD = "README.md"
TEXTS = ("LICENSE*", "LICENCE*", "NOTICE*")
"""Files of licences and of those who are to be named."""
KEYS = ("license", "license_name", "license_link")
"""What a card's front matter says of it."""
_LARGEST = 1 << 22  # bytes of a card
_FRONT = re.compile(r"\A---\s*\n(.*?)\n---\s*(\n|\Z)", re.DOTALL)
_VALUE = re.compile(r"[^\x00-\x1f\x7f]{1,300}")


def licence_of(text: str) -> dict[str, str]:
    """What the front matter of a card says of the licence; nothing where there is none that can be read.

    Example:
        >>> licence_of("---\\nlicense: apache-2.0\\ntags: [x]\\n---\\n# A model")
        {'license': 'apache-2.0'}
    """
    import yaml

    found = _FRONT.match(text)
    if found is None:
        return {}
    try:
        entries: Any = yaml.safe_load(found[1])
    except (yaml.YAMLError, ValueError, RecursionError):  # ValueError: of dates that are none
        return {}
    if not isinstance(entries, Mapping):
        return {}
    said = {key: entries[key] for key in KEYS if isinstance(entries.get(key), str)}
    return {key: each for key, each in said.items() if _VALUE.fullmatch(each)}


def licence_file(folder: Path) -> dict[str, bytes]:
    """Of a folder's card what it says of the licence, as a card of its own: a small file by its name."""
    import yaml

    path = folder / CARD
    if not is_regular(path):
        return {}
    try:
        said = licence_of(read_regular(path, _LARGEST).decode(errors="replace"))
    except (UnreadableError, OSError):
        return {}
    return {CARD: f"---\n{yaml.safe_dump(said)}---\n".encode()} if said else {}
