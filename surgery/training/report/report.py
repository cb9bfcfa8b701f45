"""What a training run reached, and how large its dictionary has become."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from surgery.training.tasks.losses import adapts_by
from surgery.training.tasks.tasks import Task
from surgery.training.tasks.validation import Score
from surgery.util.showing import as_html, as_text, plural
from surgery.util.wording import count, percent


@dataclass(frozen=True, repr=False)
class TrainReport:
    """How a run went.

    Attributes:
        generations: that were done.
        best: the generation whose state was kept.
        scores: by task, of the state that was kept, on validation data.
        tests: by task, of the state that was kept, on test data.
        hypermodules: by bank.
        templates: by stack.
        numbers: parameters in the dictionary now, and in the sites that it generates.
        first: by task, of the run's first validation.
        sizes: parameters and bytes of every member `alone`, in the joint model at its `start`, and `joint` now; see
            `surgery.training.report.comparison`.
        trained: how many numbers training changed.
        adapted: by task that adapted to another domain, by which losses and to what; see `adapted_of`.
        methods: what other methods reached, by their names.
        loosened: how many tensors had been compressed by a fit and changed since, by the dtype in which they are stored
            now; nothing where there was no fit.
        stopped: why the run ended.
        seconds: in all, resumed runs together.
    """

    generations: int
    best: int
    scores: Mapping[str, Score] = field(default_factory=dict)
    tests: Mapping[str, Score] = field(default_factory=dict)
    hypermodules: Mapping[str, int] = field(default_factory=dict)
    templates: Mapping[str, int] = field(default_factory=dict)
    numbers: tuple[int, int] = (0, 0)
    trained: int = 0
    adapted: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    first: Mapping[str, Score] = field(default_factory=dict)
    sizes: Mapping[str, Mapping[str, Mapping[str, int]]] = field(default_factory=dict)
    methods: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    loosened: Mapping[str, int] = field(default_factory=dict)
    stopped: str = "done"
    seconds: float = 0.0

    def __repr__(self) -> str:
        return as_text(
            f"TrainReport: {self._summary()}", [", ".join(filter(None, row)) for row in self._rows()]
        )

    def _repr_html_(self) -> str:
        return as_html("Training", ("task", "loss", "metric", "on"), self._rows(), [f"{self._summary()}."])

    def _summary(self) -> str:
        now, whole = self.numbers
        return (
            f"{plural(self.generations, 'generation')} in {self.seconds:.0f} s ({self.stopped}), kept is "
            f"{self.best + 1}; {count(now)} of {count(whole)} parameters of sites ({percent(now / max(whole, 1))})"
        )

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

    def document(self) -> dict[str, Any]:
        """As JSON."""
        scores = {name: score.document() for name, score in self.scores.items()}
        tests = {name: score.document() for name, score in self.tests.items()}
        first = {name: score.document() for name, score in self.first.items()}
        sizes = {"hypermodules": dict(self.hypermodules), "templates": dict(self.templates)}
        rest = {key: value for key, value in vars(self).items() if key != "methods" or value}
        return {**rest, "scores": scores, "tests": tests, "first": first, **sizes}

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> TrainReport:
        """The report whose `document` it is, as the last line of a log has it; what is missing is at its default."""
        known = {field.name: document[field.name] for field in fields(cls) if field.name in document}
        for part in {"scores", "tests", "first"} & set(known):
            known[part] = {name: _score(score) for name, score in known[part].items()}
        return cls(**{**known, "numbers": tuple(known.get("numbers", (0, 0)))})


def _score(document: Mapping[str, Any]) -> Score:
    return Score(**{key: document.get(key) for key in ("loss", "metric", "examples", "measure")})  # type: ignore[arg-type]


def adapted_of(task: Task) -> dict[str, Any] | None:
    """How a task adapts, as JSON: losses with weights, and where the features come from; None where it does not."""
    ways = adapts_by(task.loss)
    return {"by": ways, **task.source.document()} if ways and task.source is not None else None
