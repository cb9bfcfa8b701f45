"""The lines of a run's log as typed documents.

A line may say more than is known here: runs of other versions are read too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from surgery.disk.untrusted import broken_rules, shown
from surgery.settings.quantities import Count, Integer, NotNegative
from surgery.training.report.report import TrainReport
from surgery.training.tasks.score import Loss, Score


class _Line(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, frozen=True)


class AdaptedLine(_Line):
    """How a task adapted: by which losses, and to which features."""

    by: dict[str, float] | list[str] = []
    part: str = ""
    examples: Count = 0
    source: str | None = None


class TaskLine(_Line):
    """The member that a task trains, and its metric."""

    member: str
    metric: str | None = None
    adapted: AdaptedLine | None = None


class StackLine(_Line):
    """Member and name of each layer of a stack, and how many templates it has."""

    layers: Annotated[list[tuple[str, str]], Field(min_length=1)]
    templates: Count


class SizeLine(_Line):
    """What a member takes."""

    parameters: Count
    bytes: Count


class StartLine(_Line):
    """What is trained; `sites` are member, name, bank, start, stop and order."""

    event: Literal["start"]
    members: list[str]
    tasks: dict[str, TaskLine]
    sites: list[tuple[str, str, str, Count, Count, Integer]]
    stacks: dict[str, StackLine] = {}
    method_names: list[str] = []
    numbers: Count = 0
    sizes: dict[str, dict[str, SizeLine]] | None = None


class GenerationLine(_Line):
    """One generation."""

    event: Literal["generation"]
    generation: Annotated[int, Field(ge=0, lt=1 << 31)]
    losses: dict[str, Loss]
    validation: dict[str, Score]
    hypermodules: dict[str, Count] = {}
    numbers: Count = 0
    moved: NotNegative = 0.0
    seconds: NotNegative = 0.0
    share: Annotated[float, Field(ge=0, le=1e6)]
    subsets: dict[str, Count] = {}
    alignment: dict[str, list[Integer]] = {}
    mixtures: dict[str, list[list[Loss]]] = {}


class OverlapLine(_Line):
    """How many hypermodules each two layers of a bank share, and would by chance: square."""

    layers: list[tuple[str, str, str]]
    observed: list[list[Count]]
    expected: list[list[NotNegative]]


class StatisticLine(_Line):
    """One row of the comparison of generic and specific hypermodules."""

    tensor: Literal["H", "z"]
    statistic: str
    generic: float
    specific: float
    p: float


class EndLine(_Line):
    """How a run ended, beside its report."""

    event: Literal["end"]
    best: Integer
    stored_modules: dict[str, Count] = {}
    sizes: dict[str, dict[str, SizeLine]] = {}
    overlap: dict[str, OverlapLine] = {}
    statistics: list[StatisticLine] = []


STATES = ("alone", "start", "joint")
"""In which a run measures what its members take."""

LINES: dict[str, type[_Line]] = {"start": StartLine, "generation": GenerationLine, "end": EndLine}
"""Kinds of lines by their event; those of other events are kept and not looked at."""


def check_line(line: Any, text: bytes) -> str:
    """What is wrong with a line of a log, as it was parsed and as it was written; empty where nothing is.

    Example:
        >>> check_line(None, b"null")
        'must say its event, but is None'
    """
    event = line.get("event") if isinstance(line, dict) else None
    if not isinstance(event, str):
        return f"must say its event, but is {shown(line)}"
    if event not in LINES:
        return ""
    try:
        LINES[event].model_validate_json(text)  # of JSON, where a tuple is a list
        if event == "end":
            TrainReport.of(line)
    except ValidationError as error:
        return "; ".join(broken_rules(error, 4))
    return ""


@dataclass(frozen=True)
class Logged:
    """The lines of a run's log by their events.

    Attributes:
        start: what is trained; None where that was not said.
        generations: a line for each.
        end: None while the run goes on.
    """

    start: dict[str, Any] | None
    generations: list[dict[str, Any]]
    end: dict[str, Any] | None


def by_event(lines: Sequence[dict[str, Any]]) -> Logged:
    """The lines of a log, of which the first that begins it counts, and the first that ends it."""
    start, end = (
        next((line for line in lines if line["event"] == event), None) for event in ("start", "end")
    )
    return Logged(start, [line for line in lines if line["event"] == "generation"], end)


def contradictions(lines: Sequence[dict[str, Any]]) -> Iterator[str]:
    """What cannot be true of lines that are each right by themselves."""
    logged = by_event(lines)
    start, generations = logged.start, logged.generations
    if start is None:
        if lines:
            yield "no line says what is trained (event 'start')"
        return
    tasks = set(start["tasks"])
    sizes: dict[str, int] = {}
    for line in generations:
        place = f"generation {line['generation']}"
        if lacking := tasks - set(line["losses"]):
            yield f"{place} has no loss of {shown(sorted(lacking))}"
        for key, numbers in line.get("alignment", {}).items():
            if sizes.setdefault(key, len(numbers)) != len(numbers):
                yield f"{place} aligns {len(numbers)} locations of {shown(key)} in place of {sizes[key]}"
        yield from _wrong_mixtures(line.get("mixtures", {}), start.get("stacks", {}), place)
    aligned = [set(line.get("alignment", {})) for line in generations]
    if any(keys != aligned[0] for keys in aligned):
        yield "generations do not align the same banks"
    for site in start.get("sites", []):
        if site[2] in sizes and not site[3] <= site[4] <= sizes[site[2]]:
            yield f"the site {shown(site[1])} reaches beyond the locations of its bank"
    for line in lines:
        sized = line.get("sizes") if line["event"] == "end" else None
        if sized and {state: set(sized.get(state, ())) for state in STATES} != {
            state: set(start["members"]) for state in STATES
        }:
            yield f"sizes must be of all members {', '.join(STATES)}, found {shown(sized)}"
        for key, overlap in line.get("overlap", {}).items() if line["event"] == "end" else ():
            count = len(overlap["layers"])
            tables = (overlap["observed"], overlap["expected"])
            if any(len(table) != count or any(len(row) != count for row in table) for table in tables):
                yield f"the overlap of {shown(key)} is not square in its {count} layers"


def _wrong_mixtures(mixtures: Mapping[str, Any], stacks: Mapping[str, Any], place: str) -> Iterator[str]:
    if mixtures and set(mixtures) != set(stacks):
        yield f"{place} has mixtures of {shown(sorted(mixtures))}, but the stacks are {shown(sorted(stacks))}"
        return
    for name, rows in mixtures.items():
        layers, count = len(stacks[name]["layers"]), stacks[name]["templates"]
        if len(rows) != layers or not count or any(len(row) != count for row in rows):
            yield f"{place} must mix {layers} layers of {shown(name)} from {count} templates"
