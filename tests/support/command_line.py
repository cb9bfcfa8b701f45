"""Running the command line in this process, for several tests."""

from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

from surgery_cli.__main__ import main


def surgery(*arguments):
    """Run the command line in this process as the shell would: exit code, stdout and stderr."""
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            main([str(each) for each in arguments])
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    return code, out.getvalue(), err.getvalue()


def files_in(folder: Path):
    return sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*") if "__pycache__" not in path.parts
    )


def assert_same_files(one: Path, other: Path):
    assert files_in(one) == files_in(other)
    for path in files_in(one):
        if (one / path).is_file():
            assert (one / path).read_bytes() == (other / path).read_bytes(), path
