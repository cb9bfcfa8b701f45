"""Writes the model card of an artifact."""

from __future__ import annotations

from collections.abc import Mapping

from surgery.artifact.exportcard import hub_id
from surgery.artifact.manifest import Manifest, OriginEntry
from surgery.artifact.shares import Shares
from surgery.errors import first_few
from surgery.fitting.report import FitReport, saved_words
from surgery.members.origins.timm import without_weights
from surgery.members.replacement import count_replaced
from surgery.permission import SHIPPED
from surgery.util.wording import percent, size

ROWS = 24  # members listed one by one
PICTURE = "sharing.png"
USE = """## Use

```python
import surgery

joint = surgery.load("."{how})
output = joint["{name}"](...)
```

```
surgery verify .
surgery export . --member {name} --format plain --out {name}
```"""


def make_card(manifest: Manifest, shares: Shares, *, picture: bool = True) -> str:
    """The text of `README.md`, from what the manifest records and nothing else.

    Args:
        manifest: as it will be written.
        shares: bytes by member, as `count_shares` returns them.
        picture: whether `sharing.png` is written too.
    """
    from huggingface_hub import ModelCard, ModelCardData

    origins = {name: _origin(manifest, name) for name in manifest.members}
    libraries = sorted({"transformers", "timm"} & {origin.kind for origin in origins.values()})
    bases = [base for origin in origins.values() if (base := hub_id(origin))]
    data = ModelCardData(
        library_name="model-surgery",
        base_model=sorted(set(bases)) or None,
        tags=["model-surgery", "merge", *libraries],
    )
    sections = [
        _opening(shares),
        f"![Who shares what]({PICTURE})" if picture else "",
        _table(manifest, shares),
        _report(manifest.report),
        _use(origins),
        _contents(manifest),
    ]
    text = "\n\n".join(section for section in sections if section)
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n"))


def _opening(shares: Shares) -> str:
    members, before, now = shares.members, sum(shares.before.values()), sum(shares.after.values())
    ratio = f", {percent(now / before)} of that" if before else ""
    title = ", ".join(members) if len(members) <= 4 else f"{len(members)} models"
    if len(members) == 1:
        return (
            f"# {title}\n\nOne model, tensors of {size(before)} before, {size(now)} here{ratio}. "
            "It comes back as its own class, ready to run, to fine-tune, or to export."
        )
    return (
        f"# {title}\n\n{len(members)} models in one folder: tensors of {size(before)} before, "
        f"{size(now)} here{ratio}. Each comes back as its own class, "
        "ready to run, to fine-tune, or to export."
    )


def _table(manifest: Manifest, shares: Shares) -> str:
    members, report = manifest.members, manifest.report or FitReport()
    lines = ["| member | from | before | here | output moved |", "| --- | --- | ---: | ---: | ---: |"]
    for name in list(members)[:ROWS]:
        error = report.error(name)
        moved = "not measured" if error is None else percent(error, digits=2)
        origin = _cell(_origin(manifest, name))
        now = size(shares.after[name])
        lines.append(f"| {name} | {origin} | {size(shares.before[name])} | {now} | {moved} |")
    if len(members) > ROWS:
        lines.append(f"| {first_few(members, ROWS)[-1]} | | | | |")
    return "\n".join(lines)


def _report(report: FitReport | None) -> str:
    if report is None:
        return ""
    lines = []
    if report.target:
        lines.append(f"Target: {report.target}, {'met' if report.met else 'not met'}.")
    for name, each in report.added.items():
        added = f"{name} was added later, in {size(each.stored_bytes)} more"
        lines.append(f"{added}; its target: {each.target}, {'met' if each.met else 'not met'}.")
    if report.saved:
        lines.append(f"Saved: {saved_words(report.saved)}.")
    if report.errors:
        given = report.given
        real = f", real ones for {', '.join(given)}" if given else ""
        lines.append(
            "Output moved: relative L2 difference from the original's outputs, the largest over output "
            f"tensors, on seeded made-up inputs{real}."
        )
        if report.faint:
            lines.append(report.faint)
        if others := [name for name in report.errors if name not in report.hashes]:
            lines.append(
                f"{', '.join(others)} had been changed before: outputs are compared with those before the fit."
            )
    if changed := report.changed:
        lines.append(
            f"Weights of {', '.join(changed)} changed after the fit: what changed is stored in its own dtype, and what "
            "the fit had measured of it is left out."
        )
    return "\n".join(lines)


def _use(origins: Mapping[str, OriginEntry]) -> str:
    """How members are loaded: with the user's own modules or consent where these are needed."""
    live = [name for name, origin in origins.items() if origin.kind == "module"]
    made = [each for each in origins.values() if each.kind == "factory"]
    foreign = any(each.reference.partition("?")[0] not in SHIPPED for each in made)
    given = ", ".join(f'"{name}": ...' for name in live[:3]) + ", ..." * (len(live) > 3)
    how = f", modules={{{given}}}" if live else ""
    how += ", trust_remote_code=True" if foreign else ""
    return USE.format(name=next(iter(origins)), how=how)


def _contents(manifest: Manifest) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    banks = manifest.banks
    lines = [
        f"- bank {key}: {bank.locations:,} blocks of {bank.block[0]}x{bank.block[1]}"
        + (f" by {bank.method}, which package {bank.package} registers" if bank.package else "")
        for key, bank in list(banks.items())[:ROWS]
        if not bank.stack
    ]
    for name in dict.fromkeys(bank.stack for bank in banks.values() if bank.stack):
        own = [bank for bank in banks.values() if bank.stack == name]
        lines.append(
            f"- {name}: {own[0].locations:,} layers from shared templates, {len(own)} tensors of each layer, "
            f"{sum(bank.block[1] for bank in own):,} parameters"
        )
    for name, entry in list(manifest.members.items())[:ROWS]:
        if entry.replacements:
            packages = sorted({each.package for each in entry.replacements if each.package})
            needs = f", which package {' and '.join(packages)} registers" if packages else ""
            lines.append(f"- {name}: {count_replaced([each.method for each in entry.replacements])}{needs}")
    return "## Contents\n\n" + "\n".join([*lines, f"- written with {versions}"])


def _origin(manifest: Manifest, name: str) -> OriginEntry:
    origin = manifest.members[manifest.members[name].like or name].origin
    assert origin is not None  # that of the member that it is like
    return origin


def _cell(origin: OriginEntry) -> str:
    reference, architecture = origin.reference, origin.architecture
    if reference.startswith("timm:"):  # where somebody's weights lay tells a reader nothing
        reference = without_weights(reference)
    local = reference.startswith(("/", "~", ".")) or ("\\" in reference)
    named = architecture if local or reference == architecture else f"{reference} ({architecture})"
    return "`" + named.replace("|", "\\|").replace("`", "'")[:120] + "`"
