"""Functions in processes of their own that start at once: a server that has imported the library forks them.

A process that starts from nothing imports for seven seconds what a test then uses for one.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that fork")
ALONE = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONWARNINGS": "ignore"}
"""The environment of every process: where several threads compute, what they forked would wait forever."""
SECONDS = 240


class Started:
    """Processes that run one function together.

    Args:
        function: of a module; it gets `args`.
        ranks: how many, each with the environment that `torch.distributed.run` would give it.
        environment: more variables.
    """

    def __init__(
        self, function: Callable[..., Any], *args: Any, ranks: int = 1, environment: Mapping[str, str] = {}
    ):
        self._store, known = None, dict(environment)
        if ranks > 1:
            from torch.distributed import TCPStore

            self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            known |= {
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self._store.port),
                "TORCHELASTIC_USE_AGENT_STORE": "True", "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
            }  # fmt: skip
        handle, name = tempfile.mkstemp()
        os.close(handle)
        self._said, context = Path(name), _context()
        self.processes = []
        for rank in range(ranks):
            own = known | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {})
            self.processes.append(context.Process(target=_run, args=(name, own, function, args), daemon=True))
            self.processes[-1].start()

    @property
    def pid(self) -> int:
        """Of the first process."""
        return self.processes[0].pid

    def kill(self) -> None:
        """End all without a warning."""
        for process in self.processes:
            process.kill()

    def wait(self) -> tuple[list[int | None], str]:
        """Wait for all: how each ended (a signal as a negative number), and what they wrote to stdout and stderr."""
        for process in self.processes:
            process.join(SECONDS)
        codes = [process.exitcode for process in self.processes]
        self.kill()
        said = self._said.read_text(errors="replace")
        self._said.unlink()
        return codes, said

    def succeed(self) -> None:
        """Wait for all, which must end well."""
        codes, said = self.wait()
        assert not any(codes), f"{codes}: {said[-8000:]}"


def _run(
    said: str, environment: Mapping[str, str], function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    out = os.open(said, os.O_WRONLY | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.environ.update(environment)
    function(*args)


def _context() -> Any:
    """Processes come from a server that starts with the first of them and ends with this process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["imported"])
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    with pytest.MonkeyPatch.context() as patched:
        for name, value in {**ALONE, "PYTHONPATH": path}.items():
            patched.setenv(name, value)
        forkserver.ensure_running()
    return context
