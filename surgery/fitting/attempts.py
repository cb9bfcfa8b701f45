"""Attempts: choices put together as they are stored, counted in bytes, and measured by running the members."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256

import numpy as np

from surgery.disk.journal import made_once
from surgery.fitting.assembly import Assembler
from surgery.fitting.decoding import Decodings, room_on
from surgery.fitting.scene import Scene
from surgery.fitting.tabulated import Choice
from surgery.fitting.trial import Trial
from surgery.fitting.units import BANK_BYTES, GATHERED_BYTES, PART_BYTES
from surgery.safetensors.gathered import names_weigh
from surgery.storage.codecs import Encoded
from surgery.storage.stored import Stored
from surgery.util import memory

HEADERS = 48 * 2**10  # bytes of names and headers that a budget does not count


@dataclass(frozen=True)
class Attempt:
    """A choice put together and tried.

    Attributes:
        choice: what was chosen.
        stored: it, encoded.
        errors: relative output error of each member, measured.
        nbytes: that its tensors take.
        counted: these, and those of headers beyond what a budget does not count.
    """

    choice: Choice
    stored: Stored
    errors: np.ndarray
    nbytes: int
    counted: float


class Attempts:
    """Makes attempts for the members of a scene; what was tried once is not measured again.

    Args:
        scene: what is being fitted.
        assembler: of choices.
        arrangement: of each row of the table that choices are made from.
        present: what is stored already, and costs nothing.

    Attributes:
        whole: bytes of the members' tensors.
        headers: bytes of names and headers that a budget does not count.
    """

    def __init__(
        self, scene: Scene, assembler: Assembler, arrangement: np.ndarray, present: Sequence[Encoded] = ()
    ):
        self.scene, self.trials = scene, scene.trials
        self.assembler, self.arrangement = assembler, arrangement
        self.decodings = Decodings(room_on(next(iter(scene.trials.values())).device))
        self.present = {id(encoded) for encoded in present}
        originals = list(scene.originals.values())
        self.whole = sum(tensor.numel() * tensor.element_size() for tensor in originals)
        self.headers = min(PART_BYTES * len(originals), HEADERS)
        self.measured: dict[str, np.ndarray] = {}  # errors of what was tried

    def make(self, choice: Choice) -> Attempt:
        """Assemble a choice and measure it."""
        stored = self.assembler.assemble(choice)
        memory.give_back()
        used = np.where(choice.taken[self.arrangement], choice.option, -1)
        tried = sha256(used.tobytes() + choice.taken.tobytes()).hexdigest()
        if tried not in self.measured:
            errors, _ = made_once(
                f"errors/{tried}", lambda: (measure_errors(stored, self.trials, self.decodings).tolist(), {})
            )
            self.measured[tried] = np.array(errors)
        return Attempt(choice, stored, self.measured[tried], self.nbytes(stored), self.counted(stored))

    def counted_of(self, choice: Choice) -> float:
        """Bytes that a budget counts of a choice, which is put together and not measured."""
        return self.counted(self.assembler.assemble(choice))

    def nbytes(self, stored: Stored) -> int:
        """Bytes of what is stored, without what was there already."""
        return sum(each.nbytes for each in stored.tensors.values() if id(each) not in self.present)

    def counted(self, stored: Stored) -> float:
        """Bytes that a budget counts: of tensors, and of headers but for some."""
        parts = sum(id(each) not in self.present for each in stored.tensors.values())
        nbytes = self.nbytes(stored)
        beside = self.scene.beside  # of members whose names lie there, and whose banks they join
        each = GATHERED_BYTES if names_weigh(parts, nbytes, alone=not beside) else PART_BYTES
        headers = each * parts + (0 if beside else BANK_BYTES * len(stored.plan.banks))
        return nbytes + max(0.0, headers - self.headers)


def better(one: Attempt, other: Attempt) -> bool:
    """Whether outputs of one attempt moved less, both in their mean and in their mean square."""
    return bool(one.errors.mean() < other.errors.mean() and (one.errors**2).mean() < (other.errors**2).mean())


def measure_errors(
    stored: Stored, trials: Mapping[str, Trial], decodings: Decodings | None = None
) -> np.ndarray:
    """Measured output error of every member with the weights of a stored form.

    Args:
        stored: the form.
        trials: the members.
        decodings: of earlier forms.
    """
    decodings, errors = decodings or Decodings(), []
    for name, trial in trials.items():
        with trial.running_with(decodings.weights_of(stored, name)):
            errors.append(trial.error())
        memory.give_back()
    decodings.end_attempt()
    return np.array(errors)
