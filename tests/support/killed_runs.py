"""The command line in a process that ends at a place of one's choice, such as `surgery.disk.folders:_flush:before`."""

import importlib
import os
import signal

from surgery_cli.__main__ import main


def end_at(place, number):
    """Let a signal come before or after a function is called for the first time."""
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
    """Run the command; let it end with a signal before or after the place is called for the first time."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    if place:
        end_at(place, number)
    main(arguments)
