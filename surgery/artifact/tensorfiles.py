"""Safetensors files: read named tensors back, with every header checked.

The header is read here before the file is handed to safetensors, so that a damaged file is named with what
it should hold and what it does.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from surgery.disk.untrusted import UnreadableError, shown_text
from surgery.errors import ArtifactError
from surgery.safetensors.gathered import DATA, NOTE, spread
from surgery.safetensors.header import Header, parse_header
from surgery.util.alignment import align


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file, without reading any tensor.

    Raises:
        ArtifactError: where the file is shorter or longer than its header says, or the header makes no sense.
    """
    try:
        return parse_header(path)
    except UnreadableError as error:
        raise ArtifactError(f"{path} {error}; {_ADVICE}") from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, mapped from the disk; those that do not lie aligned there are copied.

    Those of single bytes are not: they are codes, whose places change no result, and most of a large artifact.

    Raises:
        ArtifactError: where safetensors refuses the file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            note, names = (file.metadata() or {}).get(NOTE), list(file.keys())
            if note is not None and names == [DATA]:
                found = spread(file.get_tensor(DATA), note)
            else:
                found = {name: file.get_tensor(name) for name in names}
            return {name: t if t.element_size() == 1 else align(t) for name, t in found.items()}
    except UnreadableError as error:
        raise ArtifactError(f"{path} {error}; {_ADVICE}") from None
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise ArtifactError(
            f"{path} must be a whole safetensors file, but reading it says "
            f"'{shown_text(' '.join(str(error).split()))}'; {_ADVICE}"
        ) from error


_ADVICE = "copy the artifact again, or write it anew"
