"""Keeps the logs and warnings of libraries off the screen unless `--debug` is given.

What matters to a user of this command is said by the command itself. Programs that it starts follow.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator

LIBRARIES = ("torch", "torchao", "transformers", "timm", "huggingface_hub", "accelerate", "matplotlib", "PIL")
SILENT = {"TORCH_LOGS": "-all", "TORCH_CPP_LOG_LEVEL": "ERROR", "TRANSFORMERS_VERBOSITY": "error"}


@contextlib.contextmanager
def hush(*, quiet: bool = False, debug: bool = False) -> Iterator[None]:
    """Silence libraries' warnings, and with `quiet` everybody's below errors; `debug` lets all of them speak."""
    if debug:
        yield
        return
    for name, value in SILENT.items():
        os.environ.setdefault(name, value)
    before = logging.root.manager.disable
    levels = {library: logging.getLogger(library).level for library in LIBRARIES}
    with warnings.catch_warnings():
        if quiet:
            logging.disable(max(before, logging.WARNING))
            warnings.simplefilter("ignore")
        else:
            for library in LIBRARIES:
                logging.getLogger(library).setLevel(logging.ERROR)
                warnings.filterwarnings("ignore", module=rf"{library}(\..*)?$")
        try:
            yield
        finally:
            logging.disable(before)
            for library, level in levels.items():
                logging.getLogger(library).setLevel(level)
