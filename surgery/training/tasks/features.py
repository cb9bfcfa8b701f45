"""Features: what reaches a part of a member, such as its head, of a fixed source and of a target that is trained."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from surgery.core.joint import JointModel
from surgery.errors import PlanError
from surgery.training.tasks.tasks import as_batch
from surgery.util.modules import device_of, kept_modes
from surgery.util.randomness import seeded


@dataclass(frozen=True)
class SourceFeatures:
    """What a task that adapts to its data without labels compares these with.

    Attributes:
        part: of source and target: features are what reaches it.
        features: `[N, F]` of the source.
        settings: of the way of adaptation, by name.
        seed: of what that draws at random.
        facts: where they come from, as JSON, for log and report.
    """

    part: str
    features: Tensor
    settings: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    facts: Mapping[str, Any] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        """As JSON, without the features."""
        return {
            "part": self.part,
            "examples": len(self.features),
            "settings": dict(self.settings),
            **self.facts,
        }


class Tap:
    """Keeps what reaches a module of a member: the features in front of a head.

    Args:
        module: the member's.
        path: of the part whose first input is kept, for example `head`.

    Raises:
        PlanError: where there is no such part.
    """

    def __init__(self, module: nn.Module, path: str):
        try:
            part = module.get_submodule(path)
        except AttributeError:
            known = ", ".join(name for name, _ in module.named_children())
            raise PlanError(
                f"Features are what reaches a module, but there is no '{path}'; there are {known}."
            ) from None
        self.path = path
        self.features: Tensor | None = None
        self._hook = part.register_forward_pre_hook(self._keep, with_kwargs=True)

    def _keep(self, part: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.features = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)).flatten(1)

    def take(self) -> Tensor:
        """The features of the last forward pass `[B, F]`, once.

        Raises:
            PlanError: where the part did not run.
        """
        found, self.features = self.features, None
        if found is None:
            raise PlanError(f"'{self.path}' did not run in the member's forward pass, so it has no features.")
        return found

    def take_like(self, source: Tensor) -> Tensor:
        """The same, in float32, as wide as a source's features.

        Args:
            source: `[N, F]`.

        Raises:
            PlanError: where they are of another width.
        """
        found = self.take().float()
        if found.shape[1] != source.shape[1]:
            raise PlanError(
                f"Features of source and target must have one width, but what reaches '{self.path}' has "
                f"{source.shape[1]} numbers for an example of the source and {found.shape[1]} for one of the target: "
                "give both inputs of one shape, or choose another part."
            )
        return found

    def close(self) -> None:
        """Keep nothing any more."""
        self.features = None
        self._hook.remove()


@torch.no_grad()
def features_of(
    joint: JointModel, member: str, data: Iterable[Any], path: str, seed: int | None = None
) -> Tensor:
    """The features `[N, F]` of a member on some data, in eval mode.

    Args:
        joint: whose member it is.
        member: its name.
        data: batches, as a task takes them.
        path: of the part that they reach.
        seed: of what the data draw from torch's global generator; without one, from where that is.

    Raises:
        PlanError: where there is no such part, or no data, or they differ in shape.
    """
    module = joint[member]
    tap, device = Tap(module, path), device_of(joint)
    found: list[Tensor] = []
    try:
        with kept_modes(module.modules()), nullcontext() if seed is None else seeded(seed):
            module.eval()
            for raw in data:
                batch = as_batch(raw).map(lambda tensor: tensor.to(device))
                module(*batch.args, **batch.kwargs)
                found.append(tap.take())
    finally:
        tap.close()
    widths = sorted({each.shape[1] for each in found})
    if len(widths) != 1:
        raise PlanError(
            f"The features of member '{member}' in front of '{path}' must have one width, found "
            f"{', '.join(map(str, widths)) or 'no data'}."
        )
    return torch.cat(found)
