"""A program that runs the command line in processes that end at a place of one's choice; run by tests of endings.

It imports the library once and forks for each line of its standard input: a JSON list of arguments, a place such as
`surgery.disk.folders:_flush:before`, and the number of a signal. It answers each line with the exit status and stderr.
"""

import contextlib
import importlib
import json
import os
import signal
import sys
import tempfile


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
    """Run the command in a process of its own; how it ended, and what it said."""
    with tempfile.TemporaryFile("w+") as said:
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
            os.dup2(said.fileno(), 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            code = 99
            try:
                if place:
                    end_at(place, number)
                main(arguments)
                code = 0
            except SystemExit as end:
                code = end.code or 0
            finally:
                sys.stderr.flush()
                os._exit(code)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        said.seek(0)
        return status, said.read()


if __name__ == "__main__":
    from surgery_cli.__main__ import main

    with tempfile.TemporaryDirectory() as place, contextlib.suppress(SystemExit):
        main(
            ["merge", *sys.argv[1:], "--out", f"{place}/out", "--quiet"]
        )  # what is imported on demand is, here
    import surgery.pipeline.train  # noqa: F401

    for line in sys.stdin:
        print(json.dumps(run(*json.loads(line))), flush=True)
