"""Folders on the hub: what would be uploaded, and the upload, by huggingface_hub."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.artifact.adaptercard import Base, with_base
from surgery.artifact.manifest import read_manifest
from surgery.artifact.reading import wrong_hashes
from surgery.disk.records import artifact_files, owned_files, read_record, unowned_files, wrong_files
from surgery.disk.untrusted import DOCUMENT_BYTES, as_mapping, parse_json, read_regular
from surgery.errors import OutputError, PlanError
from surgery.util.showing import as_html, as_text, plural
from surgery.util.text import one_line, shorten
from surgery.util.wording import size

ADAPTER = "adapter_config.json"
_BRANCH = re.compile(r"\w(?:[\w/-]|\.(?!\.))*")


@dataclass(frozen=True, repr=False)
class Upload:
    """What was uploaded, or would be.

    Attributes:
        repo: `org/name` on the hub.
        files: bytes by path, as they are there.
        left: files of the folder that surgery did not write, which are not uploaded.
        card: whether there is a model card.
        url: of the commit; None where nothing was uploaded.
        base: of an adapter, on the hub; None of anything else.
    """

    repo: str
    files: dict[str, int]
    left: tuple[str, ...]
    card: bool
    url: str | None = None
    base: str | None = None

    def __repr__(self) -> str:
        return as_text(self._title(), ["  ".join(row) for row in self._rows()])

    def _repr_html_(self) -> str:
        return as_html(self._title(), ("file", "bytes"), self._rows())

    def _title(self) -> str:
        what = f"{plural(len(self.files), 'file')}, {size(sum(self.files.values()))}"
        done = f"uploaded to {self.url}" if self.url else f"would go to {self.repo}"
        done += f", as an adapter of {self.base}" if self.base else ""
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
    base: str | None = None,
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
        base: name on the hub of the model that an adapter belongs to, where that was a folder when it was exported;
            what is uploaded names it, the folder stays as it is.
        dry_run: whether to say what would be uploaded, and do nothing; nothing is asked of the hub.

    Raises:
        PlanError: where `repo` or `base` is no name of a repository, `revision` none of a branch, or an adapter's base
            is a folder that nobody else has.
        OutputError: where the folder holds nothing that surgery wrote, or the hub refuses it.

    Example:
        >>> import surgery
        >>> upload = surgery.push_to_hub("joint", "me/joint", dry_run=True)
        >>> "manifest.json" in upload.files, upload.url
        (True, None)
    """
    from huggingface_hub import HfApi, ModelCard

    _check_names(repo, base, revision)
    place = Path(folder).expanduser()
    owned = owned_files(place)  # hashes of all files: asked for once
    files = _files_of(place, owned)
    card = "README.md" in files
    base, anew = _adapter(place, base, card)
    files |= {name: len(content) for name, content in anew.items()}
    try:
        if card:
            ModelCard.load(place / "README.md")
        left = tuple(unowned_files(place, owned))
        if dry_run:
            return Upload(repo, files, left, card, base=base)
        hub: Any = HfApi(token=token)
        hub.create_repo(repo, private=private, exist_ok=True)
        with _with(place, files, anew) as folder:
            done = hub.upload_folder(
                repo_id=repo, folder_path=folder, allow_patterns=list(files), revision=revision, commit_message=message
            )  # fmt: skip
    except Exception as error:  # of the hub's client: no network, no rights, another history
        raise OutputError(
            f"{place} could not be uploaded to {repo}: {one_line(error)}; check the network, the token (hf auth login) "
            "and the name, or look with `dry_run`."
        ) from error
    return Upload(repo, files, left, card, str(done.commit_url), base)


def _check_names(repo: str, base: str | None, revision: str | None) -> None:
    """Refuse names that the hub could not have.

    Raises:
        PlanError: naming the first of them.
    """
    for what, name in (("repo", repo), ("base", base)):
        if name is not None and (wrong := _no_repo(name)):
            raise PlanError(f"`{what}` must be a name such as org/name, found '{name}': {wrong}")
    if revision is not None and not _BRANCH.fullmatch(revision):
        raise PlanError(f"`revision` must be the name of a branch, such as main, found '{revision}'.")


def _files_of(folder: Path, owned: set[str]) -> dict[str, int]:
    """The files in a folder that surgery wrote, with their bytes.

    Raises:
        OutputError: where any of them was changed since, or there are none.
    """
    if wrong := _changed(folder, owned):
        said = shorten([f"{name} {what}" for name, what in wrong.items()], 3, "; ")
        raise OutputError(
            f"What is uploaded must be whole and as it was written, but in {folder} {said}; write the folder anew, or "
            f"put back what was there (`surgery verify {folder}`)."
        )
    written = sorted({*artifact_files(folder), *owned} - {".surgery-files"})
    files = {name: (folder / name).stat().st_size for name in written if (folder / name).is_file()}
    if not files or not (artifact_files(folder) or read_record(folder)):  # a folder around it is not its own
        found = "holds nothing of it" if folder.is_dir() else "is no folder"
        raise OutputError(
            f"The folder must be one that surgery wrote, but {folder} {found}; give one that "
            "`surgery merge`, `surgery train` or `surgery export` wrote."
        )
    return files


def _no_repo(name: str) -> str:
    """Why something cannot be the name of a repository; empty where it can."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        return one_line(error)
    return ""


def _adapter(folder: Path, base: str | None, card: bool) -> tuple[str | None, dict[str, bytes]]:
    """The base of an adapter on the hub, and the files that say so where they said something else.

    Raises:
        PlanError: where an adapter has none there, or what is no adapter was given one.
    """
    path = folder / ADAPTER
    if not path.exists():
        if base is not None:
            raise PlanError(f"`base` is for adapters, but {folder} has no {ADAPTER}; leave it out.")
        return None, {}
    config = {**as_mapping(parse_json(read_regular(path, DOCUMENT_BYTES)))}
    named = str(config.get("base_model_name_or_path"))
    if base is None and _no_repo(named):
        raise PlanError(
            f"An adapter on the hub needs a base there, but {ADAPTER} names {named}: give the name that this has "
            "there as `base`, such as org/name; what is not there yet is uploaded first, as a plain export (`surgery "
            "push`)."
        )
    if base is None or base == named:
        return named, {}
    other = {**config, "base_model_name_or_path": base, "revision": None}
    anew = {ADAPTER: (json.dumps(other, indent=2) + "\n").encode()}
    if card:
        text = (folder / "README.md").read_text(encoding="utf-8")
        mapping = config.get("auto_mapping")
        kind = str(mapping.get("base_model_class") if isinstance(mapping, Mapping) else None)
        anew["README.md"] = with_base(text, kind, Base.of(named), Base(base, "hub")).encode()
    return base, anew


@contextmanager
def _with(folder: Path, files: Iterable[str], anew: Mapping[str, bytes]) -> Iterator[Path]:
    """The folder to upload: the given one or, where files are made anew, one of these and links to the others."""
    if not anew:
        yield folder
        return
    with tempfile.TemporaryDirectory() as made:
        for name in files:
            target = Path(made) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if name in anew:
                target.write_bytes(anew[name])
            else:
                target.symlink_to((folder / name).resolve())
        yield Path(made)


def _changed(folder: Path, owned: set[str]) -> dict[str, str]:
    """Files that are not as surgery wrote them, with what is wrong; a card may be edited, and then stays here."""
    wrong = {} if owned.issuperset(read_record(folder)) else dict(wrong_files(folder) or {})
    if artifact_files(folder):
        wrong |= wrong_hashes(folder, read_manifest(folder))
    wrong.pop("README.md", None)
    return wrong
