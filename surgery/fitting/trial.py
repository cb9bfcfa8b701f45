"""Members running with trial weights, and how far their outputs move."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from surgery.core.replacing import as_it_was
from surgery.errors import PlanError
from surgery.inputs.probes import outputs_of
from surgery.members.member import Inputs, Member
from surgery.slots.slots import assign, forget_derived


class Trial:
    """One member with ordinary weights that can be exchanged and compared with the original outputs.

    Attributes:
        name: the member's.
        originals: its tensors by first owner, as they were.
        owners: all names of each tensor.
    """

    def __init__(
        self,
        member: Member,
        originals: Mapping[str, Tensor],
        owners: Mapping[str, tuple[str, ...]],
        probes: Sequence[Inputs],
        device: torch.device,
    ):
        self.name, self.module, self.device = member.name, member.module, device
        self.owners = dict(owners)
        self.originals = {name: tensor.to(device) for name, tensor in originals.items()}
        self.probes = [to_device(inputs, device) for inputs in probes]
        self.set_weights(self.originals)
        self.module.to(device)  # what is in no state dict
        with as_it_was(member) as original:
            original.to(device)
            self.reference = [self._outputs(inputs) for inputs in self.probes]
        if not any(self.reference):
            raise PlanError(
                f"Member '{self.name}' returns no floating-point tensor on its probe inputs, so its error "
                "cannot be measured; pass other inputs, or use `max_error=0`."
            )
        if not all(bool(t.isfinite().all()) for outputs in self.reference for t in outputs):
            raise PlanError(
                f"Member '{self.name}' returns NaN or inf on its probe inputs; pass real ones with "
                "`calibrate`, or use `max_error=0`."
            )

    def set_weights(self, tensors: Mapping[str, Tensor]) -> None:
        """Give the module other weights; tensors not named stay as they are."""
        assign(self.module, dict(tensors), self.owners)
        forget_derived(self.module)

    @contextmanager
    def running_with(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside, the module has other weights; afterwards its original ones, so that the others can be let go of."""
        self.set_weights(tensors)
        try:
            yield
        finally:
            self.set_weights({name: self.originals[name] for name in tensors})

    def _outputs(self, inputs: Inputs) -> tuple[Tensor, ...]:
        found = outputs_of(self.module, inputs)
        return tuple((torch.view_as_real(t) if t.is_complex() else t).double() for t in found)

    def error(self) -> float:
        """The largest relative L2 error of an output tensor, over all probes; inf where not finite."""
        moved = [self._outputs(inputs) for inputs in self.probes]
        worst = 0.0
        for output in range(len(self.reference[0])):
            pairs = [(r[output], m[output]) for r, m in zip(self.reference, moved, strict=True)]
            norm = sum(float(r.square().sum()) for r, _ in pairs)
            change = sum(float((m - r).square().sum()) for r, m in pairs)
            if not math.isfinite(change):
                return math.inf
            worst = max(worst, math.sqrt(change / norm) if norm else math.sqrt(change))
        return worst


def to_device(inputs: Inputs, device: torch.device) -> Inputs:
    """Inputs with every tensor on `device`."""

    def move(value: object) -> object:
        return value.to(device) if isinstance(value, Tensor) else value

    return Inputs(tree_map(move, tuple(inputs.args)), tree_map(move, dict(inputs.kwargs)), inputs.source)
