"""Dtypes that safetensors files hold, by the names that the format has for them."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from surgery.errors import OutputError, shorten


def file_dtypes() -> dict[str, torch.dtype]:
    """PyTorch's dtypes by the names that safetensors files have for them."""
    from safetensors.torch import _TYPES

    return {**_TYPES, "F8_E8M0": torch.float8_e8m0fnu}


def known_dtypes() -> dict[torch.dtype, str]:
    """safetensors' names of the dtypes that its files can hold."""
    return {dtype: name for name, dtype in file_dtypes().items()}


def check_dtypes(dtypes: Mapping[str, torch.dtype]) -> None:
    """Refuse what a file cannot hold.

    Raises:
        OutputError: naming all tensors of dtypes that the format does not know.
    """
    known = known_dtypes()
    if bad := [f"{name} ({str(dtype)[6:]})" for name, dtype in dtypes.items() if dtype not in known]:
        raise OutputError(
            "Every tensor must have a dtype that safetensors files hold, but this is not so of "
            f"{shorten(bad, 10)}; convert these first, such as complex128 to complex64 or to two real tensors."
        )
