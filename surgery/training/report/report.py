"""What a training run reached, and how large its dictionary has become."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, Field, TypeAdapter

from surgery.settings.quantities import Count, Integer, NotNegative
from surgery.training.tasks.score import Score
from surgery.util.showing import as_html, as_text, finite, plural
from surgery.util.wording import count, percent


def in_phases(generations: int, burn_in: int, final: int) -> str:
    """How many generations were done, as the settings count them.

    Example:
        >>> in_phases(3, 0, 1), in_phases(5, 2, 0), in_phases(1, 0, 0)
        ('3 generations (2 + 1 final)', '5 generations (2 burn-in + 3)', '1 generation')
    """
    rest = generations - burn_in - final
    parts = (
        [f"{burn_in} burn-in"] * bool(burn_in) + [f"{rest}"] * bool(rest) + [f"{final} final"] * bool(final)
    )
    said = f" ({' + '.join(parts)})" if burn_in or final else ""
    return plural(generations, "generation") + said


def logged_phases(generations: Sequence[Mapping[str, Any]]) -> str:
    """`in_phases` of a log's lines of generations."""
    counts = Counter(line.get("phase") for line in generations)
    return in_phases(len(generations), counts["burn-in"], counts["final"])


@dataclass(frozen=True, repr=False)
class TrainReport:
    """How a run went.

    Attributes:
        generations: that were done, burn-in and final ones among them.
        burn_in: how many of these were burn-in.
        final: how many were final.
        best: the generation whose state was kept.
        kept: by member the generation whose state was kept, where it is not the same for all.
        scores: by task, of the state that was kept, on validation data.
        tests: by task, of the state that was kept, on test data.
        hypermodules: by bank.
        templates: by stack.
        numbers: parameters in the dictionary now, and in the sites that it generates.
        first: by task, of the run's first validation.
        sizes: parameters and bytes of every member `alone`, in the joint model at its `start`, and `joint` now; see
            `surgery.training.report.comparison`.
        trained: how many parameters training changed.
        adapted: by task that adapted to another domain, by which losses and to what; see `adapted_of`.
        methods: what other methods reached, by their names.
        loosened: how many tensors had been compressed by a fit and changed since, by the dtype in which they are stored
            now; nothing where there was no fit.
        stopped: why the run ended.
        seconds: in all, resumed runs together.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="ignore", strict=True)

    generations: Count = 0
    best: Integer = 0
    kept: Mapping[str, Annotated[int, Field(ge=0, lt=1 << 53)]] = field(default_factory=dict)
    scores: Mapping[str, Score] = field(default_factory=dict)
    tests: Mapping[str, Score] = field(default_factory=dict)
    hypermodules: Mapping[str, Count] = field(default_factory=dict)
    templates: Mapping[str, Count] = field(default_factory=dict)
    numbers: tuple[Count, Count] = (0, 0)
    trained: Count = 0
    adapted: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    first: Mapping[str, Score] = field(default_factory=dict)
    sizes: Mapping[str, Mapping[str, Mapping[str, Count]]] = field(default_factory=dict)
    methods: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    loosened: Mapping[str, Count] = field(default_factory=dict)
    burn_in: Count = 0
    final: Count = 0
    stopped: str = "done"
    seconds: NotNegative = 0.0

    def __repr__(self) -> str:
        return as_text(
            f"TrainReport: {self._summary()}", [", ".join(filter(None, row)) for row in self._rows()]
        )

    def _repr_html_(self) -> str:
        return as_html("Training", ("task", "loss", "metric", "on"), self._rows(), [f"{self._summary()}."])

    def _summary(self) -> str:
        now, whole = self.numbers
        generations = in_phases(self.generations, self.burn_in, self.final)
        return (
            f"{generations} in {self.seconds:.0f} s ({self.stopped}), kept is "
            f"{self.kept_words}; {count(now)} of {count(whole)} parameters of sites ({percent(now / max(whole, 1))})"
        )

    @property
    def kept_words(self) -> str:
        """The number of the generation that was kept, counted from 1, or those of the members."""
        numbers = [f"{generation + 1} of {name}" for name, generation in self.kept.items()]
        return ", ".join(numbers) or str(self.best + 1)

    def _rows(self) -> list[list[str]]:
        return [
            [name, *score.words(), part]
            for part, scores in (("validation", self.scores), ("test", self.tests))
            for name, score in scores.items()
        ]

    @property
    def note(self) -> str:
        """What became of an earlier fit, in a sentence; empty where there was none."""
        if not self.loosened:
            return ""
        ways = " and ".join(
            f"{number} tensor{' is' if number == 1 else 's are'} stored in {dtype}"
            for dtype, number in self.loosened.items()
        )
        return f"Weights changed since the fit: {ways} now, its target and errors no longer hold."

    @property
    def made(self) -> list[str]:
        """What there is in all banks and stacks, such as `12 hypermodules`."""
        found = {"hypermodules": self.hypermodules, "templates": self.templates}
        return [f"{sum(each.values())} {name}" for name, each in found.items() if each]

    def document(self) -> dict[str, Any]:
        """As JSON."""
        scores = {name: score.document() for name, score in self.scores.items()}
        tests = {name: score.document() for name, score in self.tests.items()}
        first = {name: score.document() for name, score in self.first.items()}
        sizes = {"hypermodules": dict(self.hypermodules), "templates": dict(self.templates)}
        rest = {key: value for key, value in vars(self).items() if key not in ("methods", "kept") or value}
        return {**rest, "scores": scores, "tests": tests, "first": first, **sizes}

    def to_json(self) -> dict[str, Any]:
        """What a manifest holds: JSON values that the weights alone decide, without what there is nothing to say of."""
        found = finite({**self.document(), "seconds": 0.0})
        usual = finite(TrainReport().document())
        return {key: value for key, value in found.items() if key not in usual or value != usual[key]}

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> TrainReport:
        """The report whose `document` it is, as the last line of a log has it; what is missing is at its default.

        Raises:
            ValidationError: where it is none.
        """
        return _REPORT.validate_json(json.dumps(document))


_REPORT = TypeAdapter(TrainReport)
