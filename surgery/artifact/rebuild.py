"""Checks, before a save, that a member can be built again from its origin and files.

Between loading and saving a model may have got another classifier, more words, fewer layers or an adapter. What `load`
will build is built here first, without weights, and compared. Where it differs, configuration files are made of the
model as it is now; where that does not help either, the member is recorded as a live module.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace

from torch import nn

from surgery.artifact.recorded import misfits, stored_shapes
from surgery.core.replacing import make_again
from surgery.errors import ArtifactError, LoadError, SurgeryWarning
from surgery.members.member import Member, Origin, shapes_of
from surgery.members.origins import origin_kind
from surgery.members.origins.layers import correct_layers
from surgery.members.origins.module import live_module
from surgery.members.references import build_architecture
from surgery.storage.stored import Stored

_CODE = ("module", "factory")  # kinds that nothing is built of without running a user's code


def as_saved(member: Member, stored: Stored) -> Member:
    """The member with an origin and files that build its architecture again.

    Args:
        member: with its module.
        stored: of the joint model it belongs to.

    Returns:
        the member itself where nothing changed; otherwise with new configuration files, or as a live module, and then
        with a warning that names the tensors and what to do.
    """
    found, bad = _described(member, stored_shapes(stored, member.name))
    if bad:
        warnings.warn(
            f"Member '{member.name}' is saved as a live module, because {member.origin.reference} no longer builds "
            f"it: there are {bad}. Load it with modules={{'{member.name}': a module of its architecture}}.",
            SurgeryWarning,
            stacklevel=3,
        )
        return replace(member, origin=live_module(member.module).origin)
    return found


def as_exported(member: Member, module: nn.Module) -> Member:
    """The member with configuration files for what its module is, as `as_saved` finds them; with a warning if none fit.

    Args:
        member: to be exported.
        module: with ordinary weights.
    """
    found, bad = _described(replace(member, module=module, replaced=()), shapes_of(module))
    if bad:
        warnings.warn(
            f"Member '{member.name}' is not what its configuration builds: there are {bad}. The folder holds all "
            "tensors; read them into a module of its architecture.",
            SurgeryWarning,
            stacklevel=4,
        )
    return found


def _described(member: Member, wanted: Mapping[str, tuple[int, ...]]) -> tuple[Member, str]:
    """The member with an origin and files that build tensors of these shapes, or what does not fit."""
    if member.origin.kind in _CODE or b"auto_map" in member.files.get("config.json", b""):
        return member, ""
    bad = _misfits(member, wanted)[0]
    for origin, files, note in _anew(member, wanted) if bad else ():
        if not _misfits(replace(member, origin=origin, files=files), wanted)[0]:
            if note:
                warnings.warn(f"Member '{member.name}': {note}", SurgeryWarning, stacklevel=5)
            return replace(member, origin=origin, files=files), ""
    return member, bad


def _anew(
    member: Member, wanted: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[Origin, dict[str, bytes], str]]:
    """Origins and files made of the module as it is, each with a sentence where its own configuration disagrees."""
    adopt = getattr(origin_kind(member.origin.kind), "adopt", None)
    try:
        found = adopt(member.module) if adopt else None
    except Exception:  # a changed module may lack what its library writes a configuration from
        found = None
    if found is None:
        return
    # How a class is built is kept; timm's options are its arguments, and those are the module's own.
    kept = dict(member.origin.options) if member.origin.kind == "transformers" else {}
    origin = replace(
        found.origin, architecture=member.origin.architecture, options={**found.origin.options, **kept}
    )
    files = {**member.files, **found.files}
    yield origin, files, ""
    if "config.json" in files:
        built = _misfits(replace(member, origin=origin, files=files), wanted)[1]
        config, notes = correct_layers(json.loads(files["config.json"]), built, wanted)
        if notes:
            written = {**files, "config.json": (json.dumps(config, indent=2) + "\n").encode()}
            yield (
                origin,
                written,
                f"{'; '.join(notes)}; its configuration is written with what the tensors hold",
            )


def _misfits(member: Member, wanted: Mapping[str, tuple[int, ...]]) -> tuple[str, Collection[str]]:
    """How the architecture that `load` will build of a member's origin and files, its replacements made again, differs
    from tensors of these shapes, and its tensors' names."""
    try:
        module = build_architecture(member.origin, member.files)
        make_again(member.name, module, [each.replacement for each in member.replaced])
    except (LoadError, ArtifactError) as error:
        return f"no module, since {error}", ()
    own = shapes_of(module)
    return misfits(wanted, own), own.keys()
