"""Explains a failed forward or backward pass in one sentence."""

from __future__ import annotations

from torch import Tensor
from torch.utils._pytree import tree_leaves

from surgery.training.tasks.tasks import Batch, Task
from surgery.util.memory import ran_out


def explain_failure(task: Task, batch: Batch, error: Exception, data: str = "data") -> str:
    """Name the task, its member and the shapes that it was given, and what can be done."""
    said = " ".join(str(error).split())[:300]
    if ran_out(error):
        return (
            f"Member '{task.member}' ran out of memory on a batch of task '{task.name}' ({_shapes(batch)}): take "
            "smaller batches and accumulate (train.accumulate), train.checkpointing=true, or "
            "train.mixed_precision=bf16."
        )
    if "DTensor" in said:
        return (
            f"Under FSDP no part of member '{task.member}' may use a layer's weights but in that layer's own forward "
            f"pass, where they are gathered, but a batch of task '{task.name}' failed with {said}: name larger layers "
            "(accelerate's `fsdp_transformer_layer_cls_to_wrap`), or none (`fsdp_auto_wrap_policy: NO_WRAP`)."
        )
    target = batch.target
    wanted = f", target {_values(target)}" if isinstance(target, Tensor) else ""
    if target is None:
        wanted = ", without a target,"
    return (
        f"Member '{task.member}' and the loss of task '{task.name}' must run on its {data}, but a batch with inputs "
        f"{_shapes(batch)}{wanted} failed with {type(error).__name__}: {said}"
    )


def name_nan(batch: Batch) -> str:
    """Which of a batch's tensors hold NaN: `inputs`, `target` or both; empty where none does."""
    parts = {"inputs": (batch.args, dict(batch.kwargs)), "target": batch.target}
    found = {
        part
        for part, values in parts.items()
        for leaf in tree_leaves(values)
        if isinstance(leaf, Tensor) and bool(leaf.isnan().any())
    }
    return " and ".join(part for part in parts if part in found)


def _values(target: Tensor) -> str:
    """Dtype and shape of targets, and the range of class numbers, which may go beyond the classes."""
    said = f"{str(target.dtype).removeprefix('torch.')} {list(target.shape)}"
    whole = target.numel() and not (target.is_floating_point() or target.is_complex() or target.is_meta)
    return f"{said} from {int(target.min())} to {int(target.max())}" if whole else said


def _shapes(batch: Batch) -> str:
    leaves = tree_leaves((batch.args, dict(batch.kwargs)))
    return (
        ", ".join(str(list(leaf.shape)) for leaf in leaves if isinstance(leaf, Tensor)) or "without tensors"
    )
