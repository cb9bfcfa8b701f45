"""Plans of routes: which layers of pretrained stacks become components, and what is recorded of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field, model_validator

from surgery.anatomy.sites import Anatomy
from surgery.anatomy.stacks import Run, choose_runs
from surgery.core.method import PlanRequest
from surgery.errors import PlanError
from surgery.members.replacement import Replacement
from surgery.methods.routes.adapters import Lent, lent_to
from surgery.methods.routes.gates import IDENTITY, check_orders
from surgery.methods.routes.routed import chance_order
from surgery.methods.routes.settings import Names, Settings
from surgery.settings.problems import Strict
from surgery.settings.quantities import Count
from surgery.util.text import shorten

if TYPE_CHECKING:
    from surgery.members.member import Member

NAME = "routes"


class Branches(Strict):
    """What an artifact says of the layers that have a routed branch.

    Attributes:
        layers: their paths.
        zeros: the parameters of each branch, within its layer, without which it adds zeros; alike in all layers.
        passes_on: whether a layer without its branches gives what it gets, so that it can be left out.
    """

    layers: Names
    zeros: Annotated[tuple[Names, ...], Field(max_length=64)]
    passes_on: bool = False

    @model_validator(mode="after")
    def _fits(self) -> Branches:
        if not self.layers or not self.zeros:
            raise ValueError("layers and zeros must name something")
        return self


class Recorded(Strict):
    """What an artifact says of one routed layer.

    Attributes:
        stack: paths of the layers of its stack.
        depth: which of them it stands for, from 0.
        others: members whose layers of the same structure are components as well; copies of them lie here.
        lent: by member, layers of another structure, which are components between adapters.
        tasks: with a route of their own; none where one route serves all.
        how: the method's settings.
        chosen: by task, the components of a route that is not learned, or not any more.
        held: which components lie here; all by default.
        branches: of routes over branches, what the layers' paths are; `stack` then has the branches' modules.
    """

    stack: Names
    depth: Count
    others: Names = ()
    lent: Annotated[dict[str, Lent], Field(max_length=4096)] = Field(default_factory=dict)
    tasks: Names = ()
    how: Settings = Field(default_factory=Settings)
    chosen: dict[str, Names] | None = None
    held: Names | None = None
    branches: Branches | None = None

    @property
    def per_layer(self) -> int:
        """How many depths a layer has."""
        return 1 if self.branches is None else len(self.stack) // len(self.branches.layers)

    @property
    def name(self) -> str:
        """That of the component that was here: its depth, or its layer's and the branch within it."""
        if self.branches is None:
            return str(self.depth)
        layer = self.depth // self.per_layer
        return f"{layer}.{self.stack[self.depth].removeprefix(self.branches.layers[layer]).removeprefix('.')}"

    def names(self) -> list[str]:
        """The components of this depth: those that are chosen; of a learned route those of one depth where it is
        `gumbel`, and of all where it is `soft`."""
        if self.chosen is not None:
            return list(dict.fromkeys(name for some in self.chosen.values() for name in some))
        if self.branches is not None:
            return [self.name, IDENTITY]
        every = range(len(self.stack))
        depths = [self.depth] if self.how.routing == "gumbel" else every
        found = [name for d in depths for name in self._at(str(d), d)]
        return found + [IDENTITY] * self.how.identity

    def lying(self) -> list[str]:
        """The components that can lie here."""
        return self._at(self.name, self.depth)

    def _at(self, own: str, depth: int) -> list[str]:
        """Its own component at a depth, those of other members there, and those that they lend."""
        lent = [
            f"{other}/{number}"
            for other, each in self.lent.items()
            for number in range(len(each.layers))
            if each.depth_of(number, len(self.stack)) == depth
        ]
        return [own, *(f"{other}/{depth}" for other in self.others), *lent]


def plan_routes(anatomies: Sequence[Anatomy], request: PlanRequest) -> list[Replacement]:
    """Every layer of every stack that is chosen, routed.

    Args:
        anatomies: of all members.
        request: with the method's settings, and patterns of stacks.

    Raises:
        PlanError: for tasks and orders of members that do not exist, orders of the wrong length, and budgets that no
            choice of layers meets.
    """
    settings = request.settings
    assert isinstance(settings, Settings)
    known = [anatomy.member for anatomy in anatomies]
    if unknown := sorted({*settings.tasks, *settings.orders} - set(known)):
        raise PlanError(
            f"`tasks` and `orders` must name members ({shorten(known)}), found {shorten(unknown)}: correct them."
        )
    runs = choose_runs([run for anatomy in anatomies for run in anatomy.runs], request.stacks)
    if settings.layers is not None and (short := [r for r in runs if len(r.layers) < settings.layers]):
        named = ", ".join(f"{run.path} of '{run.member}' has {len(run.layers)}" for run in short)
        raise PlanError(f"`layers` is {settings.layers}, but {named}: ask for no more than there are.")
    runs = _without_readers(runs, settings, bool(request.stacks))
    least = min((len(run.layers) for run in runs), default=1)
    if settings.component_budget is not None and settings.component_budget * least < 1:
        raise PlanError(
            f"A `component_budget` of {settings.component_budget:g} leaves less than one layer of a stack of {least}: "
            f"give at least {1 / least:.3g}."
        )
    generator = torch.Generator().manual_seed(settings.seed)
    found = []
    for run in runs:
        alike = _alike(run, runs, settings, request.members)
        lent = lent_to(run, runs, alike, request.members) if settings.adapters else {}
        found += _of_run(run, alike, lent, settings, generator)
    return found


def _without_readers(runs: Sequence[Run], settings: Settings, named: bool) -> list[Run]:
    """The stacks from which layers can be left out, where any may be.

    Args:
        runs: that are chosen.
        settings: of the method.
        named: whether patterns chose them; else those that are read elsewhere are left alone beside others.

    Raises:
        PlanError: naming stacks, layers and who reads them.
    """
    bad = {run: run.flow.read for run in runs if run.flow.read and _leaves_out(run, settings)}
    left = [run for run in runs if run not in bad]
    if not bad or (left and not named):
        return left
    said = "; ".join(
        f"of {run.path} of '{run.member}' {shorten(f'{layer} (by {reader})' for layer, reader in read)}"
        for run, read in bad.items()
    )
    raise PlanError(
        f"A route can leave out layers only where nothing but the next layer reads what they give, but {said} "
        "is read elsewhere too: choose other stacks by `select.stacks`, set `identity` to false so that every depth "
        "keeps a layer, or have the model give no hidden states of single layers."
    )


def _leaves_out(run: Run, settings: Settings) -> bool:
    """Whether a route over a stack may have the identity at some depth."""
    if settings.learns:
        return settings.identity
    return any(i < 0 for order in settings.orders.get(run.member, {}).values() for i in order)


def _of_run(
    run: Run,
    others: tuple[str, ...],
    lent: dict[str, Lent],
    settings: Settings,
    generator: torch.Generator,
) -> list[Replacement]:
    if settings.branches:
        return _branches_of(run, settings)
    tasks = settings.tasks.get(run.member, ())
    orders = _orders(run, tasks or ("",), settings, generator)
    used = {number for order in (orders or {}).values() for number in order}
    found = []
    for depth, path in enumerate(run.layers):
        said: dict[str, object] = {"stack": run.layers, "depth": depth}
        said |= {"others": others} if others else {}
        said |= {"lent": lent} if lent else {}
        said |= {"tasks": tasks} if tasks else {}
        said["how"] = settings.model_dump(mode="json", exclude={"tasks", "orders"}, exclude_defaults=True)
        if orders is not None:
            said["chosen"] = {
                task: (IDENTITY if order[depth] < 0 else str(order[depth]),) for task, order in orders.items()
            }
            said["held"] = (str(depth),) * (depth in used)
        found.append(Replacement(run.member, path, NAME, _settings(said)))
    return found


def _branches_of(run: Run, settings: Settings) -> list[Replacement]:
    """Every branch of every layer, routed.

    Raises:
        PlanError: where the graph shows no branches that all layers have.
    """
    tasks = settings.tasks.get(run.member, ())
    own = run.flow.branches
    if not own:
        raise PlanError(
            f"`branches` needs layers that all add what the same modules give to one stream, but of {run.path} of "
            f"'{run.member}' the graph shows none: leave `branches` out, or choose other stacks by `select.stacks`."
        )
    stack = tuple(f"{layer}.{branch.module}" for layer in run.layers for branch in own)
    said: dict[str, object] = {"stack": stack}
    said |= {"tasks": tasks} if tasks else {}
    said["how"] = settings.model_dump(mode="json", exclude={"tasks", "orders"}, exclude_defaults=True)
    said["branches"] = Branches(
        layers=run.layers, zeros=tuple(branch.zeros for branch in own), passes_on=run.flow.passes_on
    )
    return [
        Replacement(run.member, path, NAME, _settings({**said, "depth": depth}))
        for depth, path in enumerate(stack)
    ]


def _settings(said: dict[str, object]) -> dict[str, Any]:
    return Recorded.model_validate(said).model_dump(mode="json", exclude_unset=True)


def _orders(
    run: Run, tasks: Sequence[str], settings: Settings, generator: torch.Generator
) -> dict[str, list[int]] | None:
    """By task, the layer at each depth of a route that is not learned."""
    depth = len(run.layers)
    if settings.routing == "parallel":
        return {task: list(range(depth)) for task in tasks}
    if settings.routing != "permuted":
        return None
    given = settings.orders.get(run.member, {})
    if unknown := sorted(set(given) - set(tasks)):
        raise PlanError(
            f"`orders` of '{run.member}' must be of its tasks ({shorten(tasks)}), found {shorten(unknown)}."
        )
    check_orders(
        {task: [max(i, 0) if i == -1 else i for i in order] for task, order in given.items()},
        depth,
        depth,
        f"{run.path} of '{run.member}' (-1 leaves a layer out)",
    )
    return {
        task: list(given[task]) if task in given else chance_order(depth, depth, generator) for task in tasks
    }


def _alike(
    run: Run, runs: Sequence[Run], settings: Settings, members: Mapping[str, Member]
) -> tuple[str, ...]:
    """Other members with a stack of the same structure and number of layers, whose layers this one's tasks may use."""
    if not settings.members:
        return ()
    own = _numbers_of(run, members)
    return tuple(
        other.member
        for other in runs
        if other.member != run.member and other.parts == run.parts and other.layers == run.layers
        if _numbers_of(other, members) == own
    )


def _numbers_of(run: Run, members: Mapping[str, Member]) -> object:
    """What a layer computes with beside its tensors, such as its number of heads; not its place, nor what it drops."""
    layer = members[run.member].module.get_submodule(run.layers[0])
    return [
        (type(part), key, value)
        for part in layer.modules()
        for key, value in sorted(vars(part).items())
        if isinstance(value, (int, float, str)) and "drop" not in type(part).__name__.lower()
        if "drop" not in key and key not in ("training", "layer_idx")
    ]
