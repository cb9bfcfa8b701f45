"""Routed layers: what stands in the place of the layers of a pretrained stack.

Every layer stays where it was, as a component of its own depth; the others reach it through a `Pool`, which is no
module, so that each tensor has one name. Layers of other members are copies, as a member has to be whole by itself;
what is equal is stored once, and trained as one (`surgery.methods.routes.sharing`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from surgery.errors import PlanError
from surgery.methods.routes.gates import IDENTITY, Gates
from surgery.methods.routes.mathematics import mixed
from surgery.util.text import one_line

HIDDEN = "hidden_states"


class Pool:
    """The components of all depths of a stack by name; it owns none of them."""

    def __init__(self) -> None:
        self.layers: dict[str, nn.Module] = {}


class RoutedLayer(nn.Module):
    """One depth of a stack: the mix of components that the gates say, of whatever a layer of the stack takes.

    Args:
        path: of the layer that was here.
        held: components that lie here, by name: the layer that was here, and copies of other members' layers.
        gates: of this depth.
        pool: of the stack.

    Attributes:
        held: by number, as names of components may hold what names of modules cannot.
    """

    def __init__(self, path: str, held: Mapping[str, nn.Module], gates: Gates, pool: Pool):
        super().__init__()
        self.path, self.gates, self.pool = path, gates, pool
        self.own = tuple(held)
        self.held = nn.ModuleList(held.values())
        pool.layers |= dict(held)
        self.checked = False
        self.wrapped: bool | None = None  # whether layers give tuples; known once one has run

    def serve_task(self, task: str | None) -> None:
        """The forward passes that follow are those of a task."""
        self.gates.serve(task)

    def __getattr__(self, name: str) -> Any:
        """What code reads of a layer, such as its kind of attention."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            for layer in self.__dict__["_modules"].get("held", ()):
                return getattr(layer, name)
            raise

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The mix, in the form that a layer of the stack gives.

        Raises:
            PlanError: where components do not fit, where layers get a cache, and where they have side outputs.
        """
        hidden = args[0] if args else kwargs[HIDDEN]
        if not self.checked and not hidden.is_meta:
            self._check(hidden, args, kwargs)
        run, shares = self.gates.now(every=hidden.is_meta)
        outputs = [self._run(self.gates.names[i], hidden, args, kwargs) for i in run]
        if shares is None:
            return outputs[0]
        return self._wrap(mixed(shares, [self._hidden(output) for output in outputs]))

    def _run(self, name: str, hidden: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if name != IDENTITY:
            return self.pool.layers[name](*args, **kwargs)
        return self._wrap(hidden)

    def _wrap(self, hidden: Tensor) -> Any:
        return (hidden,) if self.wrapped else hidden

    def _hidden(self, output: Any) -> Tensor:
        return output[0] if isinstance(output, tuple) else output

    @torch.no_grad()
    def _check(self, hidden: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Try every component once, on what comes first."""
        if cached := [type(each).__name__ for each in (*args, *kwargs.values()) if _is_cache(each)]:
            raise PlanError(
                f"Layers on a route keep no cache, but {self.path} gets one ({', '.join(cached)}): set `use_cache` to "
                "false in the model's configuration."
            )
        found: dict[str, str] = {}
        training = self.training
        try:
            self.eval()
            for name in (each for each in self.gates.names if each != IDENTITY):
                try:
                    found[name] = self._outline(self._run(name, hidden, args, kwargs))
                except (RuntimeError, ValueError, TypeError) as error:
                    found[name] = f"an error: {one_line(error)}"
        finally:
            self.train(training)
        if IDENTITY in self.gates.names:
            found[IDENTITY] = str([*hidden.shape])
        if len(set(found.values())) > 1:
            said = "; ".join(f"{name} gives {what}" for name, what in found.items())
            raise PlanError(
                f"Components must give outputs of one shape, but for an input {[*hidden.shape]} of {self.path} "
                f"{said}; choose stacks by `select.stacks` whose layers keep the shape, or leave `identity` out."
            )
        self.checked = True

    def _outline(self, output: Any) -> str:
        """The shape of the hidden states in a layer's output."""
        parts = output if isinstance(output, tuple) else (output,)
        if not isinstance(parts[0], Tensor) or any(part is not None for part in parts[1:]):
            kinds = ", ".join(type(part).__name__ for part in parts)
            raise PlanError(
                f"A layer on a route must give one tensor, but {self.path} gives side outputs as well ({kinds}): "
                "switch them off in the model's configuration, such as `output_attentions`, or choose other stacks by "
                "`select.stacks`."
            )
        self.wrapped = isinstance(output, tuple)
        return str([*parts[0].shape])


def _is_cache(value: Any) -> bool:
    """Whether an argument is a cache of transformers, which need not be installed."""
    return any(kind.__name__ == "Cache" for kind in type(value).__mro__)


class Left(nn.Module):
    """Stands for a layer that a route leaves out, until it is taken out of the plain model."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Pass on the first argument."""
        return args[0] if args else kwargs[HIDDEN]
