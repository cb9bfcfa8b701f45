"""Members running with trial weights, and how far their outputs move."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from surgery.core.replacing import as_it_was
from surgery.disk.aside import is_aside, put_aside
from surgery.errors import PlanError
from surgery.fitting.variation import between_inputs
from surgery.inputs.probes import MADE_UP, outputs_of, tensors_at
from surgery.members.member import Inputs, Member
from surgery.slots.slots import assign, forget_derived
from surgery.util import memory
from surgery.util.alignment import align, is_aligned
from surgery.util.text import one_line

# What modules raise on inputs that they do not take.
REFUSED = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError)


class Trial:
    """One member with ordinary weights that can be exchanged and compared with the original outputs.

    Attributes:
        name: the member's.
        originals: its tensors by first owner, as they were.
        owners: all names of each tensor.
        probes: inputs on which outputs are compared.
        reference: the original's outputs on them, float64.
        calibration: inputs from which a fit learns how errors move outputs; the probes where it has no others.
        norms: L2 norms of the original's output tensors over these.
    """

    def __init__(
        self,
        member: Member,
        originals: Mapping[str, Tensor],
        owners: Mapping[str, tuple[str, ...]],
        probes: Sequence[Inputs],
        device: torch.device,
        calibration: Sequence[Inputs] = (),
    ):
        self.name, self.module, self.device = member.name, member.module, device
        self.owners = dict(owners)
        # Where it runs: what begins elsewhere would be copied before each run.
        self.originals = {name: _to_run(tensor.to(device)) for name, tensor in originals.items()}
        self.probes = [to_device(inputs, device) for inputs in probes]
        self.set_weights(self.originals)
        self.module.to(device)  # what is in no state dict
        with as_it_was(member) as original:
            original.to(device)
            self.reference = [tuple(map(put_aside, self._first_outputs(inputs))) for inputs in self.probes]
        if is_aside():
            memory.give_back()
        if not any(self.reference):
            raise PlanError(
                f"Member '{self.name}' returns no floating-point tensor on its probe inputs, so its error "
                "cannot be measured; pass other inputs, or use `max_error=0`."
            )
        for number, outputs in enumerate(self.reference, 1):
            if not all(bool(t.isfinite().all()) for t in outputs):
                made_up = self.probes[number - 1].source == MADE_UP
                where = (
                    "made-up inputs"
                    if made_up
                    else f"batch {number} of {len(self.probes)} of the inputs given"
                )
                better = "pass real ones with `calibrate`" if made_up else "leave these out"
                raise PlanError(
                    f"Member '{self.name}' returns NaN or inf on {where}; {better}, or use `max_error=0`."
                )
        self.calibration, self.norms = self._learned_from(member, calibration)

    def _learned_from(
        self, member: Member, calibration: Sequence[Inputs]
    ) -> tuple[Sequence[Inputs], tuple[float, ...]]:
        """Inputs that a fit learns from, and the L2 norms of the original's output tensors over all of them.

        Where there are none of their own, or the original gives no numbers on these, they are the probes.
        """
        inputs = [to_device(each, self.device) for each in calibration]
        with as_it_was(member):
            try:
                norms = _norms(self._outputs(each) for each in inputs) if inputs else ()
            except REFUSED as error:
                if memory.ran_out(error):
                    raise
                norms = ()
        if not norms or not all(map(math.isfinite, norms)):
            return self.probes, _norms(self.reference)
        return inputs, norms

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

    def _first_outputs(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """The original's outputs.

        Raises:
            PlanError: where it does not run on what was given.
        """
        try:
            return self._outputs(inputs)
        except REFUSED as error:
            if memory.ran_out(error):
                raise
            given = ", ".join(f"{place} {list(t.shape)} of {t.dtype}" for place, t in tensors_at(inputs))
            better = "give inputs that its forward pass takes"
            if inputs.source == MADE_UP:
                better = "these were made up, so pass real ones with `calibrate`"
            raise PlanError(
                f"Member '{self.name}' must run on its probe inputs, but on {given or 'no tensors'} it raises "
                f"{one_line(error)}; {better}."
            ) from error

    def _outputs(self, inputs: Inputs) -> tuple[Tensor, ...]:
        found = outputs_of(self.module, inputs)
        return tuple((torch.view_as_real(t) if t.is_complex() else t).double() for t in found)

    def variation(self) -> float | None:
        """How much of the original outputs differs between inputs; None where that is unknown, or inputs are alike."""
        return between_inputs(self.probes, self.reference)

    def error(self) -> float:
        """The largest relative L2 error of an output tensor, over all probes; inf where not finite."""
        count = len(self.reference[0])
        norms, changes = [0.0] * count, [0.0] * count
        for inputs, reference in zip(self.probes, self.reference, strict=True):  # outputs of one at a time
            for i, (r, m) in enumerate(zip(reference, self._outputs(inputs), strict=True)):
                norms[i] += float(r.square().sum())
                changes[i] += float((m - r).square().sum())
        if not all(math.isfinite(change) for change in changes):
            return math.inf
        found = (math.sqrt(c / n) if n else math.sqrt(c) for n, c in zip(norms, changes, strict=True))
        return max(found, default=0.0)


def _norms(outputs: Iterable[Sequence[Tensor]]) -> tuple[float, ...]:
    """L2 norms of output tensors over all calls."""
    squares: list[float] = []
    for each in outputs:
        own = [float(tensor.square().sum()) for tensor in each]
        squares = [a + b for a, b in zip(squares or [0.0] * len(own), own, strict=True)]
    return tuple(map(math.sqrt, squares))


def _to_run(tensor: Tensor) -> Tensor:
    """A tensor where its elements begin at a multiple of 64 bytes."""
    return tensor if is_aligned(tensor) else put_aside(align(tensor))


def to_device(inputs: Inputs, device: torch.device) -> Inputs:
    """Inputs with every tensor on `device`."""

    def move(value: object) -> object:
        return value.to(device) if isinstance(value, Tensor) else value

    return Inputs(tree_map(move, tuple(inputs.args)), tree_map(move, dict(inputs.kwargs)), inputs.source)
