"""Adapters: layers of another width as components, each between two learned linear maps.

A layer f of a stack of width w' serves a stream y of width w as `y + out(f(into(y)) - into(y))`: what it adds to its
own stream is brought back into this one. Layers of transformers add to a stream, so what lies outside of what `into`
reads goes on untouched, and an `out` of zeros is passing on. An artifact of a member has to be whole by itself, so each
place records what builds the lender's layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field
from torch import nn

from surgery.anatomy.stacks import Run
from surgery.errors import PlanError, SurgeryError
from surgery.members.member import Origin
from surgery.members.references import build_architecture
from surgery.methods.routes.settings import Names
from surgery.settings.problems import Strict
from surgery.util.text import shorten

if TYPE_CHECKING:
    from surgery.members.member import Member

_Width = Annotated[int, Field(ge=1, le=1 << 24)]
_Text = Annotated[str, Field(max_length=1 << 20)]
_CONFIG = "config.json"

HIDDEN = "hidden_states"
"""How layers of transformers call what they take."""


class Lent(Strict):
    """What an artifact says of another member's layers of another structure.

    Attributes:
        layers: their paths in that member.
        width: of its stream.
        own: width of the stream that they serve.
        kind: of that member's origin, as `surgery.members.member.Origin` has it.
        reference: of the origin.
        architecture: of the origin.
        options: of the origin.
        config: the text of its `config.json`; empty where it has none.
    """

    layers: Names
    width: _Width
    own: _Width
    kind: _Text
    reference: _Text
    architecture: _Text
    options: dict[str, Any] = Field(default_factory=dict)
    config: _Text = ""

    def depth_of(self, number: int, depths: int) -> int:
        """Where one of the layers lies: as far into the stack that it serves as into its own.

        Args:
            number: of the layer, from 0.
            depths: of the stack that it serves.

        Example:
            >>> lent = Lent(layers=["0", "1"], width=4, own=6, kind="", reference="", architecture="")
            >>> [lent.depth_of(number, 6) for number in (0, 1)]
            [0, 3]
        """
        return number * depths // len(self.layers)

    def architecture_again(self) -> nn.Module:
        """The member that lends its layers, without weights.

        Raises:
            SurgeryError: where its configuration does not build it without code of its own.
        """
        origin = Origin(self.kind, self.reference, self.architecture, options=self.options)
        return build_architecture(origin, {_CONFIG: self.config.encode()} if self.config else {})


class Adapted(nn.Module):
    """A layer of another width as a component: `y + out(f(into(y)) - into(y))`.

    Args:
        layer: f.
        lent: of the stack that it is from.
        path: of the layer in its member.

    Example:
        >>> Adapted(nn.Linear(4, 4), lent, "layers.0")(torch.randn(2, 6)).shape  # doctest: +SKIP
        torch.Size([2, 6])
    """

    def __init__(self, layer: nn.Module, lent: Lent, path: str):
        super().__init__()
        self.path = path
        like = next((p for p in layer.parameters() if p.is_floating_point()), None)
        dtype = None if like is None else like.dtype
        self.layer = layer
        self.into = nn.Linear(lent.own, lent.width, bias=False, dtype=dtype)  # [w', w]
        self.out = nn.Linear(lent.width, lent.own, bias=False, dtype=dtype)  # [w, w']
        for each in (self.into, self.out):
            nn.init.eye_(each.weight)

    def __getattr__(self, name: str) -> Any:
        """What code reads of a layer."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_modules"]["layer"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the layer gives, in its form, with hidden states of the other width."""
        hidden = args[0] if args else kwargs[HIDDEN]
        inside = self.into(hidden)
        found = self.layer(inside, *args[1:], **kwargs) if args else self.layer(**{**kwargs, HIDDEN: inside})
        first = found[0] if isinstance(found, tuple) else found
        given = hidden + self.out(first - inside)
        return (given, *found[1:]) if isinstance(found, tuple) else given


def lent_to(
    run: Run, runs: Sequence[Run], alike: Sequence[str], members: Mapping[str, Member]
) -> dict[str, Lent]:
    """What members whose stacks are of another structure lend to one stack: the layers of their largest one.

    Args:
        run: the stack that they serve.
        runs: all stacks that are chosen.
        alike: members whose layers serve it as they are.
        members: all of them by name.

    Raises:
        PlanError: where widths cannot be told, and where nothing builds a lender's layers again.
    """
    lenders: dict[str, Run] = {}
    for other in sorted(runs, key=lambda each: each.parameters * len(each.layers)):
        if other.member not in (run.member, *alike):
            lenders[other.member] = other
    bad = [f"{each.path} of '{each.member}'" for each in (run, *lenders.values()) if each.flow.width is None]
    if lenders and bad:
        raise PlanError(
            "Adapters lie between stacks whose layers each give one tensor [..., width] of at most three axes, but of "
            f"{shorten(bad)} the graph shows none: set `adapters` to false, or choose other stacks by `select.stacks`."
        )
    return {name: _lent(run, other, members[name]) for name, other in lenders.items()}


def _lent(run: Run, other: Run, member: Member) -> Lent:
    origin = member.origin
    assert run.flow.width is not None and other.flow.width is not None
    found = Lent(
        layers=other.layers,
        width=other.flow.width,
        own=run.flow.width,
        kind=origin.kind,
        reference=origin.reference,
        architecture=origin.architecture,
        options=dict(origin.options),
        config=member.files.get(_CONFIG, b"").decode(),
    )
    try:
        found.architecture_again()
    except SurgeryError as error:
        raise PlanError(
            f"Layers of '{member.name}' can serve '{run.member}' through adapters only where a configuration of "
            f"transformers or timm builds them again: set `adapters` to false, or give such a model ({error})."
        ) from error
    return found
