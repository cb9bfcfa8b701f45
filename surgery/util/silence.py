"""Silence: torch's own log, which tells of tries that are expected to fail, is kept off the screen."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def torch_silent() -> Iterator[None]:
    """While inside, torch logs and warns of nothing; what it raises is all that is said.

    Example:
        >>> with torch_silent():
        ...     logging.getLogger("torch.export").error("never shown")
    """
    names = [name for name in logging.root.manager.loggerDict if name == "torch" or name.startswith("torch.")]
    handlers = {handler for name in names for handler in logging.getLogger(name).handlers}
    for handler in handlers:
        handler.addFilter(_nothing)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for handler in handlers:
            handler.removeFilter(_nothing)


def _nothing(record: logging.LogRecord) -> bool:
    return False
