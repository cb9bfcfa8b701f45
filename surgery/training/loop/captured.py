"""Captured steps: a training step recorded once as a CUDA graph and replayed.

That is for members so small that starting kernels from Python takes longer than running them.

A step is captured anew in every generation, since the alignment, its contests and their parameters change between
generations, and for each form of the batches, that is their shapes and whatever in them is no tensor. The first step of
a form is an ordinary one, which also makes the optimizer's states; the second is searched for what cannot be captured;
the third is captured. A replay runs the same kernels on the same memory, so parameters are those of ordinary steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from surgery.errors import PlanError, SurgeryError, TrainingError
from surgery.training.loop.optimizers import plain
from surgery.training.tasks.tasks import Batch
from surgery.util.randomness import Draws
from surgery.util.text import one_line

if TYPE_CHECKING:
    from surgery.training.loop.trainer import Trainer

FORMS = 8
"""Forms of batches that are captured in one generation; others are stepped as ever."""

Drawn = Mapping[str, Sequence[tuple[Batch, float]]]
"""By task, the batches of one step, each with its share of the whole batch."""
Losses = dict[str, Tensor]
"""By task."""


def refusals(trainer: Trainer) -> list[str]:
    """Why the steps of a run cannot be captured, beside what its settings already say.

    Args:
        trainer: with its device, its processes and its methods.
    """
    accelerator = trainer.accelerator
    found = []
    if accelerator.device.type != "cuda":
        found.append(f"a run on a CUDA device, found {accelerator.device.type}")
    if accelerator.num_processes > 1:
        found.append(f"one process, found {accelerator.num_processes}")
    if accelerator.scaler is not None:
        found.append("losses that are not scaled (mixed_precision no or bf16), found fp16")
    if adapting := [task.name for task in trainer.tasks if task.source is not None]:
        found.append(f"tasks that adapt to no other data, found {', '.join(adapting)}")
    found += [f"methods that do nothing in Python in every step, found {said}" for said in _acting(trainer)]
    return found


def _acting(trainer: Trainer) -> list[str]:
    return [f"{each.name} ({said})" for each in trainer.moves if (said := each.acts_in_steps()) is not None]


def captured_of(trainer: Trainer) -> CapturedSteps | None:
    """The captured steps of a run whose settings ask for them, else None.

    Raises:
        PlanError: where steps cannot be captured.
    """
    if not trainer.config.capture:
        return None
    if wrong := refusals(trainer):
        raise PlanError(f"`capture` needs {'; and '.join(wrong)}: leave it out.")
    return CapturedSteps(trainer)


@dataclass(frozen=True)
class _Captured:
    """A step as a graph, where its batches are copied to, and the losses that it leaves."""

    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    losses: Losses


class CapturedSteps:
    """The steps of a trainer, captured where their form was seen before.

    Args:
        trainer: on a CUDA device, alone, in full precision or bfloat16.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.stream = torch.cuda.Stream(trainer.accelerator.device)
        self.seen: list[list[Any]] = []
        self.captured: list[tuple[list[Any], _Captured]] = []

    def forget(self) -> None:
        """Capture anew from now on: parameters or alignment are others."""
        if self.captured:
            torch.cuda.synchronize()  # a graph that still runs must not go
        self.seen, self.captured = [], []

    def step(self, batches: Drawn) -> Losses:
        """One step of the optimizer; the losses, which stay as they are in later steps.

        Args:
            batches: of the step, anywhere.

        Raises:
            TrainingError: where a member or a loss cannot be captured.
        """
        form, tensors = _form(batches)
        known = next((each for other, each in self.captured if other == form), None)
        seen = self.seen.count(form)
        if known is None and seen > 1 and len(self.captured) < FORMS:
            known = self._capture(batches)
            self.captured.append((form, known))
        if known is None:
            if seen < 2:
                self.seen.append(form)
            checked = seen == 1  # the first step of a generation waits for what it makes once
            return self._apart(partial(self._checked if checked else self.trainer.compute, batches))
        for own, tensor in zip(known.inputs, tensors, strict=True):
            own.copy_(tensor, non_blocking=True)
        known.graph.replay()
        self.trainer.joint.filler.filled.clear()  # slots hold the weights of before the step
        return {name: loss.clone() for name, loss in known.losses.items()}

    def _apart(self, call: Callable[[], Losses]) -> Losses:
        """Run on the stream on which steps are captured, so that gradients have been summed there before."""
        now = torch.cuda.current_stream()
        self.stream.wait_stream(now)
        with torch.cuda.stream(self.stream):
            found = call()
        now.wait_stream(self.stream)
        return found

    def _checked(self, batches: Drawn) -> Losses:
        """An ordinary step that is refused where a replay would not do what it does.

        A capture that fails leaves the device's generator of random numbers unusable, so this looks for what would make
        it fail.
        """
        draws, before = Draws(devices=False), torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            losses = self.trainer.compute(batches)
        except TrainingError as error:
            if isinstance(error.__cause__, RuntimeError) and "synchroniz" in str(error.__cause__):
                raise TrainingError(_looks(error.__cause__)) from error
            raise
        except RuntimeError as error:
            if "synchroniz" in str(error):
                raise TrainingError(_looks(error)) from error
            raise
        finally:
            torch.cuda.set_sync_debug_mode(before)
        if draws.any:
            raise TrainingError(
                "`capture` needs members and losses that draw no random numbers on the CPU, but a step did, as layers "
                "do that are left out by chance in Python: leave it out."
            )
        return losses

    def _capture(self, batches: Drawn) -> _Captured:
        trainer, inputs = self.trainer, []

        def own(tensor: Tensor) -> Tensor:
            inputs.append(tensor.to(trainer.accelerator.device, copy=True))
            return inputs[-1]

        kept = {name: [(batch.map(own), share) for batch, share in each] for name, each in batches.items()}
        for group in plain(trainer.optimizer).param_groups:
            group["capturable"] = True
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # activations of ordinary steps, which the graph has its own memory for
        graph = torch.cuda.CUDAGraph()
        pool = self.captured[0][1].graph.pool() if self.captured else None
        try:
            with torch.cuda.graph(graph, pool=pool, stream=self.stream):
                losses = trainer.compute(kept)
        except (SurgeryError, RuntimeError) as error:
            raise TrainingError(_looks(error.__cause__ or error)) from error
        return _Captured(graph, inputs, losses)


def _looks(error: BaseException) -> str:
    """What is said where a step waits for the device."""
    return (
        "`capture` needs members and losses that never look at the values of tensors, but a step with these does "
        f"({one_line(error)}): leave it out."
    )


def _form(batches: Drawn) -> tuple[list[Any], list[Tensor]]:
    """What a captured step takes for granted, equal where it may be replayed, and the tensors that are copied."""
    form: list[Any] = []
    tensors: list[Tensor] = []
    for name, each in batches.items():
        for batch, share in each:
            leaves, structure = tree_flatten((batch.args, dict(batch.kwargs), batch.target))
            form += [name, share, structure]
            for leaf in leaves:
                if isinstance(leaf, Tensor):
                    tensors.append(leaf)
                    form.append((tuple(leaf.shape), leaf.dtype))
                else:
                    form.append(leaf)
    return form, tensors
