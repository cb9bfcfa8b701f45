"""What folders of transformers have in common: which names a checkpoint has, and its configuration."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surgery.disk.files import write_files
from surgery.errors import ExportError
from surgery.members.member import Member, Origin
from surgery.members.origins.dtypes import widest
from surgery.members.references import build_architecture
from surgery.permission import Permission
from surgery.safetensors.writing import write_shards
from surgery.storage.stored import Stored
from surgery.util.quiet import quiet


def architecture(member: Member, stored: Stored, format: str, trust: bool) -> Any:
    """The transformers model that a member is, without weights.

    Args:
        member: as it is described where it is stored.
        stored: of it alone.
        format: that is asked for, for errors.
        trust: whether Python files that come with it may run.

    Raises:
        ExportError: where it is no model of transformers, modules of it were replaced, or it has extra state.
    """
    check_kind(member.name, member.origin, len(member.replaced), format)
    if stored.extra.get(member.name):
        found = ", ".join(sorted(stored.extra[member.name])[:3])
        raise _not_as_they_are(member.name, f"has extra state ({found})", format)
    return build_architecture(member.origin, member.files, permission=Permission.of_artifact(trust))


def check_kind(name: str, origin: Origin, replaced: int, format: str) -> None:
    """Whether a member can be a checkpoint of transformers, by what is known without its weights.

    Args:
        name: its own.
        origin: of it.
        replaced: how many of its modules a method replaced.
        format: that is asked for, for errors.

    Raises:
        ExportError: where it is no model of transformers, or modules of it were replaced.
    """
    if origin.kind != "transformers":
        raise _not_as_they_are(name, f"is of kind {origin.kind} ({origin.reference})", format)
    if replaced:
        raise _not_as_they_are(name, f"has {replaced} modules that a method replaced", format)


def _not_as_they_are(name: str, reason: str, format: str) -> ExportError:
    return ExportError(
        f"The format {format} is for models of transformers as they are, but member '{name}' {reason}; "
        "export it as plain or compressed."
    )


def checkpoint_names(module: Any) -> list[str]:
    """Names that `save_pretrained` writes, in the order of the state dict: one of those that the class ties."""
    tied: Mapping[str, str] = getattr(module, "all_tied_weights_keys", None) or {}
    names = [name for name, each in module.state_dict().items() if isinstance(each, Tensor)]
    return [name for name in names if tied.get(name, name) == name or tied[name] not in names]


def write_checkpoint(
    folder: Path,
    module: Any,
    member: Member,
    tensors: Mapping[str, Tensor],
    entries: Mapping[str, Any],
    dtypes: set[torch.dtype],
) -> None:
    """Write configuration, small files and tensors of a model.

    Args:
        folder: in which they are written.
        module: of the model, without weights.
        member: whose small files it has.
        tensors: by name in the checkpoint.
        entries: what the configuration says of how they are stored: `quantization_config`, and others.
        dtypes: of the model's own tensors.
    """
    with quiet():
        module.config.save_pretrained(folder)
        if module.can_generate() and module.generation_config is not None:
            module.generation_config.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["architectures"] = [type(module).__name__]
    if (dtype := widest(each for each in dtypes if each.is_floating_point)) is not None:
        config["dtype"] = str(dtype).removeprefix("torch.")
    config.update(entries)
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    write_files(member.files, folder, keep=("config.json",))
    write_shards(folder, "model", tensors, metadata={"format": "pt"})
