"""The reference tables of train_your_own.md, made from the settings: `python docs/tables.py` writes them anew.

Everything between `<!-- tables -->` and `<!-- end of tables -->` is written by this program; a test compares.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

PAGE = Path(__file__).with_name("train_your_own.md")
BEGIN, END = "<!-- tables -->", "<!-- end of tables -->"
LARGE = 1 << 16  # bounds from here on are those of computers


def page_with_tables(text: str) -> str:
    """The page with its tables as they are now."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin and end, f"{PAGE.name} needs {BEGIN} and {END}"
    return f"{before}{BEGIN}\n\n{tables()}\n\n{END}{after}"


def tables() -> str:
    """All of them."""
    from surgery.methods.hypermodules.settings import Evolution
    from surgery.methods.templates.settings import Settings, TemplateSettings
    from surgery.settings.recipe import Model, Parameters, Recipe, Select, TaskSpec
    from surgery.settings.training import Adaptation, Optimizer, Stopping, Training

    parts = [
        "### Keys of a recipe",
        keys("", Recipe),
        keys("models.N.", Model),
        keys("models.N.tasks.N.", TaskSpec),
        keys("models.N.tasks.N.adaptation.", Adaptation),
        keys("parameters.", Parameters),
        keys("settings.", Settings),
        keys("select.", Select),
        "### Keys of training",
        "In Python these are the mapping that `surgery.train` takes, without `train.` in front.",
        keys("train.", Training),
        keys("train.optimizer.", Optimizer),
        keys("train.evolution.", Evolution),
        keys("train.templates.", TemplateSettings),
        keys("train.stopping.", Stopping),
        "### Losses",
        losses(),
        "### Metrics",
        metrics(),
        "### Data",
        sources(),
    ]
    return "\n\n".join(parts)


def keys(prefix: str, model: type[BaseModel]) -> str:
    """One table: every key with its values, its default and its meaning."""
    kinds = [each for each in reversed(model.__mro__) if issubclass(each, BaseModel) and each.model_fields]
    meanings = {name: text for each in kinds for name, text in attributes(each).items()}
    if lost := set(model.model_fields) - set(meanings):
        raise AssertionError(f"{model.__name__} does not say what {', '.join(sorted(lost))} means")
    schema = model.model_json_schema()
    rows = []
    for name, field in model.model_fields.items():
        values = _values(schema["properties"][name], schema.get("$defs", {}))
        default = "needed" if field.is_required() else _default(field.get_default(call_default_factory=True))
        rows.append((f"`{prefix}{name}`", values, default, meanings[name]))
    about = " ".join((inspect.getdoc(model) or "").split("\n\n")[0].split())
    return f"**`{prefix.rstrip('.') or 'recipe'}`** {about}\n\n{table(('key', 'values', 'default', 'meaning'), rows)}"


def losses() -> str:
    """Names of losses, with what they are."""
    from surgery.training.tasks.adaptation import WAYS
    from surgery.training.tasks.losses import DISTILLATION, LOSSES, TARGETED, distillation

    rows = [
        (f"`{name}`", "yes" if name in TARGETED else "no", first_line(each)) for name, each in LOSSES.items()
    ]
    rows.append((f"`{DISTILLATION}`", "no", first_line(distillation)))
    for name, way in WAYS.items():
        names = [
            n for n in inspect.signature(way).parameters if n not in ("module", "path", "source", "seed")
        ]
        rows.append((f"`{name}`", "no", f"{first_line(way)} Settings: {', '.join(f'`{n}`' for n in names)}."))
    return table(("loss", "needs targets", "what it is"), rows)


def metrics() -> str:
    """Names of metrics, with the class of torchmetrics behind each."""
    from surgery.training.tasks import metrics as room

    rows = [
        (f"`{name}`", f"`{target}`", ", ".join(f"`{key}={value}`" for key, value in preset.items()) or "-")
        for name, (target, preset) in room.SHORT.items()
    ]
    rows.append(("`top5`, `top2`, ...", "`Accuracy`", "`average=micro`, `top_k=5`"))
    about = inspect.getdoc(room) or ""
    return (
        f"{about}\n\n{table(('metric', 'class of torchmetrics', 'arguments unless others are given'), rows)}"
    )


def sources() -> str:
    """Forms of `data`, with the options of each."""
    from surgery.training.tasks import sources as room
    from surgery.training.tasks.sources_hub import PREFIX
    from surgery.training.tasks.sources_text import TEXT_ENDINGS

    forms = {
        "`file.py:function`, `package.module:function`": room.from_function,
        f"a file that ends in {', '.join(room.ENDINGS)}": room.from_tensors,
        f"a file that ends in {', '.join(TEXT_ENDINGS)}": room.from_text,
        f"`{PREFIX}NAME`": room.from_datasets,
    }
    rows = [
        (form, " ".join(re.split(r"\n\n(?=Args|Raises)", inspect.getdoc(read) or "")[0].split()))
        for form, read in forms.items()
    ]
    return table(("data", "what is read, and its options"), rows)


def table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table in Markdown."""
    names = list(heads)
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def attributes(model: type) -> dict[str, str]:
    """What a docstring says of each attribute."""
    _, _, listed = (inspect.getdoc(model) or "").partition("Attributes:\n")
    listed = re.split(r"\n\n(?=\S)", listed)[0]
    found: dict[str, str] = {}
    for block in re.split(r"\n(?= {4}\w)", f"\n{listed}")[1:]:
        name, _, meaning = " ".join(block.split()).partition(": ")
        found[name] = meaning
    return found


def first_line(thing: Any) -> str:
    """The first paragraph of a docstring."""
    return " ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split())


def _values(schema: Mapping[str, Any], known: Mapping[str, Any]) -> str:
    """What a key takes, in words, from its JSON schema."""
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(filter(None, (_values(each, known) for each in schema["anyOf"]))))
    if "$ref" in schema or "allOf" in schema:
        return "a mapping, see below"
    if "enum" in schema:
        return ", ".join(f"`{_default(each, bare=True)}`" for each in schema["enum"])
    kind = schema.get("type")
    if kind == "array":
        items = schema.get("prefixItems")
        return "M x N" if items else f"a list: {_values(schema.get('items', {}), known)}"
    words = {"string": "text", "boolean": "`true`, `false`", "object": "a mapping", "null": ""}
    if kind in words:
        return words[kind]
    if kind not in ("integer", "number"):
        return "anything"
    return ("a whole number" if kind == "integer" else "a number") + _bounds(schema)


def _bounds(schema: Mapping[str, Any]) -> str:
    low, high = schema.get("minimum"), schema.get("maximum")
    said = []
    if low is not None:
        said.append(f"from {low:g}")
    if (above := schema.get("exclusiveMinimum")) is not None:
        said.append(f"above {above:g}")
    if high is not None and high < LARGE:
        said.append(f"to {high:g}")
    if (below := schema.get("exclusiveMaximum")) is not None:
        said.append(f"below {below:g}")
    return f" {', '.join(said)}" if said else ""


def _default(value: Any, bare: bool = False) -> str:
    if isinstance(value, BaseModel):
        return "each at its default"
    if value is None or value in ((), {}):
        return "none"
    text = (
        str(value).lower()
        if isinstance(value, bool)
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )
    return text if bare else f"`{text}`"


if __name__ == "__main__":
    PAGE.write_text(page_with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
