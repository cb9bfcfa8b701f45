"""The method of learned routes: layers of pretrained stacks as components, and `Routed` in models of one's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from surgery.core.method import Curves, Picture, PlanRequest, register_method
from surgery.core.module_method import ModuleSurgery, Place, part_of
from surgery.errors import ExportError
from surgery.members.member import Member
from surgery.members.replacement import Replacement
from surgery.methods.routes.adapters import Adapted, Lent
from surgery.methods.routes.gates import IDENTITY, Gates, LearnedGates, make_gates
from surgery.methods.routes.groups import hard_routes, routes_in
from surgery.methods.routes.layers import (
    Left,
    Pool,
    RoutedBranch,
    RoutedLayer,
    outline_of,
    without_effect,
)
from surgery.methods.routes.plan import Recorded, plan_routes
from surgery.methods.routes.settings import Settings
from surgery.settings.names import SHIPPED_METHODS
from surgery.settings.problems import Strict
from surgery.util.copies import duplicate
from surgery.util.showing import plural

if TYPE_CHECKING:
    from surgery.anatomy.sites import Anatomy
    from surgery.core.joint import JointModel
    from surgery.settings.training import Training
    from surgery.training.loop.moves import Moves
    from surgery.training.loop.trainer import Trainer


@register_method
class Routes(ModuleSurgery):
    """Which component every task uses, at which depth and how much."""

    name: ClassVar[str] = "routes"
    summary: ClassVar[str] = SHIPPED_METHODS["routes"]
    settings: ClassVar[type[Strict]] = Settings
    recorded: ClassVar[type[Strict]] = Recorded
    sharded: ClassVar[bool] = False
    whole: ClassVar[bool] = True
    hardens: ClassVar[bool] = True

    def plan(self, anatomies: Sequence[Anatomy], request: PlanRequest) -> Sequence[Replacement]:
        """Every layer of the stacks that are chosen."""
        return plan_routes(anatomies, request)

    def has_its_own(self, module: nn.Module) -> bool:
        """Whether a model was written with `Routed` in it."""
        return bool(routes_in(module))

    def replace(self, place: Place) -> nn.Module:
        """A routed layer, with copies of what other members have there."""
        how = place.how
        assert isinstance(how, Recorded)
        path, first = place.replacement.path, place.part(how.stack[0])
        pool = first.pool if isinstance(first, RoutedLayer) else Pool()
        wanted = how.lying() if how.held is None else how.held
        held = {name: _component(place, pool, name) for name in wanted}
        names, chosen, own = how.names(), None, None
        if how.chosen is None:
            own = names.index(how.name)
        else:
            chosen = {task: [names.index(name) for name in some] for task, some in how.chosen.items()}
        gates = make_gates(_route(how), how.depth, names, how.tasks, how.how, own, chosen, how.per_layer)
        if how.branches is None:
            return RoutedLayer(path, held, gates, pool)
        return RoutedBranch(path, held, gates, pool, outline_of(place.current))

    # -- plain again ---------------------------------------------------------------------------------------

    def collapse(self, place: Place) -> nn.Module:
        """A copy of the component that the route has at this depth."""
        layer = place.current
        assert isinstance(layer, RoutedLayer)
        name = one_of(layer, place)
        if name != IDENTITY and isinstance(layer.pool.layers[name], Adapted):
            raise ExportError(
                f"The route of member '{place.replacement.member}' takes {name} at {layer.path}, a layer of another "
                "structure between adapters, which no plain model has: train with `adapters` false, or save the joint "
                "model, which `surgery.load` reads."
            )
        if name != IDENTITY:
            return duplicate(layer.pool.layers[name])
        if isinstance(layer, RoutedBranch):  # what makes it add nothing is seen to at the end
            return without_effect(layer.outline, next(place.module.parameters()))
        return Left()

    def finish(self, member: Member, module: nn.Module, replacements: Sequence[Replacement]) -> None:
        """Take out the layers that a route leaves out, and say in the configuration how many are left.

        Branches that are off stay as modules that add zeros; a layer that gives what it gets without any is taken out.
        """
        from surgery.methods.routes.plain import close_stacks, turn_off

        recorded = [(each, Recorded.model_validate(dict(each.settings))) for each in replacements]
        off = []
        for each, how in recorded:
            if how.branches is not None:
                place = Place({member.name: member.module}, each, how)
                layer = place.current
                assert isinstance(layer, RoutedBranch)
                off += [(how.branches, how.depth)] * (one_of(layer, place) == IDENTITY)
        stacks = {tuple(how.stack) for _, how in recorded if how.branches is None}
        close_stacks(member, module, sorted(stacks | turn_off(module, off)))

    # -- training ------------------------------------------------------------------------------------------

    def unsuited(self, joint: JointModel, config: Training) -> list[str]:
        """Copies of other members' layers that would be trained apart, and compiled members.

        Which layers run depends on the task and on the phase of a run; compiled code would keep both as they were.
        """
        from surgery.methods.routes.sharing import borrows

        if config.compile:
            return [
                "Members with routes run other layers for each task and phase: set `train.compile` to false."
            ]
        if borrows(joint) and config.evolution.start == "own":
            return [
                "Routes through other members' layers need these to stay one: set `train.evolution.start` to given."
            ]
        return []

    def phases(self, config: Training) -> str:
        """Those in which routes are hard."""
        return f"the last {config.final} with hard routes" if config.final else ""

    def start(self, joint: JointModel, config: Training, generator: torch.Generator) -> None:
        """Make one of what members have in common."""
        from surgery.methods.routes.sharing import tie_private

        tie_private(joint)

    def moves(self, trainer: Trainer) -> Moves:
        """Samples, temperatures, the budget and hardening."""
        from surgery.methods.routes.moves import RouteMoves

        return RouteMoves(self.name, trainer)

    def harden(self, joint: JointModel) -> None:
        """One route for each task, of the components that it likes best."""
        from surgery.methods.routes.hardening import harden

        harden(joint)

    def ended(self, joint: JointModel) -> None:
        """Drop the components that no hard route uses."""
        from surgery.methods.routes.hardening import drop_unused, is_hard

        if is_hard(joint):
            drop_unused(joint)

    def pictures(self) -> dict[str, Picture]:
        """Who uses what, probabilities over time, and which tasks are alike."""
        from surgery.methods.routes.pictures import draw_allocation, draw_likeness, draw_over_time

        return {
            "allocation.png": draw_allocation,
            "routes.png": draw_over_time,
            "likeness.png": draw_likeness,
        }

    def curves(self, generations: Sequence[dict[str, Any]]) -> list[Curves]:
        """How many components tasks use on average."""
        from surgery.methods.routes.pictures import curves_of

        return curves_of(generations)


def _route(how: Recorded) -> str:
    """The name of a stack's route: what its layers' paths have in common."""
    layers = how.stack if how.branches is None else how.branches.layers
    split = [path.split(".") for path in layers]
    if len({len(steps) for steps in split}) > 1:
        return layers[0]
    return ".".join(steps[0] if len(set(steps)) == 1 else "*" for steps in zip(*split, strict=True))


def _component(place: Place, pool: Pool, name: str) -> nn.Module:
    """A component that shall lie in a place: the layer that is there, or a copy of another member's.

    Where an artifact is loaded the other member is not there; its layer is of the same structure, or what was recorded
    builds it.
    """
    how = place.how
    own = place.current
    if how.branches is not None:
        return own
    member, slash, depth = name.rpartition("/")
    if not slash:
        return own if int(depth) == how.depth else duplicate(_layer(place, how.stack[int(depth)]))
    if member in how.lent:
        return _adapted(place, pool, member, int(depth))
    if member not in place.modules:
        return duplicate(own)
    return duplicate(_layer(place, how.stack[int(depth)], member))


def _adapted(place: Place, pool: Pool, member: str, number: int) -> Adapted:
    """A copy of another member's layer between adapters."""
    lent: Lent = place.how.lent[member]
    path = lent.layers[number]
    if member in place.modules:
        return Adapted(duplicate(_layer(place, path, member)), lent, path)
    if member not in pool.lenders:
        pool.lenders[member] = lent.architecture_again()
    layer = duplicate(part_of(pool.lenders[member], path, member))
    like = next(place.module.parameters())
    return Adapted(layer if like.is_meta else without_effect(layer, like), lent, path)


def _layer(place: Place, path: str, member: str | None = None) -> nn.Module:
    """The layer that a member has, or had, at a path."""
    found = place.part(path, member)
    return found.held[0] if isinstance(found, RoutedLayer) else found


def one_of(layer: RoutedLayer, place: Place) -> str:
    """The only component of a route at a depth, by name.

    Raises:
        ExportError: where the route is soft, takes several, or is another for each task.
    """
    gates, member = layer.gates, place.replacement.member
    chosen = _chosen(layer, place.module)
    if chosen is None:
        raise ExportError(
            f"The route of member '{member}' at {layer.path} is still soft: it mixes components, which no plain model "
            "does; harden it first (`harden`), or save the joint model."
        )
    if gates.task is not None or len(gates.tasks) == 1:
        chosen = {gates.task or gates.tasks[0]: chosen[gates.task or gates.tasks[0]]}
    if len(set(chosen.values())) > 1:
        raise ExportError(
            f"The tasks {', '.join(gates.tasks)} of member '{member}' take different routes at {layer.path}: export "
            "one of them inside `joint.serving(task)`, or save the joint model."
        )
    (numbers,) = set(chosen.values())
    if len(numbers) != 1:
        raise ExportError(
            f"The route of member '{member}' takes {plural(len(numbers), 'component')} at {layer.path}, which no plain "
            "model does: save the joint model, which `surgery.load` reads."
        )
    return gates.names[numbers[0]]


def _chosen(layer: RoutedLayer, module: nn.Module) -> dict[str, tuple[int, ...]] | None:
    """By task, the components of a hard route, or of one that nothing was learned of yet; None where it is soft."""
    gates: Gates = layer.gates
    if not isinstance(gates, LearnedGates):
        return gates.likely()
    if gates.hard is not None:
        return gates.hard
    if gates.waits and gates.own is not None:
        return dict.fromkeys(gates.tasks, (gates.own,))
    if gates.settings.routing == "gumbel":  # the likelier value of each z is what it computes
        depths = next(d for d in routes_in(module).values() if gates in d)
        return hard_routes(depths)[gates.depth] if gates.settings.layers is None else None
    return None
