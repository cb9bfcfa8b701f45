"""What routes do while they are trained: samples, temperatures, the budget, and hardening before the final phase."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field, ValidationError
from torch import Tensor

from surgery.core.bank import Trained
from surgery.disk.untrusted import shown
from surgery.errors import PlanError
from surgery.methods.routes.gates import WAITS, BernoulliGates, Gates, LearnedGates, SoftGates
from surgery.methods.routes.groups import budget_of, hard_routes, harden_gates, penalty_of, routes_in
from surgery.methods.routes.mathematics import temperature_at
from surgery.methods.routes.measuring import begin_with_measured, can_measure
from surgery.settings.problems import Strict, problems_of
from surgery.settings.quantities import Count
from surgery.storage.keys import StateKey
from surgery.training.loop.moves import Facts, Moves
from surgery.util.text import shorten

if TYPE_CHECKING:
    from surgery.training.loop.trainer import Trainer


class _Measured(Strict):
    left: tuple[Count, ...]
    losses: tuple[float, ...]
    passes: Count


class _State(Strict):
    """What a run's state says of routes."""

    passes: Count
    measured: dict[str, dict[str, _Measured]] = Field(default_factory=dict)


class RouteMoves(Moves):
    """Of all routes of a joint model: of stacks, and of `Routed` in models of one's own.

    Attributes:
        routes: the gates of each route, by member and name.
        passes: batches of all tasks so far, by which the temperature falls.
        measured: by route and task, what is known of layers left out one by one before learning.
    """

    def __init__(self, name: str, trainer: Trainer):
        super().__init__(name, trainer)
        joint = self.joint
        self.routes = {
            (member, route): depths
            for member in joint.names
            for route, depths in routes_in(joint[member]).items()
        }
        self.passes = 0
        self.measured: dict[str, dict[str, Facts]] = {}
        self._check_tasks()

    @property
    def gates(self) -> Iterator[Gates]:
        """Of all routes and depths."""
        return (gates for depths in self.routes.values() for gates in depths)

    @property
    def learned(self) -> list[LearnedGates]:
        """Those that have a parameter."""
        return [gates for gates in self.gates if isinstance(gates, LearnedGates)]

    def _check_tasks(self) -> None:
        """Refuse tasks without a route, and routes without a task."""
        bad = []
        for (member, route), depths in self.routes.items():
            named = depths[0].tasks
            mine = [task.name for task in self.trainer.tasks if task.member == member]
            if named == ("",):
                continue
            if lost := [name for name in named if name not in mine]:
                bad.append(f"no task trains {shorten(lost)} of {route} of '{member}', but {shorten(mine)}")
            if lost := [name for name in mine if name not in named]:
                bad.append(f"{route} of '{member}' serves no {shorten(lost)}, but {shorten(named)}")
        if bad:
            raise PlanError(
                f"Routes and tasks must be of the same names, but {'; '.join(bad)}: correct `tasks`, or add a task "
                "with a head for each."
            )

    # -- parameters ----------------------------------------------------------------------------------------

    def more_groups(self) -> list[Trained]:
        """Logits and scores, at a multiple of the learning rate, without decay."""
        found: dict[tuple[str, float], list[Any]] = {}
        for gates in self.learned:
            role = "logits" if isinstance(gates, BernoulliGates) else "scores"
            found.setdefault((role, gates.settings.rate), []).append(gates.parameter)
        lr = self.config.optimizer.lr
        return [Trained(role, tuple(own), decay=False, lr=rate * lr) for (role, rate), own in found.items()]

    # -- a step --------------------------------------------------------------------------------------------

    def before_step(self) -> None:
        """Say how much of an exact start is left: none from the middle of the phase in which routes are learned."""
        done = self._learned_for()
        for gates in self.learned:
            if gates.hard is not None or gates.own is None:
                continue
            if done < 0:
                gates.enter(WAITS)
            else:
                gates.enter(max(0.0, 1 - 2 * done) if isinstance(gates, SoftGates) else 0.0)

    def before_pass(self, task: str) -> None:
        """One sample for each forward pass, at a temperature that falls with every batch."""
        for gates in self.learned:
            if isinstance(gates, BernoulliGates):
                own = gates.settings
                gates.temperature = temperature_at(self.passes, own.temperature, own.least_temperature)
                if gates.hard is None and not gates.waits:
                    gates.draw(self.generator)
        self.passes += 1

    def penalty(self) -> Tensor | None:
        """What exceeds the budgets of all routes, each task's with the factor of its loss."""
        found = [
            penalty_of(depths, self._left(depths), weights)
            for (member, _), depths in self.routes.items()
            if budget_of(depths) is not None
            and (weights := self._weights(member, depths))
            and any(isinstance(g, BernoulliGates) and g.hard is None and not g.waits for g in depths)
        ]
        return None if not found else sum(found[1:], found[0])

    def _weights(self, member: str, depths: list[Gates]) -> dict[str, float]:
        """By task of a route, the factor of the losses that it serves in this step."""
        mine = {t.name: self.trainer.weight(t) for t in self.trainer.turn if t.member == member}
        return mine if depths[0].tasks != ("",) else {"": sum(mine.values())} if mine else {}

    def _left(self, depths: list[Gates]) -> float:
        """How much of the way to its budget a pretrained stack has still to go.

        Without a measured start it goes there over three quarters of the phase in which routes are learned, so that
        layers leave one by one.
        """
        if can_measure(depths) or not any(
            isinstance(gates, LearnedGates) and gates.own is not None for gates in depths
        ):
            return 0.0
        return max(0.0, 1 - self._learned_for() / 0.75)

    def _learned_for(self) -> float:
        """Which share of the phase in which routes are learned is over; below 0 in burn-in."""
        config = self.config
        steps = self.trainer.steps - config.burn_in * config.steps
        return steps / max(config.generations * config.steps, 1)

    # -- a generation --------------------------------------------------------------------------------------

    def before_generation(self) -> None:
        """Measure before routes are learned, and harden before the final phase."""
        if self.trainer.generation == self.config.burn_in:
            self._measure()
        if self._hardens(self.trainer.generation):
            harden_gates(depths for depths in self.routes.values() if depths[0].settings.harden)

    def _measure(self) -> None:
        passes = self.passes  # those of trials are none of the run's
        for key, depths in self.routes.items():
            if can_measure(depths):
                found = begin_with_measured(self.trainer, key[0], depths)
                self.measured[self._called(key)] = {task: each.document() for task, each in found.items()}
        self.passes = passes

    def begins_anew(self, generation: int) -> bool:
        """States before burn-in is over, or before routes are hard, are not what will be exported."""
        learning = generation == self.config.burn_in and any(gates.own is not None for gates in self.learned)
        return learning or self._hardens(generation)

    def _hardens(self, generation: int) -> bool:
        last = self.config.burn_in + self.config.generations
        return generation == last and any(gates.settings.harden for gates in self.learned)

    # -- its state -----------------------------------------------------------------------------------------

    def pack(self) -> tuple[dict[str, Tensor], Facts]:
        """How many batches were drawn for, and what was measured; what gates do is in their buffers."""
        said: Facts = {"passes": self.passes}
        return {}, {**said, "measured": self.measured} if self.measured else said

    def wrong(
        self, tensors: dict[str, Tensor], facts: Facts, model: Mapping[StateKey, Tensor]
    ) -> Iterator[str]:
        """By its form; what was measured is there once routes are learned, and in no state of earlier versions."""
        try:
            _State.model_validate(facts)
        except ValidationError as error:
            yield f"of method {self.name} {'; '.join(problems_of(error, _State))}"
        if tensors:
            yield f"of method {self.name} it must hold no tensors, found {shown(sorted(tensors))}"

    def unpack(self, tensors: dict[str, Tensor], facts: Facts) -> None:
        """Go on counting."""
        self.passes = int(facts["passes"])
        self.measured = dict(facts.get("measured", {}))

    # -- what it tells -------------------------------------------------------------------------------------

    def describe(self) -> Facts:
        """The components of each depth and the tasks of each route."""
        return {
            "routes": {
                self._called(key): {
                    "tasks": [task or key[0] for task in depths[0].tasks],
                    "components": [list(gates.names) for gates in depths],
                    "routing": depths[0].settings.routing,
                }
                for key, depths in self.routes.items()
            }
        }

    def log(self) -> Facts:
        """Probabilities or shares, by route, depth, task and component."""
        return {
            "shares": {
                self._called(key): [
                    [[round(x, 4) for x in row] for row in g.table().tolist()] for g in depths
                ]
                for key, depths in self.routes.items()
            }
        }

    def words(self) -> list[str]:
        """How many components a task uses."""
        used = self._used()
        return [f"{sum(used) / len(used):.2g} components a task"] if used else []

    def tracked(self) -> dict[str, float]:
        """The same for trackers."""
        used = self._used()
        return {"components": sum(used) / len(used)} if used else {}

    def reached(self) -> Facts:
        """By route and task, the components at each depth that a hard route has."""
        found: Facts = {
            "chosen": {self._called(key): self._kept(depths) for key, depths in self.routes.items()}
        }
        return {**found, "measured": self.measured} if self.measured else found

    def _kept(self, depths: list[Gates]) -> dict[str, list[list[str]]]:
        found = []
        for gates in depths:
            hard = gates.hard if isinstance(gates, LearnedGates) else None
            found.append(hard or gates.likely())
        if any(isinstance(g, LearnedGates) and g.hard is None for g in depths):
            found = hard_routes(depths)
        return {
            task: [[gates.names[i] for i in each[task]] for gates, each in zip(depths, found, strict=True)]
            for task in depths[0].tasks
        }

    def _used(self) -> list[float]:
        """Components that are on, without the identity, by route and task."""
        found = []
        for depths in self.routes.values():
            kept = self._kept(depths)
            found += [
                float(sum(name != "identity" for names in own for name in names)) for own in kept.values()
            ]
        return found

    def _called(self, key: tuple[str, str]) -> str:
        return f"{key[0]}:{key[1]}"
