"""Quiet: log lines, warnings and bars of other libraries, kept off the screen for a while."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from surgery.util.silence import torch_silent


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence log lines, warnings and progress bars of timm, transformers, the hub client and torch."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging as chatter

    loggers = [logging.getLogger(name) for name in ("timm", "transformers", "huggingface_hub", "accelerate")]
    levels = [logger.level for logger in loggers]
    bars = (chatter.is_progress_bar_enabled(), are_progress_bars_disabled())
    chatter.disable_progress_bar()
    disable_progress_bars()
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with torch_silent():
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars[0]:
            chatter.enable_progress_bar()
        if not bars[1]:
            enable_progress_bars()
