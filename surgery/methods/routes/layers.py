"""Routed layers: what stands in the place of the layers of a pretrained stack.

Every layer stays where it was, as a component of its own depth; the others reach it through a `Pool`, which is no
module, so that each tensor has one name. Layers of other members are copies, as a member has to be whole by itself;
what is equal is stored once, and trained as one (`surgery.methods.routes.sharing`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from surgery.errors import PlanError
from surgery.methods.routes.adapters import HIDDEN
from surgery.methods.routes.gates import IDENTITY, FixedGates, Gates
from surgery.methods.routes.mathematics import mixed
from surgery.util.copies import duplicate
from surgery.util.modules import kept_modes
from surgery.util.text import one_line

_Form = tuple[dict[int, int], int | None]


class Pool:
    """The components of all depths of a stack by name; it owns none of them.

    Attributes:
        layers: the components.
        lenders: by member, architectures that were built for their layers alone.
    """

    def __init__(self) -> None:
        self.layers: dict[str, nn.Module] = {}
        self.lenders: dict[str, nn.Module] = {}


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
        self.settled = False
        self.__dict__["only"] = None  # a component that lies here, or elsewhere in the stack
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
        if self.settled:  # one component for every task: called as the plain model does
            if self.only is not None:
                return self.only(*args, **kwargs)
            return self._passed_on(args[0] if args else kwargs[HIDDEN], args, kwargs)
        hidden = args[0] if args else kwargs[HIDDEN]
        if not hidden.is_meta:
            if not self.checked:
                self._check(hidden, args, kwargs)
            self._settle()
        run, shares = self.gates.now(every=hidden.is_meta)
        outputs = [self._run(self.gates.names[i], hidden, args, kwargs) for i in run]
        if shares is None:
            return outputs[0]
        return self._wrap(mixed(shares, [self._hidden(output) for output in outputs]))

    def _settle(self) -> None:
        """Note the one component that runs for every task, where gates are fixed and there is one."""
        always = self.gates.always if isinstance(self.gates, FixedGates) else None
        if always is not None:
            name = self.gates.names[always]
            self.__dict__["only"] = None if name == IDENTITY else self.pool.layers[name]
            self.settled = True

    def _run(self, name: str, hidden: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if name != IDENTITY:
            return self.pool.layers[name](*args, **kwargs)
        return self._passed_on(hidden, args, kwargs)

    def _passed_on(self, hidden: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """What there is without any component."""
        return self._wrap(hidden)

    def again(self, kept: Mapping[str, nn.Module], gates: Gates, pool: Pool) -> RoutedLayer:
        """The same place with other components and gates.

        Args:
            kept: components that lie here.
            gates: of this depth.
            pool: of the stack.
        """
        made = type(self)(self.path, kept, gates, pool)
        made.checked, made.wrapped = self.checked, self.wrapped
        return made.train(self.training)

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
        with kept_modes(self.modules()):
            self.eval()
            for name in (each for each in self.gates.names if each != IDENTITY):
                try:
                    found[name] = self._outline(self._run(name, hidden, args, kwargs))
                except (RuntimeError, ValueError, TypeError) as error:
                    found[name] = f"an error: {one_line(error)}"
        if IDENTITY in self.gates.names:
            found |= self._outline_of_identity(hidden)
        if len(set(found.values())) > 1:
            said = "; ".join(f"{name} gives {what}" for name, what in found.items())
            more = ", `members` or `adapters`" if any("/" in name for name in found) else ""
            raise PlanError(
                f"Components must give outputs of one shape, but for an input {[*hidden.shape]} of {self.path} "
                f"{said}: choose stacks by `select.stacks` whose layers keep the shape, or leave out `identity`{more}."
            )
        self.checked = True

    def _outline_of_identity(self, hidden: Tensor) -> dict[str, str]:
        return {IDENTITY: str([*hidden.shape])}

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


class RoutedBranch(RoutedLayer):
    """A module that gives what a layer adds to its stream: on, or off, where zeros are added and the module is not run.

    Args:
        path: of the module that was here.
        held: that module, by its component's name; empty where no task uses it.
        gates: of this depth.
        pool: of the stack.
        outline: of that module, on the meta device: of what form its outputs are.
    """

    def __init__(
        self, path: str, held: Mapping[str, nn.Module], gates: Gates, pool: Pool, outline: nn.Module
    ):
        super().__init__(path, held, gates, pool)
        self.__dict__["outline"] = outline  # it is no part of the member
        self.form: _Form | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["outline"], name)

    def again(self, kept: Mapping[str, nn.Module], gates: Gates, pool: Pool) -> RoutedLayer:
        """The same place with other components and gates."""
        made = RoutedBranch(self.path, kept, gates, pool, self.outline)
        made.checked, made.wrapped, made.form = self.checked, self.wrapped, self.form
        return made.train(self.training)

    def _passed_on(self, hidden: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if self.form is None:  # of an artifact that does not have the module, as no task uses it
            meta = partial(torch.empty_like, device="meta")
            like, others = tree_map_only(Tensor, meta, (tuple(args), dict(kwargs)))
            with torch.no_grad(), torch.device("meta"):
                self._take_form(hidden, self.outline(*like, **others))
        assert self.form is not None
        others, count = self.form
        shape = [others.get(axis, size) for axis, size in enumerate(hidden.shape)]
        zeros = hidden.new_zeros(shape)
        return zeros if count is None else (zeros, *(None,) * (count - 1))

    def _run(self, name: str, hidden: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        output = super()._run(name, hidden, args, kwargs)
        if self.form is None:
            self._take_form(hidden, output)
        return output

    def _take_form(self, hidden: Tensor, output: Any) -> None:
        """Note sizes of axes that are not the input's, and how many things the module gives where it is a tuple."""
        first = self._hidden(output)
        if first.ndim != hidden.ndim:
            raise PlanError(
                f"A branch on a route must give a tensor of as many axes as it gets, but {self.path} gets "
                f"{[*hidden.shape]} and gives {[*first.shape]}: leave `branches` out."
            )
        pairs = enumerate(zip(hidden.shape, first.shape, strict=True))
        others = {axis: gives for axis, (gets, gives) in pairs if gets != gives}
        self.form = (others, len(output) if isinstance(output, tuple) else None)

    def _outline_of_identity(self, hidden: Tensor) -> dict[str, str]:
        return {}


def _is_cache(value: Any) -> bool:
    """Whether an argument is a cache of transformers, which need not be installed."""
    return any(kind.__name__ == "Cache" for kind in type(value).__mro__)


def outline_of(module: nn.Module) -> nn.Module:
    """A copy of a module on the meta device, which takes no memory for its tensors.

    Args:
        module: left as it is.
    """
    memo: dict[int, Any] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        empty = torch.empty_like(tensor, device="meta", requires_grad=False)
        memo[id(tensor)] = nn.Parameter(empty, False) if isinstance(tensor, nn.Parameter) else empty
    return duplicate(module, memo).eval()


def without_effect(outline: nn.Module, like: Tensor) -> nn.Module:
    """A module of an outline's structure whose tensors are all zeros.

    Args:
        outline: on the meta device.
        like: of the dtype and on the device that floating point tensors shall have.
    """
    made = duplicate(outline).to_empty(device=like.device)
    with torch.no_grad():
        for tensor in (*made.parameters(), *made.buffers()):
            tensor.zero_()
    return made.to(like.dtype).requires_grad_(True)


class Left(nn.Module):
    """Stands for a layer that a route leaves out, until it is taken out of the plain model."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Pass on the first argument."""
        return args[0] if args else kwargs[HIDDEN]
