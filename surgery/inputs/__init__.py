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

__all__ = [
    "CANDIDATES",
    "ROUNDS",
    "as_inputs",
    "example_inputs",
    "floating_dtype",
    "forward_error",
    "inputs_for_part",
    "timm_picture",
]
