"""Writes the model card of an adapter, and what it says where its base gets a name on the hub."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from surgery.members.origins.timm import without_weights
from surgery.util.wording import percent

Kind = Literal["folder", "hub", "function", "timm"]


@dataclass(frozen=True)
class Base:
    """The model that an adapter belongs to, as its card calls it.

    Attributes:
        name: without folders in which only its author finds it.
        kind: a folder, what the hub has by that name, a function that makes it, or a model of timm.
        revision: on the hub; empty for the newest.

    Example:
        >>> Base.of("org/name@v1?class=BertModel"), Base.of("/home/me/nets.py:small").name
        (Base(name='org/name', kind='hub', revision='v1'), 'nets.py:small')
    """

    name: str
    kind: Kind
    revision: str = ""

    @classmethod
    def of(cls, reference: str) -> Base:
        """From a reference; a folder that is gone is told from a name on the hub by its whole path."""
        head = reference.partition("?")[0]
        if reference.startswith("timm:"):
            return cls(without_weights(reference), "timm")
        path = Path(head).expanduser()
        if ".py:" in path.name:
            return cls(path.name, "function")
        if path.is_absolute() or path.is_dir():
            return cls(path.resolve().name, "folder")
        name, _, revision = head.partition("@")
        return cls(name, "hub" if name.count("/") <= 1 and ":" not in name else "function", revision)

    def phrases(self, kind: str) -> tuple[str, str, str]:
        """All that a card says of it: in its title, in its first sentence, and how it is opened.

        Args:
            kind: class of the model.
        """
        called = {
            "folder": f"`{self.name}`, a local folder,",
            "hub": f"[{self.name}](https://huggingface.co/{self.name})",
            "function": f"The model of the function `{self.name}`",
            "timm": f"`{self.name}`",
        }[self.kind]
        return (
            f"# Adapter of {self.name.rpartition('/')[2]}\n",
            called,
            f"{kind}.from_pretrained({self.name!r})",
        )


def make_adapter_card(
    base: Base, kind: str, library: str | None, lines: Sequence[str], error: float, bound: float, on: str
) -> str:
    """The text of an adapter's `README.md`.

    Args:
        base: that it belongs to.
        kind: class of the model.
        library: `transformers`, where the base is opened by that; else None.
        lines: what the adapter changes, for people, without the base's name.
        error: by which the adapted base's output differs from the member's, as measured.
        bound: that was asked for.
        on: which inputs it was measured on.
    """
    from huggingface_hub import ModelCard, ModelCardData

    opened = library == "transformers" and base.kind in ("folder", "hub")
    data = ModelCardData(
        library_name="peft",
        base_model=base.name if base.kind == "hub" else None,
        tags=["lora", "model-surgery", *([library] if library else [])],
    )
    title, called, made = base.phrases(kind)
    imports = "from peft import PeftModel\n"
    imports += (
        f"from transformers import {kind}\n" if opened else f"\nbase = ...  # the {kind} that it is of\n"
    )
    changes = "\n".join(f"- {line}" for line in lines)
    text = (
        f"{title}\n"
        f"{called} with this adapter is the model that it was exported from, but for an error: outputs on {on} "
        f"differ by {percent(error, 2)} (relative L2; at most {percent(bound, 2)} was asked for).\n\n{changes}\n\n"
        f'## Use\n\n```python\n{imports}\nmodel = PeftModel.from_pretrained({made if opened else "base"}, ".")\n```'
    )
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n"))


def with_base(card: str, kind: str, before: Base, now: Base) -> str:
    """The text of an adapter's card with another base.

    Args:
        card: as `make_adapter_card` made it.
        kind: class of the model.
        before: as it calls its base.
        now: what the hub calls it.
    """
    from huggingface_hub import ModelCard

    found: Any = ModelCard(card)
    found.data.base_model = now.name
    text = found.text
    for old, new in zip(before.phrases(kind), now.phrases(kind), strict=True):
        text = text.replace(old, new)
    return str(ModelCard(f"---\n{found.data.to_yaml()}\n---\n{text}"))
