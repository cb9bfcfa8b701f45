"""The typed header of a run's state."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from surgery.settings.quantities import Count, Finite, Integer, NotNegative

VERSION = 2
Word = Annotated[int, Field(ge=0, lt=1 << 32)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, frozen=True)


class StreamState(_Part):
    """Where the data of a task are; an epoch is part of a seed."""

    epoch: Annotated[int, Field(ge=0, lt=1 << 20)]
    position: Count


class Kept(_Part):
    """What validation kept: the best generation, its score, for how long none was better, and the first losses.

    `file` says whether a state that is kept lies beside this one; states of earlier versions do not say. Where members
    are kept by themselves, `members` has the best generation and score of each; of the state of least regret `losses`
    are the tasks' losses and `least` the best that there were.
    """

    best: Integer
    score: float  # infinite before the first validation
    stale: Count
    first: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]]
    file: bool | None = None
    members: dict[str, tuple[Count, Finite]] = {}
    least: dict[str, Finite] = {}
    losses: dict[str, Finite] = {}


class RandomState(_Part):
    """Python's generator, and what NumPy's has besides its words."""

    python: tuple[Literal[3], Annotated[list[Word], Field(min_length=625, max_length=625)], Finite | None]
    numpy: tuple[
        Literal["MT19937"], Annotated[float, Field(ge=0, le=624)], Annotated[float, Field(ge=0, le=1)], Finite
    ]


class StateDocument(_Part):
    """All that `surgery.training.loop.checkpoint.pack` and `Run` write besides tensors.

    What the methods of this package say besides is checked by their moves.
    """

    version: Literal[2]
    generation: Annotated[int, Field(ge=0, lt=1 << 31)]
    step: Annotated[int, Field(ge=0, lt=1 << 31)]
    methods: dict[str, dict[str, Any]] = {}
    optimizer: dict[str, Finite | bool]
    schedule: Count | None = None
    streams: dict[str, StreamState]
    scaler: dict[str, Any] | None = None
    random: Annotated[list[RandomState], Field(min_length=1)]
    keep: Kept
    plan: dict[str, Any]
    seconds: NotNegative


class BestDocument(_Part):
    """What is said of the state that validation kept."""

    version: Literal[2]
    generation: Integer
