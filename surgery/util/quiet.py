"""Silences logs, warnings and progress bars of other libraries for a while."""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet(*, importing: bool = True) -> Iterator[None]:
    """Silence log lines, warnings and progress bars of timm, transformers, the hub client and torch.

    Args:
        importing: whether what runs inside may import transformers, which is then imported before, as its progress
            bars can be silenced only from then on. False saves that second where nothing needs transformers.
    """
    loggers = [logging.getLogger(name) for name in ("timm", "transformers", "huggingface_hub", "accelerate")]
    with contextlib.ExitStack() as undo:
        if importing or "transformers" in sys.modules:
            undo.enter_context(_no_progress_bars())
        for logger in loggers:
            undo.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.CRITICAL)
        undo.enter_context(torch_silent())
        yield


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging as chatter

    bars = (chatter.is_progress_bar_enabled(), are_progress_bars_disabled())
    chatter.disable_progress_bar()
    disable_progress_bars()
    try:
        yield
    finally:
        if bars[0]:
            chatter.enable_progress_bar()
        if not bars[1]:
            enable_progress_bars()


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
