"""Verifies an artifact: files against the manifest, members against their hashes and origins.

Files are compared with their recorded hashes; each member's state dict is rebuilt and its content hash
compared; and where a member's origin can still be loaded, its weights and outputs are compared with the
rebuilt member's.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from surgery.artifact.comparing import MemberCheck, compare
from surgery.artifact.exported import exported
from surgery.artifact.folder import load
from surgery.artifact.manifest import NAME, Manifest, checksum_holds, read_manifest
from surgery.artifact.reading import read_stored, wrong_hashes
from surgery.artifact.recorded import TOGETHER, inputs_of, origin_of, small_files
from surgery.core.joint import JointModel
from surgery.disk.records import wrong_files
from surgery.errors import ArtifactError, ConsentError, SurgeryError
from surgery.fitting.report import FitReport
from surgery.handles.state import LazyState
from surgery.members.member import Member, Origin, content_hash, whole_state
from surgery.members.occupancy import check_modules, check_unoccupied
from surgery.members.references import load_origin, ships
from surgery.permission import Permission
from surgery.storage.states import lazy_state_of
from surgery.util.copies import duplicate
from surgery.util.showing import as_html, as_text


@dataclass(frozen=True, repr=False)
class VerifyReport:
    """The outcome of `verify`: files that are wrong, by path with the reason, and a check of each member.

    Attributes:
        directory: the folder.
        files: what is wrong with files, by path.
        members: a check of each; none of an export that is no artifact.
        what: such an export is, in words.
    """

    directory: str
    files: Mapping[str, str]
    members: tuple[MemberCheck, ...] = field(default_factory=tuple)
    what: str | None = None

    @property
    def ok(self) -> bool:
        """Whether all files and all members are what they should be."""
        return not self.files and all(check.ok for check in self.members)

    def __repr__(self) -> str:
        rows = [f"{path}: {reason}" for path, reason in self.files.items()]
        return as_text(f"VerifyReport: {self._summary()}", rows + [": ".join(row) for row in self._rows()])

    def _repr_html_(self) -> str:
        wrong = [f"{path}: {reason}" for path, reason in self.files.items()]
        return as_html(self._summary(), ("member", "found"), self._rows(), wrong)

    def _summary(self) -> str:
        return f"{self.directory}: {'everything matches' if self.ok else 'does NOT match what was written'}"

    def _rows(self) -> list[list[str]]:
        return [
            [each.member, "; ".join(each.reasons) or f"as recorded; origin {each.origin}"]
            for each in self.members
        ]

    def to_json(self) -> dict[str, Any]:
        """All of it as plain JSON values."""
        return {"ok": self.ok, **asdict(self)}


def verify(
    directory: str | Path,
    *,
    origins: bool = False,
    modules: Mapping[str, nn.Module] | None = None,
    trust_remote_code: bool = False,
) -> VerifyReport:
    """Check an artifact, or the files of an export.

    Args:
        directory: the folder.
        origins: whether members are compared with their origins, where these can still be loaded: opens the folders,
            files and hub ids that the artifact names. Without it nothing outside of the folder is opened.
        modules: for members that were live modules: the original modules, weights included, to compare with.
        trust_remote_code: whether Python code that the artifact names may run: factories, and files that came
            with a transformers model.

    Returns:
        what was found; an origin that cannot be reached is said so and is no failure.

    Raises:
        ArtifactError: where the manifest cannot be read.

    Example:
        >>> import surgery
        >>> surgery.verify("joint").ok
        True
    """
    folder = Path(directory).expanduser()
    if (found := _export(folder, origins)) is not None:
        return found
    manifest = read_manifest(folder)
    check_modules(modules, manifest.members)
    check_unoccupied({name: module for name, module in (modules or {}).items() if name in manifest.members})
    files = wrong_hashes(folder, manifest)
    if not checksum_holds(folder):
        files = {NAME: "is not the file that was written: its checksum is another one", **files}
    permission = Permission.of_artifact(trust_remote_code)
    spoilt = {name: [p for p in _files_of(manifest, name) if p in files] for name in manifest.members}
    sound = [name for name, paths in spoilt.items() if not paths]
    states, problem = _read_states(folder, manifest, sound)
    checks = []
    for name, paths in spoilt.items():
        if paths or problem:
            reason = f"it was not rebuilt: {', '.join(paths)} is damaged" if paths else problem
            checks.append(MemberCheck(name, False, (reason,), False, "not compared"))
        else:
            given = (modules or {}).get(name)
            origin, where = load_recorded(manifest, name, given, permission, origins)
            joint, failure, not_built = _load_member(folder, manifest, name, given, trust_remote_code)
            reasons = [failure] if failure else []
            check = compare(manifest, name, states(name), joint, reasons, origin, where)
            checks.append(replace(check, not_built=not_built))
    return VerifyReport(str(folder), files, tuple(checks))


def _export(folder: Path, origins: bool) -> VerifyReport | None:
    """A check of the files that an export wrote; None of an artifact, and of what nobody recorded."""
    if os.path.lexists(folder / NAME) or not folder.is_dir():
        return None
    what, files = exported(folder), wrong_files(folder)
    if what is None or files is None:
        return None
    if origins:
        raise ArtifactError(
            f"Origins are recorded in artifacts, but {folder} is {what}; leave out `origins` to have its files "
            "compared with those that were written."
        )
    return VerifyReport(str(folder), files, what=str(what))


def _read_states(
    folder: Path, manifest: Manifest, names: Sequence[str]
) -> tuple[Callable[[str], LazyState], str]:
    """How to rebuild the state dict of any of some members, and what is wrong where that cannot be."""
    if not names:
        return lambda _: LazyState({}), ""
    try:
        stored = read_stored(folder, manifest, names)
    except SurgeryError as error:
        return lambda _: LazyState({}), str(error)
    return partial(lazy_state_of, stored), ""


def load_recorded(
    manifest: Manifest, name: str, given: nn.Module | None, permission: Permission, wanted: bool
) -> tuple[Member | None, str]:
    """The member as it was before it was joined, or why it cannot be had."""
    origin = origin_of(manifest, name)
    if given is not None:
        return Member(name, given.eval(), inputs_of(manifest, name), origin), "given"
    if origin.kind == "module" or origin.reference == origin.architecture.rpartition(".")[2]:
        return None, "not compared: it was a live module"
    if not wanted and not ships(origin):
        return None, "not asked for"
    try:
        recorded = inputs_of(manifest, name)
        found = load_origin(_pinned(origin), name=name, permission=permission, inputs=recorded)
    except ConsentError:
        return None, "not compared: its code may not run"
    except SurgeryError as error:
        return None, f"not reached: {error}"
    hashes = (manifest.report or FitReport()).hashes
    unknown = found.origin.seed is not None and origin.seed is None  # written before seeds were recorded
    if unknown and content_hash(whole_state(found.module)) != hashes.get(name):
        return None, "not compared: its weights were drawn at random, from a seed that was not recorded"
    return found, "found"


def _load_member(
    folder: Path, manifest: Manifest, name: str, given: nn.Module | None, trust: bool
) -> tuple[JointModel | None, str | None, str | None]:
    """The member from the artifact, ready to run; what is wrong where it cannot be had, or why it was not built."""
    modules = None if given is None else {name: duplicate(given)}
    if given is None and origin_of(manifest, name).kind == "module":
        return None, None, "it was a live module, which Python passes as modules="
    try:
        return load(folder, modules=modules, members=[name], trust_remote_code=trust), None, None
    except ConsentError:  # no fault of the artifact's
        return None, None, "its code needs `trust_remote_code`"
    except SurgeryError as error:
        return None, f"it cannot be rebuilt: {error}", None


def _files_of(manifest: Manifest, name: str) -> list[str]:
    """Files that a member is read from."""
    lenders = {key.member for key in manifest.same_of(name).values()}
    folders = {manifest.folder_of(each) for each in (name, *lenders)} | {str(Path(TOGETHER).parent)}
    tensors = [path for path in manifest.files if path.endswith(".safetensors")]
    mine = [path for path in tensors if path.startswith("dictionary") or path.rpartition("/")[0] in folders]
    return [*mine, *small_files(manifest, name).values()]


def _pinned(origin: Origin) -> Origin:
    """The origin, its reference with the recorded commit where it is a hub id without one."""
    hub = (
        origin.kind == "transformers" and origin.revision and not Path(origin.reference).expanduser().exists()
    )
    head, mark, options = origin.reference.partition("?")
    if not hub or "@" in head:
        return origin
    return replace(origin, reference=f"{head}@{origin.revision}{mark}{options}")
