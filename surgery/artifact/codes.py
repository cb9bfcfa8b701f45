"""Codes: what an artifact stores of one member, inside a checkpoint of another library.

A checkpoint of transformers has a tensor for every parameter. One that is stored compressed has a *marker* there: a
tensor of its name and dtype, without elements. So a loader that does not know the codes finds another shape and
raises, where names that it does not know would leave the parameter as it was drawn. The codes themselves lie beside,
under names that begin with `surgery/`, and a document, for the library's own configuration, says what they are: the
entries that a manifest has of the member and its banks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from surgery.anatomy.plan import BankPlan, Placement, torch_dtype
from surgery.artifact.layout import encoded_entries, parts_of, plan_entries
from surgery.artifact.manifest import Manifest, contradictions
from surgery.artifact.reading import assemble, check_banks
from surgery.artifact.recorded import DICTIONARY, WEIGHTS
from surgery.core.generation import generated
from surgery.disk.untrusted import broken_rules, shown
from surgery.errors import ArtifactError, first_few
from surgery.handles.handle import CPU, Handle, Made, Shared
from surgery.storage.codecs import Encoded
from surgery.storage.keys import PartKey, PlainKey
from surgery.storage.states import lazy_state_of
from surgery.storage.stored import Stored, build_bank
from surgery.util.memory import compact

VERSION = 1
PREFIX = "surgery/"
"""What the names of codes begin with in a checkpoint."""
_MEMBER = "member"


def compressed_names(stored: Stored, member: str) -> dict[str, torch.dtype]:
    """The tensors of a member that a checkpoint has codes of, by every name that owns them, with their dtypes."""
    state = lazy_state_of(stored, member)
    sites = {name for p in stored.plan.of(member) for name in p.site.owners}
    codes = {name for name, each in stored.plain(member).items() if not each.precision.is_native}
    tied = {
        name
        for first, names in stored.ties.get(member, {}).items()
        if first in codes | sites
        for name in names
    }
    return {name: each.dtype for name, each in state.handles.items() if name in codes | sites | tied}


def pack(stored: Stored, member: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The document and the tensors of a member's codes; what it stores as it is belongs to the checkpoint itself.

    Args:
        stored: of this member alone, trimmed.
        member: its name, which the document does not have.
    """
    own = {name: each for name, each in stored.own(member).items() if not each.precision.is_native}
    banks, views, placements = plan_entries(stored)
    same = {
        key.name: str(PlainKey(_MEMBER, first.name))
        for key, first in stored.aliases.items()
        if first.name in own
    }
    sites = {p.site.name: p.site.owners for p in stored.plan.of(member) if len(p.site.owners) > 1}
    ties = {
        **{n: names for n, names in stored.ties.get(member, {}).items() if n in own or n in same},
        **sites,
    }
    entry = {
        "encoded": encoded_entries(own), "same": same, "ties": ties, "placements": placements.get(member, [])
    }  # fmt: skip
    document: dict[str, Any] = {
        "version": VERSION,
        "member": {name: each for name, each in entry.items() if each},
        "banks": {key: bank.model_dump(mode="json", exclude_defaults=True) for key, bank in banks.items()},
        "views": [view.model_dump(mode="json") for view in views],
    }
    tensors = {f"{PREFIX}{WEIGHTS}/{name}": part for name, part in parts_of(own).items()}
    shared: dict[str, Encoded] = {
        key.in_file: each for key, each in stored.tensors.items() if isinstance(key, PartKey)
    }
    tensors |= {f"{PREFIX}{DICTIONARY}/{name}": part for name, part in parts_of(shared).items()}
    document = json.loads(json.dumps({name: each for name, each in document.items() if each}))
    return document, {name: compact(tensor.detach()) for name, tensor in tensors.items()}


def unpack(document: Mapping[str, Any], tensors: Mapping[str, Tensor], where: Path) -> dict[str, Handle]:
    """Handles of the tensors that codes stand for, by all names that own them, each decoded when it is read.

    Args:
        document: as `pack` made it, or somebody else.
        tensors: of the checkpoint, whose names begin with `PREFIX`.
        where: they come from, for errors.

    Raises:
        ArtifactError: where the document is of another version or breaks a rule, or the tensors are not those of it.
    """
    manifest = _manifest(document, where)
    held: dict[str, dict[str, Tensor]] = {DICTIONARY: {}, f"members/{_MEMBER}/{WEIGHTS}": {}}
    for name, tensor in tensors.items():
        kind, _, rest = name.removeprefix(PREFIX).partition("/")
        held[DICTIONARY if kind == DICTIONARY else f"members/{_MEMBER}/{WEIGHTS}"][rest] = tensor
    calls = {stem: str(where) for stem in held}
    stored = assemble(where, manifest, [_MEMBER], held, calls)
    check_banks(where, stored)
    handles = lazy_state_of(stored, _MEMBER).handles
    for bank in stored.plan.banks:
        mine = stored.plan.in_bank(bank.key)
        made = Shared(partial(_weights, stored, bank, mine), len(mine))
        for p in mine:
            name = p.site.name
            handle = Made(
                p.site.shape,
                torch_dtype(p.site.dtype),
                CPU,
                lambda made=made, name=name: made.take()[name].read(),
            )
            handles.update(dict.fromkeys(p.site.owners, handle))
    return handles


def _weights(stored: Stored, bank: BankPlan, placements: Sequence[Placement]) -> dict[str, Handle]:
    """Handles of the weights that a bank generates, as a collapse has them, bit for bit."""
    made = generated({bank.key: build_bank(bank, stored.tensors)}, placements)
    return {name: handle for (_, name), handle in made.items()}


def _manifest(document: Mapping[str, Any], where: Path) -> Manifest:
    """The document as a manifest of one member, validated by its rules."""
    version = document.get("version")
    if version != VERSION:
        raise ArtifactError(
            f"The codes of {where} must be of version {VERSION}, but are of version {shown(version)}; install the "
            "model-surgery that wrote them, or export the member again."
        )
    member = document.get("member", {})
    if not isinstance(member, Mapping):
        raise ArtifactError(
            f"{where} must describe its codes as a mapping, found {shown(member)}; export it again."
        )
    entries = {name: each for name, each in document.items() if name in ("banks", "views")}
    origin = {"kind": "module", "reference": "", "architecture": ""}
    whole = {
        **entries, "format": "surgery", "version": 1, "files": {}, "checksum": "0" * 64,
        "members": {_MEMBER: {**member, "origin": origin}},
    }  # fmt: skip
    try:
        manifest = Manifest.model_validate_json(json.dumps(whole))
        broken = list(contradictions(manifest, where))
    except ValidationError as error:
        broken = broken_rules(error)
    if broken:
        rules = "; ".join(first_few(broken, 10))
        raise ArtifactError(f"{where} must describe its codes, but {rules}; export the member again.")
    return manifest
