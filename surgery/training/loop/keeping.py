"""Which state of a run is kept: of each member its best, of all together the one of least regret, or of least loss.

Members learn at different speeds, so that one generation is right for few of them. A member's best state is kept with
the rows that it uses: members that are best in one generation go on sharing rows, and one that is best in another
brings its own, so that what is exported is what was measured. Where parameters have a price, what a state takes is
added to its loss: an early state without sharing is kept where it is so much better.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from surgery.core.joint import JointModel
from surgery.settings.training import Training
from surgery.storage.keys import of_owner
from surgery.training.loop.state import Tensors, snapshot

if TYPE_CHECKING:
    from surgery.training.loop.trainer import Trainer


class Keeper:
    """What a run keeps.

    Args:
        trainer: of the run.
        settings: of the run, which say what state is best.

    Attributes:
        tensors: of the state that is kept; None where it is the last one.
        best: the last generation of which anything was kept.
        score: of the state that is best for all.
        stale: validations since something was kept.
        unsaved: whether the state that is kept is not in a file yet.
        first: the tasks' first validation losses, their scale.
        members: by member its best generation and score.
        least: by task the least loss so far, and
        losses: those of the state that is kept.
    """

    def __init__(self, trainer: Trainer, settings: Training):
        self.trainer, self.settings = trainer, settings.stopping
        self.way = settings.keeps
        if self.way == "member" and not separable(trainer.joint):
            self.way = "all"
        self.tensors: Tensors | None = None
        self.best, self.score, self.stale, self.unsaved = 0, float("inf"), 0, False
        self.first: dict[str, float] = {}
        self.members: dict[str, tuple[int, float]] = {}
        self.least: dict[str, float] = {}
        self.losses: dict[str, float] = {}

    def begin_anew(self) -> None:
        """Forget what was kept; the scale of losses stays."""
        self.score, self.tensors, self.stale = float("inf"), None, 0
        self.members, self.least, self.losses = {}, {}, {}

    def judge(self, generation: int, losses: Mapping[str, float]) -> None:
        """Keep what is better now than it ever was.

        Args:
            generation: that was done.
            losses: of all tasks, on validation data where they have any.
        """
        for name, value in losses.items():
            self.first.setdefault(name, max(abs(value), 1e-12))
        relative = {name: value / self.first[name] for name, value in losses.items()}
        better = {"member": self._by_member, "regret": self._by_regret, "all": self._by_mean}[self.way]
        if not (fresh := better(generation, relative)):
            self.stale += 1
            return
        self.best, self.stale = generation, 0
        if self.settings.keep == "best":
            now = snapshot(self.trainer.joint)
            if self.tensors is not None and fresh != set(self.trainer.joint.names):
                now = combined(self.trainer.joint, self.tensors, now, fresh)
            self.tensors, self.unsaved = now, True

    def kept_at(self, last: int) -> dict[str, int]:
        """By member the generation of which its state is kept, where that is not the same for all of them.

        Args:
            last: the last generation.
        """
        if self.tensors is None or self.way != "member":
            return {}
        found = {name: self.members.get(name, (last, 0.0))[0] for name in self.trainer.joint.names}
        return found if len(set(found.values())) > 1 else {}

    # -- its state -----------------------------------------------------------------------------------------

    def document(self) -> dict[str, Any]:
        """As JSON."""
        found: dict[str, Any] = {
            "best": self.best,
            "score": self.score,
            "stale": self.stale,
            "first": self.first,
        }
        found["file"] = self.tensors is not None
        if self.way == "member":
            found["members"] = {name: list(each) for name, each in self.members.items()}
        if self.way == "regret":
            found |= {"least": self.least, "losses": self.losses}
        return found

    def take(self, document: Mapping[str, Any], tensors: Tensors | None) -> None:
        """Go on from a document and the tensors that were kept."""
        self.best, self.score, self.stale = document["best"], document["score"], document["stale"]
        self.first, self.tensors = dict(document["first"]), tensors
        self.members = {name: (each[0], each[1]) for name, each in document.get("members", {}).items()}
        self.least, self.losses = dict(document.get("least", {})), dict(document.get("losses", {}))

    # -- which is better -----------------------------------------------------------------------------------

    def _by_mean(self, generation: int, losses: Mapping[str, float]) -> set[str]:
        weights, processes = self.trainer.weights, self.trainer.processes
        score = sum(weights[name] * value for name, value in losses.items())
        score += self._cost_of(self.trainer.joint.names, weights)
        if not processes.agree(score < self.score):
            return set()
        self.score = score
        return set(self.trainer.joint.names)

    def _by_member(self, generation: int, losses: Mapping[str, float]) -> set[str]:
        """Members without a task are best in the last state in which any is."""
        better: set[str] = set()
        for name in dict.fromkeys(task.member for task in self.trainer.tasks):
            weights = {t.name: self.trainer.weights[t.name] for t in self.trainer.tasks if t.member == name}
            score = sum(weight * losses[task] for task, weight in weights.items())
            score += self._cost_of([name], weights)
            before = self.members.get(name, (0, float("inf")))[1]
            if self.trainer.processes.agree(score < before):
                self.members[name] = generation, score
                better.add(name)
        if better:
            self.score = sum(score for _, score in self.members.values())
            better |= set(self.trainer.joint.names) - set(self.members)
        return better

    def _cost_of(self, members: Iterable[str], weights: Mapping[str, float]) -> float:
        """What the parameters of members are worth, in units of their relative losses.

        Args:
            members: that are compared.
            weights: by task of these, the factor of its loss.
        """
        scale = sum(weight * self.first[task] for task, weight in weights.items()) / sum(weights.values())
        return sum(moves.cost_of(name) for moves in self.trainer.moves for name in members) / scale

    def _by_regret(self, generation: int, losses: Mapping[str, float]) -> set[str]:
        """Regret is how far a task is from the least loss that it had, relative to this."""
        self.least = {name: min(value, self.least.get(name, value)) for name, value in losses.items()}
        before = self._regret(self.losses) if self.losses else float("inf")
        now = self._regret(losses)
        mean = sum(losses.values()) < sum(self.losses.values())  # of equal ones the better on average
        if not self.trainer.processes.agree(now < before or (now == before and mean)):
            return set()
        self.losses, self.score = dict(losses), now
        return set(self.trainer.joint.names)

    def _regret(self, losses: Mapping[str, float]) -> float:
        return max(
            (value - self.least[name]) / max(abs(self.least[name]), 1e-12) for name, value in losses.items()
        )


def separable(joint: JointModel) -> bool:
    """Whether the state of one member can be kept beside that of another of another time."""
    owner: dict[int, str] = {}
    for name in joint.names:
        if any(owner.setdefault(id(p), name) != name for p in joint.private(name).values()):
            return False
    banks = [joint.dictionary[key] for key in joint.dictionary]
    return len(joint.names) > 1 and all(bank.mixable for bank in banks)


@torch.no_grad()
def combined(joint: JointModel, kept: Tensors, now: Tensors, members: set[str]) -> Tensors:
    """Some members as they are now, the others as they were kept.

    Args:
        joint: whose states these are.
        kept: of `snapshot`.
        now: of `snapshot`.
        members: that are taken from `now`.
    """
    found: Tensors = {}
    for state, mine in ((kept, False), (now, True)):
        found |= {k: t for k, t in state.items() if k.kind != "bank" and (k.owner in members) is mine}
    for bank in joint.dictionary:
        fresh = _locations(joint, bank, members)
        mixed = joint.dictionary[bank].mixed(of_owner(kept, "bank", bank), of_owner(now, "bank", bank), fresh)
        keys = {key.name: key for key in now if key.kind == "bank" and key.owner == bank}
        found |= {keys[name]: tensor for name, tensor in mixed.items()}
    return found


def _locations(joint: JointModel, bank: str, members: set[str]) -> Tensor:
    """The locations of some members in a bank: `[L]`, boolean."""
    found = torch.zeros(joint.dictionary[bank].locations, dtype=torch.bool)
    for p in joint.plan.placements:
        if p.bank == bank:
            found[p.start : p.stop] = p.site.member in members
    return found
