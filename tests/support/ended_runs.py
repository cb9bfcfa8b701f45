"""Runs that end early: asked to stop before a step, or killed at a place or as they keep a part of a journal."""

import importlib
import os
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest
from surgery_cli.__main__ import main

KILLED = """
import os, signal, sys
import surgery
from surgery.disk.journal import Journal
from surgery.pipeline import going_on, merge
from surgery.settings.recipe import Recipe

going_on.LARGE, keep, left = 0, Journal.keep, [int(sys.argv[1])]

def last(*given):
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    return keep(*given)

Journal.keep = last
"""


@contextmanager
def stopped_at(*steps, method="train_step", number=signal.SIGINT):
    """Inside, a signal comes before steps of training of these numbers, counted from 1; a run takes this step yet."""
    from surgery.training.loop.trainer import Trainer

    plain, count = getattr(Trainer, method), 0

    def stopping(self):
        nonlocal count
        count += 1
        if count in steps:
            signal.raise_signal(number)
        return plain(self)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Trainer, method, stopping)
        yield


def end_at(place, number):
    """Let a signal come before or after a function is called for the first time.

    Args:
        place: module, function, and `before` or `after`, such as `surgery.disk.folders:_flush:before`.
        number: of the signal.
    """
    where, name, when = place.split(":")
    owner = importlib.import_module(where)
    *outer, name = name.split(".")
    for each in outer:
        owner = getattr(owner, each)
    plain = getattr(owner, name)

    def wrapped(*arguments, **options):
        setattr(owner, name, plain)
        if when == "before":
            os.kill(os.getpid(), number)
        found = plain(*arguments, **options)
        if when == "after":
            os.kill(os.getpid(), number)
        return found

    setattr(owner, name, wrapped)


def run(arguments, place, number):
    """Run the command line; let it end with a signal before or after the place is called for the first time."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    if place:
        end_at(place, number)
    main(arguments)


def kill(call, part):
    """Run a call of a large run, given as source, and kill its process while it keeps the part of that number."""
    command = [sys.executable, "-c", KILLED + call, str(part)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
