"""Keeps the logs and warnings of libraries off the screen unless `--debug` is given, and says our own in one line.

What matters to a user of this command is said by the command itself. Programs that it starts follow.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from surgery.errors import SurgeryWarning

LIBRARIES = ("torch", "torchao", "transformers", "timm", "huggingface_hub", "accelerate", "matplotlib", "PIL")
SILENT = {"TORCH_LOGS": "-all", "TORCH_CPP_LOG_LEVEL": "ERROR", "TRANSFORMERS_VERBOSITY": "error"}


@contextlib.contextmanager
def hush(
    *, quiet: bool = False, debug: bool = False, say: Callable[[str], None] | None = None
) -> Iterator[None]:
    """Silence libraries' warnings, and with `quiet` everybody's but our own; `debug` lets all of them speak.

    Args:
        quiet: whether nothing is said below warnings of this package, which say that something is not as was asked for.
        debug: whether all is said.
        say: says a warning of this package, in place of Python's two lines that name a file.
    """
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
            warnings.simplefilter("default", SurgeryWarning)
        else:
            for library in LIBRARIES:
                logging.getLogger(library).setLevel(logging.ERROR)
                warnings.filterwarnings("ignore", module=rf"{library}(\..*)?$")
        if say is not None:
            warnings.showwarning = _with(say, warnings.showwarning)
        try:
            yield
        finally:
            logging.disable(before)
            for library, level in levels.items():
                logging.getLogger(library).setLevel(level)


def _with(say: Callable[[str], None], others: Callable[..., None]) -> Callable[..., None]:
    """How warnings are shown: our own by `say`, those of others as before."""

    def show(message: Any, category: type[Warning], *place: Any, **more: Any) -> None:
        if issubclass(category, SurgeryWarning):
            say(str(message))
        else:
            others(message, category, *place, **more)

    return show
