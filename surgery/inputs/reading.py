"""Reading: arrays and tokenizers from files of the user's, or of a member's; no pickle is loaded and no code runs."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surgery.disk.files import write_files
from surgery.disk.untrusted import check_archive
from surgery.errors import LoadError
from surgery.safetensors.header import misnamed, parse_header
from surgery.util.quiet import quiet
from surgery.util.text import one_line


def read_arrays(path: Path) -> dict[str, Tensor]:
    """The named arrays of an `.npz` or `.safetensors` file.

    Raises:
        LoadError: where it holds anything else, or more than a file may.
    """
    import numpy as np
    from safetensors.torch import load_file

    try:
        check_archive(path)
        if path.suffix == ".safetensors":
            parse_header(path)
            return load_file(str(path))
        with np.load(path, allow_pickle=False) as archive:
            return {name: torch.from_numpy(archive[name]) for name in archive.files}
    except Exception as error:
        if other := misnamed(path):
            raise LoadError(f"{path} {other}") from None
        raise LoadError(
            f"{path} must hold named arrays of plain numbers, but reading it says {one_line(error)}"
        ) from error


def read_tokenizer(source: Mapping[str, bytes] | Path, what: str) -> Any:
    """The tokenizer in a folder, or in a member's small files, with a token to pad with.

    Args:
        source: the folder, or files by relative path.
        what: whose it is, for the error.

    Raises:
        LoadError: where it cannot be read without code of its own.
    """
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder, quiet():
        if not isinstance(source, Path):
            write_files(source, Path(folder))
        place = source if isinstance(source, Path) else folder
        try:
            tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
        except Exception as error:
            raise LoadError(f"The tokenizer of {what} must be readable: {one_line(error)}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer
