"""Routed: components that tasks use as they learn to, as one module of any model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from surgery.errors import PlanError
from surgery.methods.routes.gates import IDENTITY, WRITTEN, BernoulliGates, Gates, check_orders, make_gates
from surgery.methods.routes.mathematics import mixed
from surgery.methods.routes.settings import Settings
from surgery.util.text import one_line, shorten


class Routed(nn.Module):
    """Components f_i and a route through them for each task: `y[t, d] = sum_i g[t, d, i] * f_i(y[t, d-1])`.

    With `soft`, `parallel` and `permuted` routing all components serve every depth; with `gumbel` each belongs to one,
    and they are given depth by depth. `surgery.train` anneals temperatures, draws samples that resume exactly, and
    adds the budget's penalty; in a loop of your own call `serve_task` before each batch, add `penalty()` to the loss,
    and set `temperature`. In eval mode `gumbel` takes the likelier value of each z, and components that are off are not
    run.

    Args:
        components: modules; for `gumbel` a sequence of modules for each depth.
        depth: how many depths there are; by default one for each component, or each sequence of them.
        routing: `soft`, `gumbel`, `parallel` or `permuted`.
        tasks: their names; `serve_task` chooses one.
        identity: whether passing on is one more component at each depth; for `gumbel` it stands in where all are off.
        dropout: after each depth.
        orders: for `permuted`, by task the component at each depth; by chance from `seed` where not given.
        settings: others of the method, such as `p_init`, `component_budget`, `penalty`, `rate`, `harden` and `seed`.

    Raises:
        PlanError: for settings that are not valid, too few components, and orders of the wrong length.

    Example:
        >>> layers = [nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3)]
        >>> routed = Routed(layers, routing="soft", tasks=("mood", "topic"))
        >>> routed.serve_task("mood")
        >>> routed(torch.randn(2, 8)).shape
        torch.Size([2, 8])
        >>> [round(share, 2) for share in routed.shares("mood")[0].tolist()]
        [0.33, 0.33, 0.33]
    """

    surgery_method = "routes"
    """What trains it; see `surgery.core.registry.active_methods`."""

    def __init__(
        self,
        components: Sequence[Any],
        depth: int | None = None,
        *,
        routing: str = "soft",
        tasks: Sequence[str] = ("",),
        identity: bool = False,
        dropout: float = 0.0,
        orders: Mapping[str, Sequence[int]] | None = None,
        **settings: Any,
    ):
        super().__init__()
        from surgery.core.registry import settings_of

        given = {"routing": routing, "identity": identity, **({"p_init": 0.5} | settings)}
        found = settings_of("routes", given)
        assert isinstance(found, Settings)
        self.settings, self.tasks = found, tuple(tasks)
        layers = _by_depth(components, depth, routing)
        self.components = nn.ModuleList(
            [nn.ModuleList(layer) for layer in layers] if routing == "gumbel" else layers[0]
        )
        self.dropout = nn.Dropout(dropout) if dropout else None
        names = [_names(layer, d, routing, identity) for d, layer in enumerate(layers)]
        fixed = _orders(self.settings, self.tasks, len(layers), len(layers[0]), orders)
        self.gates = nn.ModuleList(
            make_gates(WRITTEN, d, names[d], self.tasks, self.settings, chosen=chosen)
            for d, chosen in enumerate(fixed)
        )

    def __len__(self) -> int:
        return len(self.gates)

    def serve_task(self, task: str | None) -> None:
        """The forward passes that follow are those of a task.

        Args:
            task: one of `tasks`; None for what all tasks together like best.

        Raises:
            PlanError: for a task that it has no route for.
        """
        if task is not None and task not in self.tasks and self.tasks != ("",):
            raise PlanError(
                f"Task '{task}' has no route: there are routes for {shorten(self.tasks)}; name it among the `tasks` of "
                "Routed."
            )
        for gates in self.depths():
            gates.serve(task)

    def depths(self) -> list[Gates]:
        """The gates of each depth."""
        return [gates for gates in self.gates if isinstance(gates, Gates)]

    def shares(self, task: str) -> list[Tensor]:
        """By depth, probabilities of being on or shares `[N]` of a task's components.

        Args:
            task: one of `tasks`.
        """
        return [gates.table()[self.tasks.index(task)] for gates in self.depths()]

    def penalty(self) -> Tensor:
        """What the budget adds to the losses of all tasks: `lambda * max(0, mean p - b)`, summed over tasks."""
        from surgery.methods.routes.groups import penalty_of

        return penalty_of(self.depths())

    @property
    def temperature(self) -> float:
        """Of the softmax backward."""
        return float(getattr(self.depths()[0], "temperature", 0.0))

    @temperature.setter
    def temperature(self, value: float) -> None:
        for gates in self.depths():
            if isinstance(gates, BernoulliGates):
                gates.temperature = value

    def forward(self, y: Tensor) -> Tensor:
        """Follow the route of the task that is served.

        Raises:
            PlanError: where components do not fit, naming all of them with shapes.
        """
        for d, gates in enumerate(self.depths()):
            parts = self.components[d] if self.settings.routing == "gumbel" else self.components
            assert isinstance(parts, nn.ModuleList)
            run, shares = gates.now(every=y.is_meta)
            if not run:
                y = self._zeros(parts, y)
            elif shares is None:
                y = _apply(parts, run[0], y)
            else:
                y = mixed(shares, self._outputs(parts, run, y, d))
            y = y if self.dropout is None else self.dropout(y)
        return y

    def _outputs(self, parts: nn.ModuleList, run: Sequence[int], y: Tensor, depth: int) -> list[Tensor]:
        try:
            outputs = [_apply(parts, i, y) for i in run]
        except (RuntimeError, ValueError) as error:
            raise self._misfit(parts, y, depth) or error from error
        if len({output.shape for output in outputs}) > 1:
            raise self._misfit(parts, y, depth) or PlanError("Components give other outputs each time.")
        return outputs

    def _misfit(self, parts: nn.ModuleList, y: Tensor, depth: int) -> PlanError | None:
        """The error that names all components and what they give; None where they fit."""
        said, shapes = [], set()
        for i, name in enumerate(self.depths()[depth].names):
            try:
                with torch.no_grad():
                    found = str([*_apply(parts, i, y).shape])
            except (RuntimeError, ValueError) as error:
                found = f"an error: {one_line(error)}"
            shapes.add(found)
            said.append(f"{name} gives {found}")
        if len(shapes) == 1 and "error" not in next(iter(shapes)):
            return None
        return PlanError(
            f"Components must give outputs of one shape, but at depth {depth}, of an input {[*y.shape]}, "
            f"{'; '.join(said)}: change those that differ."
        )

    def _zeros(self, parts: nn.ModuleList, y: Tensor) -> Tensor:
        """Zeros of the shape that the components give."""
        with torch.no_grad():
            return torch.zeros_like(_apply(parts, 0, y))


def _apply(parts: nn.ModuleList, number: int, y: Tensor) -> Tensor:
    return parts[number](y) if number < len(parts) else y


def _by_depth(components: Sequence[Any], depth: int | None, routing: str) -> list[list[nn.Module]]:
    """The components of each depth."""
    apart = [isinstance(each, (list, tuple, nn.ModuleList)) for each in components]
    if not apart or (routing == "gumbel") != all(apart) or any(apart) != all(apart):
        wanted = "a sequence of modules for each depth" if routing == "gumbel" else "modules"
        raise PlanError(
            f"The components of {routing} routing must be {wanted}, found "
            f"{shorten([type(each).__name__ for each in components]) or 'none'}."
        )
    if routing == "gumbel":
        layers = [list(each) for each in components]
        if depth not in (None, len(layers)) or not all(layers):
            raise PlanError(
                f"There must be components for each depth, found {[len(each) for each in layers]} for a depth of "
                f"{depth if depth is not None else len(layers)}."
            )
        return layers
    count = len(components) if depth is None else depth
    if count < 1 or (routing == "parallel" and count > len(components)):
        raise PlanError(f"A depth of {count} needs as many components, found {len(components)}.")
    return [list(components)] * count


def _names(layer: Sequence[nn.Module], depth: int, routing: str, identity: bool) -> list[str]:
    numbers = [f"{depth}.{i}" if routing == "gumbel" else str(i) for i in range(len(layer))]
    return numbers + [IDENTITY] * identity


def _orders(
    settings: Settings,
    tasks: Sequence[str],
    depth: int,
    count: int,
    given: Mapping[str, Sequence[int]] | None,
) -> Sequence[dict[str, tuple[int, ...]] | None]:
    """By depth and task, the component of a route that is not learned; none where it is."""
    if settings.routing == "parallel":
        return [dict.fromkeys(tasks, (d,)) for d in range(depth)]
    if settings.routing != "permuted":
        if given:
            raise PlanError(f"Orders need permuted routing, found {settings.routing}: leave `orders` out.")
        return [None] * depth
    generator = torch.Generator().manual_seed(settings.seed)
    by_chance = {task: chance_order(depth, count, generator) for task in tasks}
    orders = {**by_chance, **{task: list(order) for task, order in (given or {}).items()}}
    if unknown := sorted(set(orders) - set(tasks)):
        raise PlanError(f"Orders must be those of tasks {shorten(tasks)}, found {shorten(unknown)}.")
    check_orders(orders, depth, count, "this Routed")
    return [{task: (order[d],) for task, order in orders.items()} for d in range(depth)]


def chance_order(depth: int, count: int, generator: torch.Generator) -> list[int]:
    """Components in a random order, again and again where there are more depths than components."""
    order: list[int] = []
    while len(order) < depth:
        order += torch.randperm(count, generator=generator).tolist()
    return order[:depth]
