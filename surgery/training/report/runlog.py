"""Run log: one JSON object a line, so that pictures and reports can be made while a run goes on and after it.

`start` says what is trained; a `generation` line follows each generation; `end` says why the run ended.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from surgery.disk.untrusted import LOG_BYTES, UnreadableError, parse_json, read_regular
from surgery.errors import TrainingError, shorten
from surgery.training.report.log_lines import check_line, contradictions
from surgery.training.report.report import TrainReport

NAME = "log.jsonl"


class RunLog:
    """Appends lines to a file, or to nothing where there is no folder."""

    def __init__(self, folder: Path | None):
        self.path = None if folder is None else folder / NAME

    def begin(self) -> None:
        """Take away what an earlier run wrote that ended before it saved a state."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def write(self, event: str, **fields: Any) -> None:
        """Append a line."""
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"event": event, **fields}) + "\n")

    def check(self) -> None:
        """Whether the log can be cut.

        Raises:
            TrainingError: where there is something else in its place.
        """
        if self.path is not None and os.path.lexists(self.path):
            read_log(self.path)

    def cut(self, generation: int) -> None:
        """Take away what was written after `generation` generations, by a run that was then killed.

        Raises:
            TrainingError: where there is something else in the log's place.
        """
        if self.path is None or not os.path.lexists(self.path):
            return
        kept = [
            line
            for line in read_log(self.path)
            if line["event"] == "start" or (line["event"] == "generation" and line["generation"] < generation)
        ]
        beside = self.path.with_name(f".{NAME}.new")
        beside.unlink(missing_ok=True)  # what a kill left, or something that would be waited for
        beside.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        beside.replace(self.path)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; a last one that a kill cut off is left out.

    Raises:
        TrainingError: where there is no log, or a line is none of a log's.
    """
    try:
        texts = read_regular(path, LOG_BYTES).split(b"\n")
    except UnreadableError as error:
        raise TrainingError(f"{path} must be the log of a training run, but {error}.") from None
    lines: list[dict[str, Any]] = []
    bad: list[str] = []
    for number, text in enumerate(texts, 1):
        if not text.strip():
            continue
        try:
            # A metric may be NaN. What comes after the last line break is what a kill cut off.
            line = parse_json(text, finite=False)
        except UnreadableError as error:
            if number < len(texts):
                bad.append(f"line {number} {error}")
            continue
        if wrong := check_line(line, text):
            bad.append(f"line {number}: {wrong}")
        else:
            lines.append(line)
    bad = bad or list(itertools.islice(contradictions(lines), 5))
    if bad:
        raise TrainingError(
            f"{path} must be the log of a training run, but {shorten(bad, 5, '; ')}. Nothing but pictures is made "
            "of it: delete it, and a run goes on without."
        )
    return lines


def read_end(path: Path, members: Collection[str]) -> TrainReport | None:
    """What the last line of a log says of a run; None where that is not its end, or the run trained other members.

    Args:
        path: of the log; lines in between are not looked at.
        members: those that the run has to have trained.
    """
    try:
        texts = read_regular(path, LOG_BYTES).strip(b"\n").split(b"\n")
        start, end = (parse_json(text, finite=False) for text in (texts[0], texts[-1]))
    except UnreadableError:
        return None
    if check_line(start, texts[0]) or check_line(end, texts[-1]):
        return None
    whole = start["event"] == "start" and end["event"] == "end" and {*start["members"]} == {*members}
    return TrainReport.of(end) if whole else None


def first_validation(lines: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Each task's first scores on validation data, as JSON."""
    found: dict[str, dict[str, Any]] = {}
    for line in lines:
        if line["event"] == "generation":
            found = line.get("validation", {}) | found
    return found


def find_log(source: str | Path) -> Path:
    """The log of an artifact, of a run's own folder, or of the run that is to become the artifact.

    Raises:
        TrainingError: where there is none.
    """
    folder = Path(source).expanduser()
    places = [folder / "training" / NAME, folder / NAME, Path(f"{folder}.training") / NAME]
    for path in [folder, *places] if folder.suffix == ".jsonl" else places:
        if os.path.lexists(path):  # what is no file is named when it is read
            return path
    raise TrainingError(
        f"{source} must be a folder that surgery train wrote or is writing, but there is no {NAME} in it."
    )
