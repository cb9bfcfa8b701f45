"""How much of a member's outputs differs between inputs, beside their size.

Errors are relative to the size of outputs, of which what all inputs have in common is a part. Where that is nearly all,
as of a sigmoid near one of its ends, an error that looks small can be as large as everything that outputs tell.
"""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from surgery.errors import SurgeryWarning, shorten
from surgery.inputs.probes import tensors_at
from surgery.members.member import Inputs
from surgery.util.wording import percent

CONSTANT = 1e-6  # of its size: what float32 computes of two inputs differs by more
# Of what differs: such an error may leave a correlation of 0.8 with the original over inputs, and less. Trained models
# are far from that at the default bound of 0.05: of EfficientNet-Lite0's logits 0.33 differs, of MiniLM's outputs 0.56.
DROWNED = 0.6
COMMON = 0.25  # from here on what differs is no small part of an output: an error that drowns it looks large
LOUD = 0.5  # an error that nobody takes for a small one
TENTH = 0.1  # of what differs: an error that leaves it clear


def variation(outputs: Sequence[Sequence[Tensor]]) -> float | None:
    """The part of an output that differs between inputs, relative to its L2 norm, of the tensor that differs least.

    Args:
        outputs: by call, its output tensors; the first axis of each has an entry for each input.

    Returns:
        at most about 1; 0 where nothing differs, while tensors that are constant beside others that are not, such as
        positions, are left out. None where no two outputs can be compared.

    Example:
        >>> import torch
        >>> round(variation([(torch.tensor([[0.9], [1.1]]),)]), 3)
        0.141
    """
    found = [each for each in map(_variation, zip(*outputs, strict=True)) if each is not None]
    return min((each for each in found if each > CONSTANT), default=0.0 if found else None)


def between_inputs(probes: Sequence[Inputs], outputs: Sequence[Sequence[Tensor]]) -> float | None:
    """`variation` of a member's outputs on probe inputs; None where these do not differ, and so tell nothing.

    Args:
        probes: arguments of calls; some are made up after inputs of one value.
        outputs: by call, its output tensors.
    """
    inputs = [tuple(t for _, t in tensors_at(each) if t.dim()) for each in probes]
    return variation(outputs) if variation(inputs) else None


def _variation(batches: Sequence[Tensor]) -> float | None:
    """Of one output tensor: standard deviation over inputs, relative to the root mean square."""
    alike: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
    for batch in batches:
        rows = torch.view_as_real(batch) if batch.is_complex() else batch
        rows = (rows if rows.dim() else rows[None]).double()
        alike[tuple(rows.shape[1:])].append(rows)
    differing, whole = 0.0, 0.0
    for several in alike.values():
        count = sum(map(len, several))
        if count > 1:
            mean = sum(each.sum(0) for each in several) / count
            differing += sum(float((each - mean).square().sum()) for each in several) * count / (count - 1)
            whole += sum(float(each.square().sum()) for each in several)
    return math.sqrt(differing / whole) if whole else None


def faint(errors: Mapping[str, float], variations: Mapping[str, float]) -> dict[str, float]:
    """Members whose error looks small but may be most of what their outputs tell, with how much these differ.

    Args:
        errors: by member, relative L2 error of its outputs.
        variations: by member, as `variation` returns them.

    Example:
        >>> faint({"logits": 0.04, "sigmoid": 0.04}, {"logits": 0.6, "sigmoid": 0.05})
        {'sigmoid': 0.05}
    """
    return {
        name: found
        for name, found in variations.items()
        if found < COMMON and 0 < errors.get(name, math.nan) < LOUD and errors[name] >= DROWNED * found
    }


def faint_words(errors: Mapping[str, float], variations: Mapping[str, float]) -> str:
    """What is said of members whose outputs hardly differ between inputs; empty where there are none.

    Example:
        >>> faint_words({"sigmoid": 0.04}, {"sigmoid": 0.05}).partition(":")[0]
        'Outputs of sigmoid (by 5.00% of their size, moved by 4.00%) hardly differ between inputs'
    """
    if not (found := faint(errors, variations)):
        return ""
    named = (
        f"{name} (by {percent(found[name], 2)} of their size, moved by {percent(errors[name], 2)})"
        for name in sorted(found, key=lambda each: found[each])
    )
    least = TENTH * min(found.values())
    smaller = f"Ask for a smaller error (`max_error`), such as {least:.1g}. " if least > CONSTANT else ""
    return (
        f"Outputs of {shorten(named)} hardly differ between inputs: most of what they tell may be lost within that "
        f"error. {smaller}Where these are probabilities, let the model return logits or log-odds."
    )


def warn_of_faint(errors: Mapping[str, float], variations: Mapping[str, float]) -> None:
    """Warn of members whose error looks small but may be most of what their outputs tell."""
    if words := faint_words(errors, variations):
        warnings.warn(words, SurgeryWarning, stacklevel=3)
