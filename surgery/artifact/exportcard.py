"""Writes the model card of an export: what it is, how far it is from the original, and how it is opened."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from surgery.disk.untrusted import UnreadableError, as_mapping, parse_json
from surgery.fitting.report import FitReport
from surgery.members.member import Member, Origin
from surgery.members.origins.licences import CARD, licence_of
from surgery.safetensors.reading import tensors_in_file
from surgery.util.wording import percent, size

WHAT = {
    "plain": "ordinary weights",
    "transformers": "compressed weights, decoded while they are loaded",
    "compressed-tensors": "linear layers as packed integers, by compressed-tensors' `pack-quantized`",
}
"""What a format holds, in words."""
_OPEN = {
    "transformers": "from transformers import {kind}\n\nmodel = {kind}.from_pretrained({where})",
    "sentences": "from sentence_transformers import SentenceTransformer\n\nmodel = SentenceTransformer({where})",
    "timm": 'import timm\n\nmodel = timm.create_model("local-dir:.", pretrained=True)',
    "state": (
        "from safetensors.torch import load_file\n\n"
        'model = ...  # {kind}\nmodel.load_state_dict(load_file("model.safetensors"))'
    ),
}  # fmt: skip


def make_export_card(member: Member, format: str, report: Any, nbytes: int, lines: Sequence[str] = ()) -> str:
    """The text of an export's `README.md`.

    Args:
        member: as it is described where it is stored.
        format: `plain`, `transformers` or `compressed-tensors`.
        report: of the fit that it comes from; None, or another report, where nothing is known of its error.
        nbytes: of its tensors.
        lines: what became of them, for people.
    """
    from huggingface_hub import ModelCard, ModelCardData

    origin, files = member.origin, member.files
    library = {"transformers": "transformers", "timm": "timm"}.get(origin.kind)
    sentences = library == "transformers" and "modules.json" in files and format != "compressed-tensors"
    base = hub_id(origin)
    said: dict[str, Any] = {**licence(member)}
    data = ModelCardData(
        library_name="sentence-transformers" if sentences else library,
        base_model=base,
        base_model_relation="quantized" if base and format != "plain" else None,
        tags=["model-surgery", *(["compressed-tensors"] if format == "compressed-tensors" else [])],
        **said,
    )
    name = f"[{base}](https://huggingface.co/{base})" if base else f"`{origin.architecture}`"
    changes = "".join(f"\n- {line}" for line in lines)
    sections = [
        f"# {member.name}",
        f"{name} as {WHAT[format]}: tensors of {size(nbytes)}. {_error(report, member.name)}{changes}",
        f"## Use\n\n```python\n{_use(origin, format, sentences)}\n```",
    ]
    if format == "transformers":
        sections.append(
            "Without `import surgery` (`pip install model-surgery`) it does not load. `save_pretrained` writes "
            "ordinary weights."
        )
    if format == "compressed-tensors":
        sections.append("It needs `pip install compressed-tensors`, and nothing of model-surgery.")
    text = "\n\n".join(sections)
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n"))


def write_export_card(
    folder: Path, member: Member, format: str, report: Any, lines: Sequence[str] = ()
) -> None:
    """Write the card of an export that lies in a folder."""
    nbytes = sum(
        each.nbytes for path in folder.glob("*.safetensors") for each in tensors_in_file(path).values()
    )
    card = make_export_card(member, format, report, nbytes, lines)
    (folder / CARD).write_text(card, encoding="utf-8")


def licence(member: Member) -> dict[str, str]:
    """What is known of a member's licence: by the card that it came with, or by timm's configuration."""
    if said := licence_of(member.files.get(CARD, b"").decode(errors="replace")):
        return said
    if member.origin.kind != "timm":
        return {}
    try:
        config = as_mapping(parse_json(member.files.get("config.json", b"{}"), finite=False, unique=False))
    except UnreadableError:
        return {}
    inner = config.get("pretrained_cfg")
    found = config.get("license") or (inner.get("license") if isinstance(inner, Mapping) else None)
    return licence_of(f"---\nlicense: {json.dumps(found)}\n---\n") if isinstance(found, str) else {}


def hub_id(origin: Origin | Any) -> str | None:
    """The hub's name of a member's origin, where it came from there."""
    if origin.kind not in ("transformers", "timm") or not origin.revision:
        return None
    return origin.reference.partition("@")[0].partition("?")[0].removeprefix("timm:")


def _error(report: Any, member: str) -> str:
    """How far outputs moved, in a sentence."""
    if not isinstance(report, FitReport) or (error := report.error(member)) is None:
        return "How far its outputs are from the original's was not measured."
    if not error:
        return "Its weights are the original's."
    on = "real inputs" if member in report.given else "made-up inputs"
    bound = report.bound_of(member)
    asked = f"; at most {percent(bound, 2)} was asked for" if bound else ""
    return f"Outputs on {on} moved by {percent(error, 2)} of the original's (relative L2{asked})."


def _use(origin: Origin, format: str, sentences: bool) -> str:
    kind = "state" if origin.kind not in ("transformers", "timm") else origin.kind
    first = "import surgery  # before the model is loaded\n" if format == "transformers" else ""
    named = origin.architecture.rpartition(".")[2] if kind == "transformers" else origin.architecture
    return first + _OPEN["sentences" if sentences else kind].format(kind=named, where='"."')
