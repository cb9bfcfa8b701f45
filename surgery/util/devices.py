"""Devices by the names that people give them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

from surgery.errors import PlanError


def pick_device(device: str | torch.device) -> torch.device:
    """The device of a name; `auto` is the accelerator where there is one.

    Raises:
        PlanError: where there is no such device, or it is not there.

    Example:
        >>> pick_device("cpu")
        device(type='cpu')
    """
    if device == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        return found or torch.device("cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        raise PlanError(
            f"Device '{device}' is not available here ({str(error).splitlines()[0]}); "
            "use `device=cpu` or `device=auto`."
        ) from error


@contextmanager
def cpu_by_default() -> Iterator[None]:
    """New tensors are of the CPU, whatever a caller made the default device; also a decorator.

    Tensors that are read from files lie on the CPU, and so must those that are made to compute with them; transformers,
    for one, makes models with the meta device as the default.

    Example:
        >>> with torch.device("meta"), cpu_by_default():
        ...     torch.zeros(1).device
        device(type='cpu')
    """
    with nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu"):
        yield
