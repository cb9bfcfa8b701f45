"""Folders that an export wrote and that are no artifacts: what each is, and who opens it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.disk.records import artifact_files, read_record
from surgery.disk.untrusted import (
    DOCUMENT_BYTES,
    UnreadableError,
    as_mapping,
    is_regular,
    parse_json,
    read_regular,
)
from surgery.util.text import printable


@dataclass(frozen=True)
class Exported:
    """A folder that holds one model for another library.

    Attributes:
        what: it is, as words after "is".
        opens: how it is opened.
    """

    what: str
    opens: str

    def __str__(self) -> str:
        return f"{self.what}: {self.opens}"


def exported(folder: Path) -> Exported | None:
    """What a folder is that is no artifact; None of one in which no model is found.

    Args:
        folder: that exists.
    """
    adapter, config = _json(folder / "adapter_config.json"), _json(folder / "config.json")
    quantization = config.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
    if adapter:
        base = printable(str(adapter.get("base_model_name_or_path", "a base")))
        return Exported(f"an adapter of {base}", "PeftModel.from_pretrained opens it on its base")
    if method == "surgery":
        return Exported(
            "a compressed checkpoint of transformers", "from_pretrained opens it after `import surgery`"
        )
    if method is not None:
        return Exported(
            f"a checkpoint of transformers, compressed as {printable(str(method))}",
            "from_pretrained opens it where that package is installed",
        )
    if config:
        library = "timm" if "architecture" in config else "transformers"
        opens = f'timm.create_model("local-dir:{printable(folder.name)}", pretrained=True) opens it'
        opens = opens if library == "timm" else "from_pretrained opens it"
        return Exported(f"a model of {library}", opens)
    if any(is_regular(path) for path in folder.glob("*.safetensors")):
        return Exported("a state dict", "load_state_dict takes what safetensors reads of it")
    return None


def parts_of_artifact(folder: Path) -> list[str]:
    """Files of tensors that only artifacts have, by their paths in a folder."""
    patterns = ("dictionary*.safetensors", "members/weights*.safetensors", "members/*/weights*.safetensors")
    return sorted(path.relative_to(folder).as_posix() for each in patterns for path in folder.glob(each))


def not_an_artifact(folder: Path, manifest: str) -> str:
    """A sentence for a folder without a manifest that was given for an artifact."""
    if held := parts_of_artifact(folder):
        return (
            f"{folder} has files of an artifact, such as {printable(held[0])}, but not its {manifest}, which says what "
            "they hold; copy the whole artifact again, or write it anew."
        )
    if whole := _artifact_around(folder.absolute()):
        return f"{folder} is a part of the artifact {whole}; give that folder."
    what = exported(folder) if folder.is_dir() else None
    if what is None:
        how = "has none" if folder.exists() else "does not exist"
        return (
            f"An artifact is a folder with a {manifest}, but {folder} {how}; give a folder that "
            "`surgery merge` wrote."
        )
    checks = (
        " `surgery verify` compares its files with those that were written." if read_record(folder) else ""
    )
    return f"An artifact is a folder with a {manifest}, but {folder} is {what}.{checks}"


def _artifact_around(folder: Path) -> Path | None:
    """The artifact of which a folder is a part."""
    for whole in list(folder.parents)[:2]:
        inside = f"{folder.relative_to(whole).as_posix()}/"
        if any(name.startswith(inside) for name in artifact_files(whole)):
            return whole
    return None


def _json(path: Path) -> Mapping[str, Any]:
    try:
        return as_mapping(parse_json(read_regular(path, DOCUMENT_BYTES)))
    except (UnreadableError, OSError):
        return {}
