"""What makes all tests faster and changes none."""

import functools
import gc
import os
from collections import Counter
from pathlib import Path

import pytest
import typer.main
from hypothesis import settings

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # workers share the cores among them
typer.main.get_command = functools.cache(typer.main.get_command)  # a process builds its commands once

settings.register_profile("surgery", deadline=None)  # how long an example takes is up to what else runs
settings.load_profile("surgery")


@pytest.fixture
def compiler():
    """torch.compile as in a new process: it remembers each function's compilations, and gives up after some."""
    import torch._dynamo

    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


FEW_AND_LONG = (
    "test_frontier.py", "test_recipes_training.py", "test_unasked_code.py", "test_template_bits.py",
    "test_train_your_own.py", "test_drawn_weights.py", "test_adaptation_recipes.py",
)  # fmt: skip
"""Files whose tests take longer than their number says: none of them is left for the end, when other workers wait."""


@functools.cache
def needs_processes(file):
    """Whether tests of a file run functions in processes of their own."""
    return "\nfrom processes import " in Path(__file__).parent.parent.joinpath(file).read_text()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """For `-n auto`: one more than there are cores, as a worker whose test waits for processes leaves its core idle."""
    return len(os.sched_getaffinity(0)) + 1 if hasattr(os, "sched_getaffinity") else None


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """For `-n` alone: the tests of a file go to one worker, and files that fork to one, which imports for it once."""
    if config.getvalue("dist") != "load":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid):
            file = super()._split_scope(nodeid)
            return "processes" if needs_processes(file) else file

    config.option.loadscopereorder = False  # the order is that of the collection
    return Scheduling(config, log)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """Long files first: workers end together."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        number = Counter(item.path for item in items)

        def rank(item):
            file = item.nodeid.partition("::")[0]
            return (not needs_processes(file), item.path.name not in FEW_AND_LONG, -number[item.path], file)

        items.sort(key=rank)


def pytest_collection_finish():
    gc.collect()
    gc.freeze()  # modules stay: each collection looks at what tests make alone
    gc.set_threshold(10_000, 20, 20)  # which is soon thousands of nodes and modules
