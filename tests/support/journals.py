"""A large run of the library in a process that is killed while it keeps a part of its journal."""

import signal
import subprocess
import sys

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


def kill(call, part):
    """Run a call, given as source, and kill its process at the part of that number."""
    command = [sys.executable, "-c", KILLED + call, str(part)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
