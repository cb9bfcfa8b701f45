"""Derivatives in float32 where the CPU computes with a narrower dtype in software alone.

A backward pass in bfloat16 takes half of float32's time where the CPU has instructions for it, and 3 (AVX-512) to 80
times as long (AVX2) where it has none. Capabilities decide which one, not a clock: what a fit decides must not
depend on how busy a machine is. Derivatives are estimates; outputs are measured in the members' own dtypes everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from surgery.disk.aside import put_aside
from surgery.fitting.trial import Trial
from surgery.inputs.probes import outputs_of
from surgery.members.member import Inputs

NARROW = (torch.bfloat16, torch.float16)


def native(dtype: torch.dtype) -> bool:
    """Whether this machine's CPU has instructions for a dtype; where nothing tells, it is taken to have them.

    Example:
        >>> native(torch.float32)
        True
    """
    if dtype not in NARROW:
        return True
    name = "bf16" if dtype == torch.bfloat16 else "fp16"
    try:
        able = bool(getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported")())
    except (AttributeError, RuntimeError):  # a PyTorch without oneDNN
        return True
    # With AVX-512 alone oneDNN has kernels for bfloat16 that compute in float32.
    alone = dtype == torch.bfloat16 and torch.backends.cpu.get_cpu_capability() == "AVX512"
    instructions = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return able and (not alone or instructions is None or bool(instructions()))


@contextmanager
def in_float32(trial: Trial) -> Iterator[Sequence[Inputs]]:
    """Inside, a member has float32 weights where its own dtype is not native to the CPU that it runs on.

    One that does not run so, since it names its dtype, keeps its own weights.

    Args:
        trial: with its original weights, which it has again afterwards.

    Yields:
        the inputs that the trial learns from, in float32 too.
    """
    narrow = {
        name: tensor
        for name, tensor in trial.originals.items()
        if trial.device.type == "cpu" and not native(tensor.dtype)
    }
    if not narrow:
        yield trial.calibration
        return
    probes = [_widened(inputs) for inputs in trial.calibration]
    with trial.running_with({name: put_aside(tensor.float()) for name, tensor in narrow.items()}):
        runs = _runs(trial, probes[:1])
        if runs:
            yield probes
    if not runs:
        yield trial.calibration


def _runs(trial: Trial, probes: Sequence[Inputs]) -> bool:
    try:
        for inputs in probes:
            outputs_of(trial.module, inputs)
    except (RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return False
    return True


def _widened(inputs: Inputs) -> Inputs:
    def wide(value: object) -> object:
        return value.float() if isinstance(value, Tensor) and value.dtype in NARROW else value

    return replace(
        inputs, args=tree_map(wide, tuple(inputs.args)), kwargs=tree_map(wide, dict(inputs.kwargs))
    )
