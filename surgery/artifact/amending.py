"""Amending: an artifact written anew in its place with members added or removed.

What does not change is not read: files of the members that stay are linked from the folder that is replaced, and their
hashes are those that it recorded. The folder that comes of it is the one that `save` would write of the same members.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from surgery.artifact.describing import Described, describe_member, make_manifest, placed
from surgery.artifact.folder import read_recipe
from surgery.artifact.foldernames import check_folder_names, folder_names
from surgery.artifact.manifest import NAME, RECORDS, FileEntry, Manifest, OriginEntry, read_manifest
from surgery.artifact.reading import check_banks, check_files, map_stored
from surgery.artifact.recorded import (
    DICTIONARY,
    INDEX_FILE,
    TENSOR_FILE,
    alone_of,
    check_came_back,
    origin_of,
    small_files,
)
from surgery.artifact.smallfiles import check_small_files, lend_files
from surgery.artifact.writing import (
    ALLOWANCE,
    PICTURE,
    by_file,
    entries_of,
    put_file,
    recipe_bytes,
    write_front,
    write_stem,
)
from surgery.disk.files import copy_hashed, sha256_of
from surgery.disk.folders import new_folder
from surgery.disk.places import Places, into_artifact
from surgery.errors import ArtifactError, OutputError, SurgeryWarning, shorten
from surgery.fitting.report import FitReport
from surgery.members.extra_state import NAME as EXTRA_STATE
from surgery.members.extra_state import to_document
from surgery.members.member import Member, content_hash
from surgery.safetensors.dtypes import check_dtypes
from surgery.storage.states import lazy_state_of
from surgery.storage.stored import Stored
from surgery.storage.trim import restrict

_RECIPE = "recipe.yaml"
LOOKED_AT = 1 << 28  # bytes of files that changed after they were written: a second or less


@dataclass(frozen=True)
class Amendment:
    """What an artifact shall be.

    Attributes:
        folder: that is replaced.
        manifest: of it as it is.
        before: what it holds, all of it.
        after: what it shall hold.
        report: of that.
        added: the member that is new, if there is one; the last of all.
    """

    folder: Path
    manifest: Manifest
    before: Stored
    after: Stored
    report: FitReport | None
    added: Member | None = None


def amend(amendment: Amendment) -> Path:
    """Write an artifact anew in its place; it is replaced whole or not at all.

    Raises:
        OutputError: where the folder holds what is not its own, cannot be written, the disk is full, or what was
            written cannot be loaded.
    """
    return _Amending(amendment).write()


class _Amending:
    def __init__(self, amendment: Amendment):
        self.of, self.manifest, self.after = amendment, amendment.manifest, amendment.after
        self.names = amendment.after.plan.members
        self.places: Places = into_artifact(amendment.folder)
        self.folders = folder_names(self.names)
        self.known: dict[str, FileEntry] = {}  # entries of what was linked, by its new path
        self.damaged: list[str] = []  # what was linked although it is not what was written
        self.written = (amendment.folder / NAME).stat().st_mtime_ns  # the last file of all
        self.left = LOOKED_AT
        new = amendment.added
        check_folder_names(self.names)
        if new is not None:
            check_small_files(new)
            own = {k: v for k, v in self.after.tensors.items() if k not in amendment.before.tensors}
            check_dtypes({str(key): each.dtype for key, each in own.items()})
        self.sources = {
            name: small_files(self.manifest, name) for name in self.names if name in self.manifest.members
        }

    def write(self) -> Path:
        """Everything, in the order in which `save` writes it."""
        folder, after, before = self.of.folder, self.after, self.of.before
        stems = by_file(after, self.folders)
        old = by_file(before, folder_names(before.plan.members))
        written = {stem: parts for stem, parts in stems.items() if not self._same(stem, parts, old)}
        self._check_copied(stems, written, old)
        content = self._new_files()
        need = sum(each.nbytes for parts in written.values() for each in parts.values()) + ALLOWANCE
        need += sum(map(len, content.values()))
        with new_folder(folder, overwrite=True, need=need, record=False) as place:
            hashes: dict[Path, str] = {}
            for stem, parts in written.items():
                hashes |= write_stem(place / stem, parts)
            for stem in stems.keys() - written.keys():
                self._link_tensors(place, stem)
            borrowed = self._put_small_files(place)
            for path, data in content.items():
                put_file(place / path, data)
            document, beside = self._put_rest(place)
            described = [self._described(name) for name in self.names]
            manifest = make_manifest(after, described, self.of.report, document, borrowed, self.folders)
            write_front(place, manifest, after, beside, {**self.known, **entries_of(place, hashes)})
            self._check(place)
        self._warn()
        return folder.expanduser().resolve()

    # -- tensors -------------------------------------------------------------------------------------------

    def _former(self, stem: str) -> str:
        """The stem that a file of this one had before."""
        member = next(
            (name for name in self.names if stem.startswith(f"members/{self.folders[name]}/")), None
        )
        if member is None or member not in self.manifest.members:
            return stem if member is None else ""
        return f"{self.manifest.folder_of(member)}/{Path(stem).name}"

    def _check_copied(
        self,
        stems: Mapping[str, Mapping[str, Any]],
        written: Mapping[str, Mapping[str, Any]],
        old: Mapping[str, Mapping[str, Any]],
    ) -> None:
        """Look at the files whose tensors are copied into new ones: what is wrong with them would pass for right.

        Raises:
            ArtifactError: naming every file that is not as it was written.
        """
        linked = {self._former(stem) for stem in stems.keys() - written.keys()}
        copied = {id(each) for parts in written.values() for each in parts.values()}
        prefixes = [
            stem for stem, parts in old.items() if stem not in linked and copied & {*map(id, parts.values())}
        ]
        check_files(self.of.folder, self.manifest, [p for stem in prefixes for p in self._files_of(stem)])

    def _same(self, stem: str, parts: Mapping[str, Any], old: Mapping[str, Mapping[str, Any]]) -> bool:
        """Whether files hold the same stored forms as before."""
        before = old.get(self._former(stem), {})
        same = before.keys() == parts.keys() and all(before[name] is each for name, each in parts.items())
        return same and bool(self._former_files(stem))  # an earlier version may have divided them otherwise

    def _former_files(self, stem: str) -> list[str]:
        """The files that what lies in this one had before."""
        return self._files_of(self._former(stem))

    def _files_of(self, former: str) -> list[str]:
        return [
            path
            for path in self.manifest.files
            if TENSOR_FILE.fullmatch(path) or INDEX_FILE.fullmatch(path)
            if path.startswith(former) and path[len(former) :][:1] in (".", "-")
        ]

    def _link_tensors(self, place: Path, stem: str) -> None:
        for path in self._former_files(stem):
            self._link(place, path, stem + path[len(self._former(stem)) :])

    # -- other files ---------------------------------------------------------------------------------------

    def _new_files(self) -> dict[str, bytes]:
        """What the new member has besides tensors, without what others lend it."""
        new = self.of.added
        if new is None:
            return {}
        folder = f"members/{self.folders[new.name]}"
        lent = self._borrowed().get(new.name, {})
        found = {f"{folder}/{path}": data for path, data in new.files.items() if path not in lent}
        extra = self.after.extra.get(new.name)
        return found | ({f"{folder}/{EXTRA_STATE}": to_document(extra, new.name)} if extra else {})

    def _borrowed(self) -> dict[str, dict[str, str]]:
        files: dict[str, dict[str, tuple[str, int]]] = {}
        for name in self.names:
            if name in self.sources:
                entries = {file: self.manifest.files[path] for file, path in self.sources[name].items()}
                files[name] = {file: (entry.sha256, entry.bytes) for file, entry in entries.items()}
            elif self.of.added is not None:
                files[name] = {
                    k: (hashlib.sha256(v).hexdigest(), len(v)) for k, v in self.of.added.files.items()
                }
        return lend_files(files)

    def _put_small_files(self, place: Path) -> dict[str, dict[str, str]]:
        """Link the small files of the members that stay; those that were lent by one that goes come to a borrower."""
        borrowed = self._borrowed()
        for name, sources in self.sources.items():
            for file, path in sources.items():
                if file not in borrowed.get(name, {}):
                    self._link(place, path, f"members/{self.folders[name]}/{file}")
            extra = f"{self.manifest.folder_of(name)}/{EXTRA_STATE}"
            if extra in self.manifest.files:
                self._link(place, extra, f"members/{self.folders[name]}/{EXTRA_STATE}")
        return borrowed

    def _put_rest(self, place: Path) -> tuple[Mapping[str, Any] | None, int]:
        """Recipe, and what is no part of the models, such as the log of a run; the recipe and the bytes of the rest."""
        rest = [
            path
            for path in self.manifest.files
            if not path.startswith("members/") and path not in ("README.md", PICTURE, _RECIPE, RECORDS)
            if not (
                path.startswith(DICTIONARY) and (TENSOR_FILE.fullmatch(path) or INDEX_FILE.fullmatch(path))
            )
        ]
        for path in rest:
            self._link(place, path, path)
        recipe = read_recipe(self.of.folder, self.manifest)
        if recipe is None:
            return None, sum(self.manifest.files[path].bytes for path in rest)
        kept = recipe.of_members(self.names)
        if kept is not recipe:
            report = self.of.report
            kept = kept if report is not None and report.target else kept.without_target()
        document = self.places.recipe(kept.document())
        if kept is recipe:
            self._link(place, _RECIPE, _RECIPE)
        else:
            put_file(place / _RECIPE, recipe_bytes(document))
        return document, sum(self.manifest.files[path].bytes for path in rest)

    def _warn(self) -> None:
        """Name damaged files: what was to be done needs none of them, so it is done."""
        if self.damaged:
            warnings.warn(
                f"{shorten(sorted(self.damaged))} in {self.of.folder} must be as it was written, but is not: members "
                "that use it come back wrong or not at all. It was left as it is; put it back, or remove its member. "
                "`surgery verify` looks at all files.",
                SurgeryWarning,
                stacklevel=4,
            )

    def _link(self, place: Path, old: str, new: str) -> None:
        """A file of the former folder in the new one: the same file where the system can have it twice, else a copy.

        What is copied is looked at on the way, and so is what was changed after the folder was written, in bounds: an
        addition takes as long beside many members as beside few.
        """
        source, target = self.of.folder / old, place / new
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_symlink():  # as the hub's cache has them
            source = source.resolve()
        entry = self.known[new] = self.manifest.files[old]
        with contextlib.suppress(OSError):
            os.link(source, target)
        if not target.exists():
            found = copy_hashed(source, target)
        elif source.stat().st_mtime_ns > self.written and self.left >= entry.bytes:
            self.left -= entry.bytes
            found = sha256_of(source)
        else:
            return
        if found != entry.sha256:
            self.damaged.append(old)

    # -- the manifest --------------------------------------------------------------------------------------

    def _described(self, name: str) -> Described:
        if self.of.added is not None and name == self.of.added.name:
            member = replace(self.of.added, origin=placed(self.of.added.origin, self.places))
            return describe_member(member, self.after)
        entry = self.manifest.members[name]
        prefix = f"{self.manifest.folder_of(name)}/"
        here = sum(file.bytes for path, file in self.manifest.files.items() if path.startswith(prefix))
        origin = placed(origin_of(self.manifest, name), self.places)
        shown = self.manifest.members[entry.like or name]
        return Described(
            name,
            OriginEntry.model_construct(**asdict(origin)),
            shown.inputs,
            self._hash(name),
            here if entry.bytes is None else entry.bytes,
            entry.replacements,
            alone_of(self.manifest, name),
        )

    def _hash(self, name: str) -> str | None:
        """A member's content hash; that of one whose own files held every tensor, and which lent some, is new."""
        found = self.manifest.members[name].hash
        if found is None and any(p.site.member == name for p in self.after.plan.placements):
            return content_hash(lazy_state_of(self.of.before, name))
        return found

    def _check(self, place: Path) -> None:
        """Run the checks of a load on what was written, as far as it is new.

        Raises:
            OutputError: naming what a load would refuse.
        """
        try:
            manifest = read_manifest(place)
            found = map_stored(place, manifest, self.names)
            for name in self.names:
                check_came_back(self.after, found, name)
            if self.of.added is not None:
                check_banks(place, restrict(found, [self.of.added.name]), manifest)
        except ArtifactError as error:
            reason = str(error).replace(str(place), str(self.of.folder))
            raise OutputError(
                f"What is written must load again, but {self.of.folder} would not: {reason} It is as it was."
            ) from error
