"""Example inputs: arguments of one small forward call, for tracing; given, or made up and repaired."""

from surgery.inputs.candidates import (
    CANDIDATES,
    ROUNDS,
    as_inputs,
    example_inputs,
    floating_dtype,
    forward_error,
    inputs_for_part,
    timm_picture,
)
from surgery.inputs.given import check_runs, outlined

__all__ = [
    "CANDIDATES",
    "ROUNDS",
    "as_inputs",
    "check_runs",
    "example_inputs",
    "floating_dtype",
    "forward_error",
    "inputs_for_part",
    "outlined",
    "timm_picture",
]
