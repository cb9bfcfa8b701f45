"""Folders on the hub: what would be uploaded, and the upload, by huggingface_hub."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.artifact.manifest import read_manifest
from surgery.artifact.reading import wrong_hashes
from surgery.disk.records import artifact_files, owned_files, read_record, unowned_files, wrong_files
from surgery.errors import OutputError, PlanError
from surgery.util.showing import as_html, as_text, plural
from surgery.util.text import one_line, shorten
from surgery.util.wording import size

_BRANCH = re.compile(r"\w(?:[\w/-]|\.(?!\.))*")


@dataclass(frozen=True, repr=False)
class Upload:
    """What was uploaded, or would be.

    Attributes:
        repo: `org/name` on the hub.
        files: bytes by path.
        left: files of the folder that surgery did not write, which are not uploaded.
        card: whether there is a model card.
        url: of the commit; None where nothing was uploaded.
    """

    repo: str
    files: dict[str, int]
    left: tuple[str, ...]
    card: bool
    url: str | None = None

    def __repr__(self) -> str:
        return as_text(self._title(), ["  ".join(row) for row in self._rows()])

    def _repr_html_(self) -> str:
        return as_html(self._title(), ("file", "bytes"), self._rows())

    def _title(self) -> str:
        what = f"{plural(len(self.files), 'file')}, {size(sum(self.files.values()))}"
        done = f"uploaded to {self.url}" if self.url else f"would go to {self.repo}"
        rest = f"; not uploaded: {shorten(self.left, 5)}" if self.left else ""
        return f"{what} {done}{'' if self.card else '; there is no model card'}{rest}"

    def _rows(self) -> list[list[str]]:
        return [[name, f"{count:,}"] for name, count in self.files.items()]


def push_to_hub(
    folder: str | Path,
    repo: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    message: str = "Upload with model-surgery",
    token: str | bool | None = None,
    dry_run: bool = False,
) -> Upload:
    """Upload an artifact or an export.

    Files that surgery wrote are uploaded, others that lie in the folder are not.

    Args:
        folder: that `save`, `merge` or `export` wrote.
        repo: `org/name` on the hub; it is made where it does not exist.
        private: whether a new one is private; by default what the organisation has.
        revision: branch; by default the main one.
        message: of the commit.
        token: of the hub; by default the one that is logged in.
        dry_run: whether to say what would be uploaded, and do nothing; nothing is asked of the hub.

    Raises:
        PlanError: where `repo` is no name of a repository, or `revision` none of a branch.
        OutputError: where the folder holds nothing that surgery wrote, or the hub refuses it.

    Example:
        >>> surgery.push_to_hub("joint", "me/joint", dry_run=True)
        7 files, 17.7 MB would go to me/joint
    """
    from huggingface_hub import HfApi, ModelCard
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise PlanError(
            f"`repo` must be a name such as org/name, found '{repo}': {one_line(error)}"
        ) from error
    if revision is not None and not _BRANCH.fullmatch(revision):
        raise PlanError(f"`revision` must be the name of a branch, such as main, found '{revision}'.")
    place = Path(folder).expanduser()
    wrong = _changed(place)
    if wrong:
        said = shorten([f"{name} {what}" for name, what in wrong.items()], 3, "; ")
        raise OutputError(
            f"What is uploaded must be whole and as it was written, but in {place} {said}; write the folder anew, or "
            f"put back what was there (`surgery verify {place}`)."
        )
    written = sorted({*artifact_files(place), *owned_files(place)} - {".surgery-files"})
    files = {name: (place / name).stat().st_size for name in written if (place / name).is_file()}
    if not files or not (artifact_files(place) or read_record(place)):  # a folder around it is not its own
        found = "holds nothing of it" if place.is_dir() else "is no folder"
        raise OutputError(
            f"The folder must be one that surgery wrote, but {place} {found}; give one that "
            "`surgery merge`, `surgery train` or `surgery export` wrote."
        )
    card = "README.md" in files
    try:
        if card:
            ModelCard.load(place / "README.md")
        left = tuple(unowned_files(place))
        if dry_run:
            return Upload(repo, files, left, card)
        hub: Any = HfApi(token=token)
        hub.create_repo(repo, private=private, exist_ok=True)
        done = hub.upload_folder(
            repo_id=repo, folder_path=place, allow_patterns=list(files), revision=revision, commit_message=message
        )  # fmt: skip
    except Exception as error:  # of the hub's client: no network, no rights, another history
        raise OutputError(
            f"{place} could not be uploaded to {repo}: {one_line(error)}; check the network, the token (hf auth login) "
            "and the name, or look with `dry_run`."
        ) from error
    return Upload(repo, files, left, card, str(done.commit_url))


def _changed(folder: Path) -> dict[str, str]:
    """Files that are not as surgery wrote them, with what is wrong; a card may be edited, and then stays here."""
    wrong = dict(wrong_files(folder) or {})
    if artifact_files(folder):
        wrong |= wrong_hashes(folder, read_manifest(folder))
    wrong.pop("README.md", None)
    return wrong
