"""Turns signals that end the process into exceptions with exit codes, so that cleaning up happens."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from surgery.errors import LoadError, TraceError

INTERRUPTED = 128 + signal.SIGINT
TERMINATED = 128 + signal.SIGTERM
_REQUESTS = [signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
WORDS = {128 + number: f"ended by {number.name}" for number in _REQUESTS} | {INTERRUPTED: "interrupted"}
"""What the last line says, by exit code."""


@contextmanager
def requests_raise() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP raise `SystemExit` with 128 and their number, as Ctrl-C raises `KeyboardInterrupt`.

    One that is ignored, as `nohup` has it, stays ignored; so does a second one while the first is cleaned up after.
    """

    def end(number: int, frame: FrameType | None) -> None:
        for each in before:
            signal.signal(each, signal.SIG_IGN)
        raise SystemExit(128 + number)

    before = {}
    with contextlib.suppress(ValueError):  # not in the main thread, which alone receives signals
        for number in _REQUESTS:
            if signal.getsignal(number) == signal.SIG_DFL:
                before[number] = signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


CUT_OFF = (
    "surgery: A file was cut off while its weights were read from it. What the command writes was left as it was; put "
    "the file back whole, with the time that it had, and run this again once nothing writes to it.\n"
)


@contextmanager
def cut_off_files_are_said() -> Iterator[None]:
    """Inside, a mapped file that gets shorter than what is read of it ends the process with a sentence and code 2.

    The system says so by a signal in the middle of an instruction, which cannot be gone on from: no exception can be
    raised, and nothing is cleaned up but what the system cleans up.
    """
    if not hasattr(signal, "SIGBUS"):
        yield
        return
    import ctypes

    def end(number: int) -> None:
        os.write(2, CUT_OFF.encode())
        os._exit(2)

    kind = ctypes.CFUNCTYPE(None, ctypes.c_int)
    handler, install = kind(end), ctypes.CDLL(None).signal
    install.argtypes, install.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    before = install(signal.SIGBUS, ctypes.cast(handler, ctypes.c_void_p))
    try:
        yield
    finally:
        install(signal.SIGBUS, before)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there was no more memory, as Python, PyTorch on a CPU and on a device say it.

    A model that could not be loaded or traced counts by what its library raised.
    """
    if isinstance(error, LoadError | TraceError):
        return error.__cause__ is not None and out_of_memory(error.__cause__)
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return bool(kinds & {"MemoryError", "OutOfMemoryError"}) or "not enough memory" in str(error)


ADVICE = {
    "merge": "Give --memory less than this machine has, which keeps what a fit makes in files, take fewer members at a "
    "time, or --max-error 0, which leaves weights in their files.",
    "train": "Take smaller batches or fewer members at a time, or a machine with more memory.",
}
"""What to do where memory ran out, by verb."""


def no_memory(stage: str, verb: str = "") -> str:
    """What is said where memory ran out.

    Args:
        stage: what was going on.
        verb: of the command line.

    Example:
        >>> no_memory("Comparing", "verify")
        'There was not enough memory (the last step was: Comparing). End what else takes memory, or take a machine \
with more of it.'
    """
    at = f" (the last step was: {stage})" if stage else ""
    advice = ADVICE.get(verb, "End what else takes memory, or take a machine with more of it.")
    return f"There was not enough memory{at}. {advice}"
