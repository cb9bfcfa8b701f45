"""Gates: which components one depth of a route mixes for the task that is served, and in which shares.

Three kinds, by how g is learned: Bernoulli variables (`BernoulliGates`), a softmax of scores (`SoftGates`), and
nothing (`FixedGates`: orders by hand, and what learning ended with). Each says with `now` which components have to
run; those that are off are not run, but for training and tracing, where all are evaluated.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from surgery.errors import PlanError, SurgeryWarning
from surgery.methods.routes import mathematics
from surgery.methods.routes.settings import Settings
from surgery.util.text import shorten

WAITS = -1.0
"""The phase of gates that keep the start as it is."""

Now = tuple[list[int], Tensor | None]
"""Numbers of the components that run, and their shares; None where one runs alone."""


class Gates(nn.Module):
    """What gates of one depth have in common.

    Args:
        route: the name of the route that this depth is part of.
        depth: which one, from 0.
        tasks: names; a single unnamed one serves every task.
        names: of the components.
        settings: of the method.
        rest: whether the last component is an identity that stands in where all others are off.
        per_layer: how many depths a layer has: one, or its branches.

    Attributes:
        task: that is served; None is the default, what all tasks together like best.
    """

    def __init__(
        self,
        route: str,
        depth: int,
        tasks: Sequence[str],
        names: Sequence[str],
        settings: Settings,
        rest: bool = False,
        per_layer: int = 1,
    ):
        super().__init__()
        self.route, self.depth, self.settings, self.rest = route, depth, settings, rest
        self.per_layer = per_layer
        self.tasks, self.names = tuple(tasks) or ("",), tuple(names)
        self.task: str | None = None

    def serve(self, task: str | None) -> None:
        """The forward passes that follow are those of a task.

        Args:
            task: its name; None for the default. A route of one unnamed task serves all.
        """
        self.task = task if task in self.tasks else None

    @property
    def row(self) -> int | None:
        """The task's place among `tasks`; None for the default of several."""
        if len(self.tasks) == 1:
            return 0
        return None if self.task is None else self.tasks.index(self.task)

    def now(self, every: bool = False) -> Now:
        """What runs in this pass.

        Args:
            every: whether all components run, whatever their shares.
        """
        raise NotImplementedError

    def table(self) -> Tensor:
        """By task and component `[T, N]`: probabilities of being on, or shares."""
        raise NotImplementedError

    def likely(self) -> dict[str, tuple[int, ...]]:
        """By task, the components that a hard route keeps at this depth."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """Tasks and components."""
        return f"{self.route}, depth {self.depth}: {len(self.tasks)} tasks x {len(self.names)} components"

    def _only(self, on: Sequence[int], every: bool, like: Tensor) -> Now:
        """Components that are on, in equal shares; all of them run where that is asked for."""
        if not every:
            return list(on), None if len(on) == 1 else like.new_full((len(on),), 1 / max(len(on), 1))
        shares = like.new_zeros(len(self.names))
        shares[list(on)] = 1 / max(len(on), 1)
        return list(range(len(self.names))), shares


class FixedGates(Gates):
    """Gates that are not learned: by task, the components that are on, of which the mean is taken.

    Args:
        chosen: by task, numbers of components.

    Attributes:
        always: the one component that runs for every task; None where there is no such.
    """

    def __init__(self, *args: Any, chosen: Mapping[str, Sequence[int]], **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.chosen = {task: tuple(chosen[task]) for task in self.tasks}
        alone = {on[0] if len(on) == 1 else None for on in self.chosen.values()}
        self.always = alone.pop() if len(alone) == 1 else None

    def now(self, every: bool = False) -> Now:
        """The components of the task; of the first for the default."""
        on = self.chosen[self.tasks[self.row or 0]]
        return self._only(on, every, torch.ones(()))

    def table(self) -> Tensor:
        """One over the number of components that are on."""
        found = torch.zeros(len(self.tasks), len(self.names))
        for row, task in enumerate(self.tasks):
            found[row, list(self.chosen[task])] = 1 / max(len(self.chosen[task]), 1)
        return found

    def likely(self) -> dict[str, tuple[int, ...]]:
        """What they are."""
        return dict(self.chosen)


class LearnedGates(Gates):
    """Gates with a parameter.

    What they are doing is in two buffers, so that copies, states and artifacts have it: `phase`, -1 while the start is
    kept as it is, else how much of an exact start is left; and `kept`, the components of a hard route, none while they
    are learned.

    Args:
        own: the component that a pretrained stack begins with; None where there is no exact start.
    """

    phase: Tensor  # [1]
    kept: Tensor  # [T, N], uint8

    def __init__(self, *args: Any, own: int | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.own = own
        self.register_buffer("phase", torch.full((1,), 0.0 if own is None else WAITS))
        self.register_buffer("kept", torch.zeros(len(self.tasks), len(self.names), dtype=torch.uint8))
        self._read: tuple[Any, float, dict[str, tuple[int, ...]] | None] = (None, 0.0, None)

    @property
    def parameter(self) -> nn.Parameter:
        """What is learned, rows by task."""
        raise NotImplementedError

    @property
    def waits(self) -> bool:
        """Whether the start is kept as it is: before training, and in burn-in."""
        return self._state()[1] == WAITS

    @property
    def anchor(self) -> float:
        """How much of an exact start is left; training takes it to 0."""
        return max(self._state()[1], 0.0)

    @property
    def hard(self) -> dict[str, tuple[int, ...]] | None:
        """By task, the components that are kept from now on; None while the gates are learned."""
        return self._state()[2]

    @torch.no_grad()
    def enter(self, phase: float) -> None:
        """Keep the start (`WAITS`), or learn with so much of an exact start left."""
        if self._state()[1] != phase:
            self.phase.fill_(phase)

    @torch.no_grad()
    def harden(self, chosen: Mapping[str, Sequence[int]]) -> None:
        """Keep some components of each task from now on.

        Args:
            chosen: by task, their numbers.
        """
        self.kept.zero_()
        for row, task in enumerate(self.tasks):
            self.kept[row, list(chosen[task])] = 1

    @torch.no_grad()
    def soften(self) -> None:
        """Undo `harden`: learn again, from what was learned before."""
        self.kept.zero_()

    def _state(self) -> tuple[Any, float, dict[str, tuple[int, ...]] | None]:
        """What the buffers say, read again where they were written to."""
        phase, kept = self.phase, self.kept
        key = (id(phase), phase._version, id(kept), kept._version)
        if self._read[0] != key:
            if phase.is_meta:  # of an architecture that is filled later
                return None, WAITS if self.own is not None else 0.0, None
            rows = kept.tolist()
            hard = {
                task: tuple(i for i, on in enumerate(row) if on)
                for task, row in zip(self.tasks, rows, strict=True)
            }
            self._read = (key, float(phase), hard if any(map(any, rows)) else None)
        return self._read

    def now(self, every: bool = False) -> Now:
        """The start, the hard route, or what is learned."""
        if (hard := self.hard) is not None:
            return self._only(hard[self.tasks[self.row or 0]], every, self.parameter)
        if self.waits and self.own is not None:
            return self._only((self.own,), every, self.parameter)
        return self._learned(every)

    def _learned(self, every: bool) -> Now:
        raise NotImplementedError


class BernoulliGates(LearnedGates):
    """Each component is on or off for a task by a Bernoulli variable. # Maziarz et al., the Gumbel-Matrix

    Args:
        own: the component that is on at first with `p_init`, others with `1 - p_init`; None for all alike.
    """

    def __init__(self, *args: Any, own: int | None = None, **kwargs: Any):
        super().__init__(*args, own=own, **kwargs)
        learned = len(self.names) - self.rest
        p = torch.full((len(self.tasks), learned), self.settings.p_init)
        if own is not None:
            p[:, [i for i in range(learned) if i != own]] = 1 - self.settings.p_init
        self.logits = nn.Parameter(mathematics.bernoulli_logits(p))  # [T, N, 2]
        self.noise: Tensor | None = None  # [N, 2], drawn for the pass; else from PyTorch's own generator
        self.temperature = self.settings.temperature
        self._warned: set[str] = set()

    @property
    def parameter(self) -> nn.Parameter:
        """Two complementary logits for each (task, component)."""
        return self.logits

    def draw(self, generator: torch.Generator | None) -> None:
        """Draw the noise of the next pass."""
        self.noise = mathematics.gumbel_noise(self.logits.shape[1:], generator)

    @torch.no_grad()
    def begin(self, row: int, on: bool) -> None:
        """Begin with a task's own layer likely on, by `p_init`, or as likely off.

        Args:
            row: of the task.
            on: whether it shall be on.
        """
        p = self.settings.p_init if on else 1 - self.settings.p_init
        self.logits[row, self.own] = mathematics.bernoulli_logits(torch.tensor(p)).to(self.logits)

    def probability(self) -> Tensor:
        """Of being on `[T, N]`, without the identity that stands in."""
        return mathematics.probability_on(self.logits)

    def table(self) -> Tensor:
        """Probabilities of being on."""
        return self.probability().detach()

    def likely(self) -> dict[str, tuple[int, ...]]:
        """Components that are likelier on than off, or the identity that stands in."""
        return {task: self._on(row) for row, task in enumerate(self.tasks)}

    def _on(self, row: int | None) -> tuple[int, ...]:
        logits = self.logits.detach()
        kept = mathematics.most_likely(logits[row] if row is not None else logits.mean(0))
        on = tuple(kept.nonzero().flatten().tolist())
        return on or ((len(self.names) - 1,) if self.rest else ())

    def _learned(self, every: bool) -> Now:
        if not self.training:
            on = self._on(self.row)
            if not on:
                self._warn()
            return self._only(on, every, self.logits)
        logits = self.logits[self.row] if self.row is not None else self.logits.mean(0)
        noise = mathematics.gumbel_noise(logits.shape) if self.noise is None else self.noise
        z = mathematics.sampled(logits, noise.to(logits), self.temperature)
        shares = mathematics.shares_or_identity(z) if self.rest else mathematics.shares_of_on(z)
        return list(range(len(self.names))), shares

    def _warn(self) -> None:
        task = self.tasks[self.row or 0]
        if task not in self._warned:
            self._warned.add(task)
            warnings.warn(
                f"All components at depth {self.depth} of {self.route} are off for task '{task}', so its output there "
                "is zeros: raise `p_init` or `component_budget`, or let the identity be a component.",
                SurgeryWarning,
                stacklevel=2,
            )


class SoftGates(LearnedGates):
    """Each task mixes all components by the softmax of its scores. # Meyerson and Miikkulainen, soft ordering

    Args:
        own: the component that a pretrained stack begins with, exactly; None for equal shares.
    """

    def __init__(self, *args: Any, own: int | None = None, **kwargs: Any):
        super().__init__(*args, own=own, **kwargs)
        start = self._start()
        self.scores = nn.Parameter(start)  # [T, N]

    @property
    def parameter(self) -> nn.Parameter:
        """A score for each (task, component)."""
        return self.scores

    def table(self) -> Tensor:
        """Shares."""
        return self._shares().detach()

    def likely(self) -> dict[str, tuple[int, ...]]:
        """The component with the largest share."""
        best = self._shares().detach().argmax(1).tolist()
        return {task: (best[row],) for row, task in enumerate(self.tasks)}

    def _shares(self) -> Tensor:
        """`[T, N]`"""
        if self.own is None or not self.anchor:
            return mathematics.soft_shares(self.scores)
        own = torch.zeros_like(self.scores)
        own[:, self.own] = 1
        return mathematics.anchored_shares(self.scores, self._start().to(own), own, self.anchor)

    def _start(self) -> Tensor:
        """Scores at first: a share of `sure` for the own component, and equal parts of the rest for the others."""
        count = len(self.names)
        start = torch.zeros(len(self.tasks), count)
        if self.own is not None:
            sure = self.settings.sure
            start[:, self.own] = math.log(sure * max(count - 1, 1) / (1 - sure))
        return start

    def _learned(self, every: bool) -> Now:
        shares = self._shares()
        return list(range(len(self.names))), shares[self.row] if self.row is not None else shares.mean(0)


def make_gates(
    route: str,
    depth: int,
    names: Sequence[str],
    tasks: Sequence[str],
    settings: Settings,
    own: int | None = None,
    chosen: Mapping[str, Sequence[int]] | None = None,
    per_layer: int = 1,
) -> Gates:
    """The gates of one depth.

    Args:
        route: its name.
        depth: from 0.
        names: of the components.
        tasks: names.
        settings: of the method.
        own: the component that a pretrained stack begins with.
        chosen: by task, the components of a route that is not learned.
        per_layer: how many depths a layer has.
    """
    if chosen is not None:
        return FixedGates(route, depth, tasks, names, settings, per_layer=per_layer, chosen=chosen)
    if settings.routing == "soft":
        return SoftGates(route, depth, tasks, names, settings, per_layer=per_layer, own=own)
    rest = names[-1] == IDENTITY
    return BernoulliGates(route, depth, tasks, names, settings, rest=rest, per_layer=per_layer, own=own)


def check_orders(orders: Mapping[str, Sequence[int]], depth: int, count: int, what: str) -> None:
    """Refuse orders by hand that no route can follow, all in one error.

    Args:
        orders: by task, the number of the component at each depth.
        depth: how many depths there are.
        count: how many components.
        what: whose orders these are.

    Raises:
        PlanError: naming tasks, lengths and numbers.
    """
    bad = [
        f"that of task '{task}' has {len(order)} entries"
        for task, order in orders.items()
        if len(order) != depth
    ]
    bad += [
        f"that of task '{task}' names {shorten(map(str, wrong))}"
        for task, order in orders.items()
        if (wrong := [i for i in order if not 0 <= i < count])
    ]
    if bad:
        raise PlanError(
            f"An order of {what} must name one of {count} components, from 0, for each of {depth} depths, but "
            f"{'; '.join(bad)}: correct `orders`."
        )


WRITTEN = "Routed"
"""The route of a `Routed`, which is called by its path."""

IDENTITY = "identity"
"""The name of the component that passes on what it gets."""
