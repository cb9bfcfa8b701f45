"""What a fit met, what each of its means saved, and how every tensor is stored.

A report is the same value in memory and in a manifest, which pydantic reads it from: types and bounds of its fields are
what somebody else's manifest is held to.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, ConfigDict, Field
from torch import Tensor

from surgery.anatomy.plan import Plan
from surgery.core.registry import methods_of
from surgery.core.sizes import TensorReport, count_tensors
from surgery.fitting.variation import faint_words
from surgery.settings.quantities import Count, Integer
from surgery.storage.stored import Stored
from surgery.util.showing import as_html, as_text, finite, plural
from surgery.util.wording import percent, size


def saved_words(saved: Mapping[str, int]) -> str:
    """What each means saved, in words, and how much more those take that saved nothing.

    Args:
        saved: bytes by means, as in a report.

    Example:
        >>> saved_words({"sharing": 0, "precision": 4096, "replacing": -2048})
        '0 B by sharing, 4.1 kB by precision; replacing takes 2.0 kB more'
    """
    words = ", ".join(f"{size(amount)} by {means}" for means, amount in saved.items() if amount >= 0)
    more = [f"{means} takes {size(-amount)} more" for means, amount in saved.items() if amount < 0]
    return "; ".join([words or "nothing", *more])


def _read_error(value: Any) -> Any:
    """An error as JSON has it, which cannot say NaN."""
    if value is None:
        return math.nan
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"an error must be a finite number or null, found {value}")
    return value


Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Error = Annotated[float, BeforeValidator(_read_error)]
Variation = Annotated[float, Field(ge=0, allow_inf_nan=False)]


def _bound(target: str) -> float | None:
    found = _BOUND.match(target)
    return float(found[1]) if found else None


@dataclass(frozen=True)
class Probes:
    """What outputs were measured on.

    Attributes:
        seed: of made-up inputs; None where nothing had to be measured.
        given: members that had real inputs.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="ignore", strict=True)

    seed: Count | None = None
    given: tuple[str, ...] = ()


@dataclass(frozen=True)
class StackReport:
    """How the layers of a stack are stored.

    Attributes:
        layers: how many there are.
        templates: K; as many as distinct layers where each keeps its own parameters.
        original: bytes that the layers had.
        nbytes: bytes that they have.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    layers: Count
    templates: Count
    original: Count
    nbytes: Count

    @property
    def made_of(self) -> str:
        """What the layers are made of, in words."""
        return plural(self.templates, "template")

    @property
    def note(self) -> str:
        """What the number of templates says of the stack, in words; empty where it says nothing."""
        apart = self.templates == self.layers
        return "as many templates as layers: fewer do not pay here" if apart else ""


@dataclass(frozen=True)
class Added:
    """What is known of a member that was added after the fit.

    Attributes:
        target: what was asked for, in words.
        met: whether it was met.
        stored_bytes: of the tensors that it added.
        saved: bytes that sharing and precision each saved.
        probes: what its outputs were measured on.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="ignore", strict=True)

    target: str = ""
    met: bool = False
    stored_bytes: Count = 0
    saved: Mapping[str, Integer] = field(default_factory=dict)
    probes: Probes = Probes()

    @property
    def bound(self) -> float | None:
        """The error that its target allows; None where it is another one."""
        return _bound(self.target)


@dataclass(frozen=True, repr=False)
class FitReport:
    """The outcome of a fit; of an artifact, as far as it still holds for the weights there.

    Attributes:
        target: what was asked for, in words; empty where weights changed since.
        met: whether the target was met.
        original_bytes: of each member's tensors alone; see `surgery.core.sizes`.
        stored_bytes: of all stored tensors, index included; 0 for some members alone, or where weights changed since.
        saved: bytes that `sharing` and `precision` each saved; sharing's are what the same tensors would have
            cost apart, at the precisions they would then have had.
        errors: measured relative L2 output error of each member on the probe inputs; NaN where outputs are no numbers.
        hashes: content hash of each member's state dict before the fit, to know its origin by; of members that had
            changed since they came from there, none.
        probes: what outputs were measured on.
        detail: every tensor; nothing after a load.
        stacks: what methods say of the stacks of a plan, by name.
        parameters: of each member alone; see `surgery.core.sizes`.
        changed: members whose weights changed after the fit: nothing that it measured is said of them.
        added: members that were added after the fit; `target` and `probes` do not speak of these.
        variations: how much of each member's outputs differs between the probe inputs, relative to their size.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="ignore", strict=True)

    target: str = ""
    met: bool = False
    original_bytes: Mapping[str, Count] = field(default_factory=dict)
    stored_bytes: Count = 0
    saved: Mapping[str, Integer] = field(default_factory=dict)
    errors: Mapping[str, Error] = field(default_factory=dict)
    hashes: Mapping[str, Digest] = field(default_factory=dict)
    probes: Probes = Probes()
    detail: tuple[TensorReport, ...] = ()
    stacks: Mapping[str, StackReport | Mapping[str, Count]] = field(default_factory=dict)
    parameters: Mapping[str, Count] = field(default_factory=dict)
    changed: tuple[str, ...] = ()
    added: Mapping[str, Added] = field(default_factory=dict)
    variations: Mapping[str, Variation] = field(default_factory=dict)

    def __repr__(self) -> str:
        return as_text(f"FitReport: {self._summary()}", [", ".join(row) for row in self._rows()])

    def _repr_html_(self) -> str:
        columns = ("member", "before", "after", "output moved by")
        return as_html("Fit", columns, self._rows(), [f"{self._summary()}."])

    def error(self, member: str) -> float | None:
        """How far a member's outputs moved; None where that was not measured, or is no number."""
        found = self.errors.get(member, math.nan)
        return found if math.isfinite(found) else None

    @property
    def largest_error(self) -> float | None:
        """The error of the member whose outputs moved farthest; None where none was measured."""
        return max((e for name in self.errors if (e := self.error(name)) is not None), default=None)

    @property
    def faint(self) -> str:
        """What is to be said of members whose outputs hardly differ between inputs; empty where all is well."""
        return faint_words(self.errors, self.variations)

    @property
    def bound(self) -> float | None:
        """The error that the target allows each member; None where it is another one."""
        return _bound(self.target)

    def probes_of(self, member: str) -> Probes:
        """What a member's outputs were measured on."""
        return self.added[member].probes if member in self.added else self.probes

    @property
    def given(self) -> tuple[str, ...]:
        """Members that were measured on real inputs."""
        return (*self.probes.given, *(name for name, each in self.added.items() if name in each.probes.given))

    def bound_of(self, member: str) -> float | None:
        """The error that a member was allowed; None where its target is another one."""
        return self.added[member].bound if member in self.added else self.bound

    def _summary(self) -> str:
        before = sum(self.original_bytes.values())
        said = [f"{self.target}, {'met' if self.met else 'NOT met'}"] if self.target else []
        if self.stored_bytes:
            ratio = percent(self.stored_bytes / max(before, 1))
            said.append(f"{size(self.stored_bytes)} of {size(before)} ({ratio})")
        if self.saved:
            said.append(f"saved {saved_words(self.saved)}")
        if self.added:
            words = (
                f"{name} ({each.target}{'' if each.met else ', NOT met'})"
                for name, each in self.added.items()
            )
            said.append(f"added since: {', '.join(words)}")
        if self.changed:
            said.append(f"weights of {', '.join(self.changed)} changed since")
        return "; ".join(said) or "nothing is known of these weights"

    def _rows(self) -> list[list[str]]:
        after: dict[str, int] = {}
        for row in self.detail:
            after[row.member] = after.get(row.member, 0) + row.nbytes
        moved = {name: self.error(name) for name in self.original_bytes}
        return [
            [
                name,
                size(before),
                size(after[name]) if name in after else "-",
                "-" if (error := moved[name]) is None else percent(error, digits=2),
            ]
            for name, before in self.original_bytes.items()
        ]

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON values, without the detail and without what is empty."""
        always = _MEASURED if self.saved else ("met",) if self.target else ()
        found = asdict(replace(self, detail=()))
        found["probes"] = {} if self.probes == Probes() else found["probes"]
        return {k: finite(each) for k, each in found.items() if k in always or each}


_BOUND = re.compile(r"max-error (\d+(?:\.\d+)?(?:e[+-]?\d+)?)(?: |$)")
_MEASURED = ("target", "met", "original_bytes", "stored_bytes", "saved", "errors", "hashes", "probes")


def describe(stored: Stored, originals: Mapping[str, Mapping[str, Any]]) -> tuple[TensorReport, ...]:
    """How every tensor is stored, in the members' order."""
    rows = {(row.member, row.name): row for row in count_tensors(stored)}
    return tuple(rows[member, name] for member, tensors in originals.items() for name in tensors)


def describe_stacks(
    plan: Plan, stored: Stored, originals: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, Any]:
    """What the methods of a plan say of its stacks.

    Args:
        plan: as it was before the fit.
        stored: what the fit made.
        originals: by member.
    """
    found: dict[str, Any] = {}
    for method in methods_of(plan):
        found |= method.report(plan.of_method(method.name), stored, originals)
    return found
