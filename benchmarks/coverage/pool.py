"""Pool: every model in a process of its own, with bounds on its time and memory.

Processes are forked from this one, which has imported the libraries: imports are paid for once. A model that
hangs, crashes or eats memory loses its own process and is reported; the others go on.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
_POLL = 0.05  # seconds between two looks at the processes


@dataclass(frozen=True)
class Limits:
    """What one model may take: seconds, and GiB of memory beyond what this process has."""

    seconds: float = 180.0
    memory: float = 8.0


@dataclass(frozen=True)
class Outcome:
    """What came back for one item: the function's result, or why there is none."""

    item: Any
    result: Any = None
    failure: str = ""


def run_each(
    work: Callable[[T], Any], items: Sequence[T], limits: Limits, jobs: int = 1
) -> Iterator[Outcome]:
    """Call `work` for every item, each in its own process, and yield outcomes as they come.

    Args:
        work: its result must be JSON.
        items: what to work on.
        limits: for each of them.
        jobs: processes at a time.
    """
    context = get_context("fork")
    waiting = list(reversed(items))
    running: list[tuple[Any, T, Path, float]] = []
    own = _resident(os.getpid())
    with tempfile.TemporaryDirectory() as folder:
        count = 0
        while waiting or running:
            while waiting and len(running) < jobs:
                item, count = waiting.pop(), count + 1
                path = Path(folder) / str(count)
                process = context.Process(target=_child, args=(work, item, path), daemon=True)
                process.start()
                running.append((process, item, path, time.monotonic()))
            time.sleep(_POLL)
            still = []
            for process, item, path, began in running:
                reason = _over(process, began, limits, own)
                if process.is_alive() and not reason:
                    still.append((process, item, path, began))
                    continue
                if reason:
                    _kill(process)
                process.join()
                yield _outcome(item, path, reason, process.exitcode)
            running = still


def _child(work: Callable[[Any], Any], item: Any, path: Path) -> None:
    os.setsid()  # so that what it starts dies with it
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
        result = work(item)
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(result), encoding="utf-8")
    beside.replace(path)
    os._exit(0)  # nothing that was imported has a say in how the process ends


def _over(process: Any, began: float, limits: Limits, own: int) -> str:
    if time.monotonic() - began > limits.seconds:
        return f"took more than {limits.seconds:g} s"
    if _resident(process.pid) - own > limits.memory * 2**30:
        return f"took more than {limits.memory:g} GiB of memory"
    return ""


def _outcome(item: Any, path: Path, reason: str, code: int | None) -> Outcome:
    if path.exists():
        return Outcome(item, json.loads(path.read_text(encoding="utf-8")))
    if not reason:
        died = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
        reason = f"its process ended with {died}"
    return Outcome(item, failure=reason)


def _kill(process: Any) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        process.kill()


def _resident(pid: int) -> int:
    """Resident bytes of a process, 0 where it is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        return 0
