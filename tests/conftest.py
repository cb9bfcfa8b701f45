"""What makes all tests faster and changes none."""

import functools
import gc
import os

import pytest
import typer.main

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # workers share the cores among them
typer.main.get_command = functools.cache(typer.main.get_command)  # a process builds its commands once


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    if getattr(config.option, "dist", "no") == "load":  # what `-n` alone means
        config.option.dist = "loadfile"  # what the tests of a file share is made once


def pytest_collection_finish():
    gc.collect()
    gc.freeze()  # modules stay: each collection looks at what tests make alone
