"""What a failed forward or backward pass means for the user, in one sentence."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from surgery.training.tasks.tasks import Batch, Task

_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


def explain_failure(task: Task, batch: Batch, error: Exception, data: str = "data") -> str:
    """Name the task, its member and the shapes that it was given, and what can be done."""
    said = " ".join(str(error).split())[:300]
    if isinstance(error, torch.OutOfMemoryError) or any(word in said for word in _MEMORY):
        return (
            f"Member '{task.member}' ran out of memory on a batch of task '{task.name}' ({_shapes(batch)}): take "
            "smaller batches and accumulate (train.accumulate), train.checkpointing=true, or "
            "train.precision=bf16."
        )
    if "DTensor" in said:
        return (
            f"Under FSDP no part of member '{task.member}' may use a layer's weights but in that layer's own forward "
            f"pass, where they are gathered, but a batch of task '{task.name}' failed with {said}: name larger layers "
            "(accelerate's `fsdp_transformer_layer_cls_to_wrap`), or none (`fsdp_auto_wrap_policy: NO_WRAP`)."
        )
    target = batch.target
    wanted = f", target {list(target.shape)}" if isinstance(target, Tensor) else ""
    if target is None:
        wanted = ", without a target,"
    return (
        f"Member '{task.member}' and the loss of task '{task.name}' must run on its {data}, but a batch with inputs "
        f"{_shapes(batch)}{wanted} failed with {type(error).__name__}: {said}"
    )


def _shapes(batch: Batch) -> str:
    leaves = tree_leaves((batch.args, dict(batch.kwargs)))
    return (
        ", ".join(str(list(leaf.shape)) for leaf in leaves if isinstance(leaf, Tensor)) or "without tensors"
    )
