"""What a fit learns from: given inputs, made-up ones that errors are not measured on, or both where few are given."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

from torch import Tensor

from surgery.errors import SurgeryWarning, shorten
from surgery.fitting.pieces import batch_of
from surgery.inputs.probes import calibration_inputs
from surgery.members.member import Inputs, Member

# Weights of a member, at most, that a fit learns about from made-up inputs and from halves of given ones.
LARGEST = 1 << 27
FILLED = 32  # given examples; where there are fewer, made-up ones make up the number
ENOUGH = 64  # of which errors are not much less than of others


def inputs_to_learn_from(
    member: Member, originals: Mapping[str, Tensor], seed: int, given: Sequence[Inputs] = ()
) -> Sequence[Inputs]:
    """Inputs besides those on which errors are measured; none where a fit learns from these alone.

    Args:
        member: loaded.
        originals: its tensors.
        seed: of made-up inputs.
        given: by the user, on which errors are measured, too.

    Returns:
        batches, the given ones among them.
    """
    missing = FILLED - examples_of(given)
    if missing <= 0 or sum(each.numel() for each in originals.values()) > LARGEST:
        return ()
    if not given:
        return calibration_inputs(member, seed=seed)
    return [*given, *calibration_inputs(member, seed=seed, count=-(-missing // examples_of([member.inputs])))]


def examples_of(batches: Sequence[Inputs]) -> int:
    """How many examples there are; a batch whose tensors have no first axis in common is one."""
    return sum(batch_of(each) or 1 for each in batches)


def warn_of_few(given: Mapping[str, Sequence[Inputs]]) -> None:
    """Warn of members whose errors are measured on so few given inputs that others may move outputs much further.

    Args:
        given: by member.
    """
    few = {name: count for name, batches in given.items() if 0 < (count := examples_of(batches)) < ENOUGH}
    if few:
        counts = shorten([f"{name} ({count})" for name, count in few.items()])
        warnings.warn(
            f"Few inputs to calibrate on were given for {counts}: a fit learns from them, so on others outputs may "
            f"move several times as far as is printed. Give {ENOUGH} or more.",
            SurgeryWarning,
            stacklevel=3,
        )
