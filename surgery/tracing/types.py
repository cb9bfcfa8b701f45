"""Trace: the graph of one forward pass and every use of every parameter in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import fx

from surgery.geometry.views import CanonicalView


@dataclass(frozen=True)
class Use:
    """One use of one parameter.

    Attributes:
        parameter: state-dict key; the first owner of a tied tensor.
        op: plain name of the operation, or of the module type where no forward pass reached the parameter.
        role: `map`, `private` or `unclear`.
        kind: layer kind, for example `conv2d` or `norm`.
        module: path of the module in whose forward the operation ran.
        order: place among all uses.
        view: parameter <-> `[S, out, in]`, where the use is a linear map.
        first: whether the graph shows this to be a map of the network's inputs, with no other map before it.
        last: whether the graph shows no other map after it.
        groups: of a convolution.
        reached: whether the forward pass reached this use; otherwise it comes from the table of module types.
        reason: why there is no view.
        through: names of the operations that lead from the parameter to the weight used, for example
            `("neg", "exp")` or `("var_mean", "sub", "mul")`; empty where it is used as it is.
    """

    parameter: str
    op: str
    role: str
    kind: str
    module: str
    order: int
    view: CanonicalView | None = None
    first: bool = False
    last: bool = False
    groups: int = 1
    reached: bool = True
    reason: str = ""
    through: tuple[str, ...] = ()


@dataclass(frozen=True)
class Trace:
    """What one forward pass shows of a module.

    Attributes:
        graph: placeholders for inputs, `get_attr` for parameters and buffers, `call_function` for operations,
            whose `meta` holds `module` and `tensor` (shape and strides); `None` for the table of module
            types.
        uses: of all parameters, in execution order; those that were not reached come last.
        tier: which way of tracing served.
        inputs: where the example inputs came from.
        notes: what the reader should know, for example why a tier was passed over.
        parts: graphs of submodules that were traced by themselves, by their path.
    """

    graph: fx.Graph | None
    uses: tuple[Use, ...]
    tier: str
    inputs: str
    notes: tuple[str, ...] = ()
    parts: Mapping[str, fx.Graph] = field(default_factory=dict)

    @property
    def ordered(self) -> bool:
        """Whether the uses are in execution order."""
        return self.graph is not None
