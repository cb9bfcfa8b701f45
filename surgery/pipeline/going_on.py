"""Large runs that write a folder: what they make lies in files beside it, and is what they go on with after a kill."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.disk.claims import work_place
from surgery.errors import PlanError

if TYPE_CHECKING:
    from torch import Tensor

    from surgery.disk.mapped import MappedFile
    from surgery.members.member import Inputs

LARGE = 2**29  # bytes of members from which a run keeps what it makes in files, and goes on after a kill
JOURNAL = "journal"  # of an interrupted run, in the hidden folder beside its target


@dataclass(frozen=True)
class Run:
    """A run that may be going on.

    Attributes:
        sources: files that weights are mapped from, as they are.
        found: how many parts an interrupted run had made already.
    """

    sources: tuple[MappedFile, ...]
    found: int = 0

    @property
    def fitting(self) -> str:
        """What it does, in words."""
        return f"Fitting, with {self.found} parts that an interrupted run made" if self.found else "Fitting"


@contextmanager
def going_on(
    out: str | Path | None,
    tensors: Sequence[Tensor],
    subject: Callable[[], Mapping[str, Any]],
    inputs: Sequence[Path] = (),
    large: bool | None = None,
) -> Iterator[Run]:
    """Inside, a large run keeps what it makes in files beside what it writes, and goes on where it was interrupted.

    Args:
        out: the folder that is written, held by this process; None keeps everything in memory.
        tensors: weights of all members.
        subject: what is computed, besides files, in values of JSON: all that the run's parts depend on.
        inputs: files and folders that are read besides those that weights are mapped from.
        large: whether what is made goes into files; by default where weights take `LARGE` bytes or more.

    Raises:
        OutputError: where another run was interrupted there, or the disk has no room.
        LoadError: where a file that weights are mapped from changes; nothing is kept from then on.
    """
    from surgery.disk.aside import aside
    from surgery.disk.journal import Journal, kept_in
    from surgery.disk.mapped import files_of

    sources = files_of(tensors)
    if large is None:
        large = sum(tensor.nbytes for tensor in tensors) >= LARGE
    if out is None or not large:
        yield Run(sources)
        return
    work = work_place(out)
    about = {**subject(), "files": _files(sources, inputs), "software": _software()}

    def check() -> None:
        for file in sources:
            file.check()

    journal = Journal(work / JOURNAL, about, Path(out).expanduser(), check)
    try:
        with aside(work), kept_in(journal):
            yield Run(sources, journal.found)
    except PlanError:  # nothing that could be gone on with
        journal.discard()
        raise
    journal.discard()


def _files(sources: Sequence[MappedFile], inputs: Sequence[Path]) -> dict[str, list[int]]:
    """Size and time of all files that are read."""
    from surgery.disk.mapped import MappedFile

    named = (path.resolve() for path in inputs)
    read = [
        file for path in named for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file()
    ]
    return {str(file.path): [file.nbytes, file.changed] for file in (*sources, *map(MappedFile.of, read))}


def _software() -> dict[str, Any]:
    """Versions, and what else results follow from."""
    import torch

    from surgery.fitting.widened import NARROW, native
    from surgery.version import __version__

    return {
        "version of surgery": __version__,
        "version of PyTorch": torch.__version__,
        "number of threads (OMP_NUM_THREADS)": torch.get_num_threads(),
        "kind of CPU": [native(dtype) for dtype in NARROW],
    }


def digest_of(probes: Mapping[str, Sequence[Inputs]]) -> str:
    """A digest of inputs that were given: of their structure, and of all tensors' bytes.

    Example:
        >>> digest_of({}) == digest_of({})
        True
    """
    import torch
    from torch.utils._pytree import tree_flatten

    digest = hashlib.sha256()
    for name, batches in sorted(probes.items()):
        digest.update(f"{name} {len(batches)}\0".encode())
        for inputs in batches:
            leaves, spec = tree_flatten((tuple(inputs.args), dict(inputs.kwargs)))
            digest.update(f"{spec}\0".encode())
            for leaf in leaves:
                if not isinstance(leaf, torch.Tensor):
                    digest.update(f"{leaf!r}\0".encode())
                    continue
                tensor = leaf.detach().cpu().contiguous()
                digest.update(f"{tensor.dtype} {tuple(tensor.shape)}\0".encode())
                digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()
