"""Members' small files in an artifact: what they may be called, and which of them one member lends to others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path

from surgery.artifact.manifest import is_safe
from surgery.artifact.recorded import WEIGHTS
from surgery.errors import OutputError
from surgery.members.extra_state import NAME as EXTRA_STATE
from surgery.members.member import Member

_BORROW = 1024  # bytes from which a small file that two members share is stored once


def share_files(members: Sequence[Member]) -> tuple[dict[str, dict[str, bytes]], dict[str, dict[str, str]]]:
    """Small files by member, and those that an earlier member has too, with that member's name."""
    for member in members:
        check_small_files(member)
    sizes = {
        member.name: {
            path: (sha256(content).hexdigest(), len(content)) for path, content in member.files.items()
        }
        for member in members
    }
    borrowed = lend_files(sizes)
    own = {
        member.name: kept
        for member in members
        if (kept := {k: v for k, v in member.files.items() if k not in borrowed.get(member.name, {})})
    }
    return own, borrowed


def check_small_files(member: Member) -> None:
    """Whether a member's small files can lie in its folder.

    Raises:
        OutputError: naming one that cannot.
    """
    for relative in sorted(member.files):
        if not is_safe(relative) or _is_taken(Path(relative)):
            raise OutputError(
                f"A member's file must lie inside its folder under a name of its own, but '{relative}' "
                f"of member '{member.name}' does not; rename it."
            )


def lend_files(files: Mapping[str, Mapping[str, tuple[str, int]]]) -> dict[str, dict[str, str]]:
    """Small files that an earlier member has too, with that member's name.

    Args:
        files: by member, hash and bytes of each of its small files by path.
    """
    borrowed: dict[str, dict[str, str]] = {}
    first: dict[tuple[str, str], str] = {}
    for name, own in files.items():
        for relative, (digest, size) in sorted(own.items()):
            lender = first.setdefault((relative, digest), name)
            if lender != name and size >= _BORROW:
                borrowed.setdefault(name, {})[relative] = lender
    return borrowed


def _is_taken(path: Path) -> bool:
    """Whether a member's small file has the name of what an artifact holds beside it."""
    return path.name.startswith(f"{WEIGHTS}.") or path.as_posix() == EXTRA_STATE
