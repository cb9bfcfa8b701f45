"""Rebuild: whether a member can be built again from its origin and files as it is when it is saved.

Between loading and saving a model may have got another classifier, more words, fewer layers or an adapter. What `load`
will build is built here first, without weights, and compared. Where it differs, configuration files are made of the
model as it is now; where that does not help either, the member is recorded as a live module.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import nn

from surgery.artifact.recorded import misfits, shapes_of, stored_shapes
from surgery.errors import LoadError
from surgery.member import Member, Origin
from surgery.origins import origin_kind
from surgery.origins.layers import correct_layers
from surgery.origins.module import live_module
from surgery.storage import Stored

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
    if member.origin.kind in _CODE or b"auto_map" in member.files.get("config.json", b""):
        return member
    wanted = stored_shapes(stored, member.name)
    bad = _misfits(member.origin, member.files, wanted)
    if not bad:
        return member
    for origin, files, note in _anew(member, wanted):
        if not _misfits(origin, files, wanted):
            if note:
                warnings.warn(f"Member '{member.name}': {note}", stacklevel=4)
            return replace(member, origin=origin, files=files)
    warnings.warn(
        f"Member '{member.name}' is saved as a live module, because {member.origin.reference} no longer builds it: "
        f"there are {bad}. Load it with modules={{'{member.name}': a module of its architecture}}.",
        stacklevel=4,
    )
    return replace(member, origin=live_module(member.module).origin)


def _anew(
    member: Member, wanted: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[Origin, dict[str, bytes], str]]:
    """Origins and files made of the module as it is, each with a sentence where it says more than the module does."""
    adopt = getattr(origin_kind(member.origin.kind), "adopt", None)
    try:
        found = adopt(member.module) if adopt else None
    except Exception:  # a changed module may lack what its library writes a configuration from
        found = None
    if found is None:
        return
    options = {**found.origin.options, **_without_arguments(member.origin)}
    origin = replace(found.origin, architecture=member.origin.architecture, options=options)
    files = {**member.files, **found.files}
    yield origin, files, ""
    if "config.json" in files:
        config, notes = correct_layers(json.loads(files["config.json"]), wanted)
        if notes:
            written = {**files, "config.json": (json.dumps(config, indent=2) + "\n").encode()}
            yield origin, written, f"{'; '.join(notes)}, and its config.json is written so"


def _without_arguments(origin: Origin) -> dict:
    """Options that say how a class is built, not how large: timm's are arguments, and those are the module's own."""
    return dict(origin.options) if origin.kind == "transformers" else {}


def _misfits(origin: Origin, files: Mapping[str, bytes], wanted: Mapping[str, tuple[int, ...]]) -> str:
    """How the architecture that `load` will build differs from tensors of these shapes; nothing where it does not."""
    from surgery.references import build_architecture

    try:
        module: nn.Module = build_architecture(origin, files)
    except LoadError as error:
        return f"no module, since {error}"
    return misfits(wanted, shapes_of(module))
