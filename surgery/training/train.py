"""Train: the joint loop, from members and tasks to a trained joint model."""

from __future__ import annotations

import atexit
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from surgery.anatomy.plan import Plan
from surgery.anatomy.selectors import share_selectors
from surgery.core.joint import JointModel
from surgery.core.registry import recorded_plan
from surgery.disk.claims import claim_of_first
from surgery.members.extra_state import extra_state_of, to_document
from surgery.settings.training import Training
from surgery.training.checking import check_run
from surgery.training.distributed.fsdp import (
    Sharding,
    check_banks,
    check_launch,
    check_losses,
    check_members,
    read_sharding,
    wants_checkpointing,
)
from surgery.training.distributed.synced import synced_norms
from surgery.training.loop.run import Run, begun_with, check_folder
from surgery.training.loop.sharing_private import share_private
from surgery.training.loop.starting import freeze, keep_private, start
from surgery.training.loop.trainer import Trainer
from surgery.training.report.comparison import measure
from surgery.training.report.report import TrainReport
from surgery.training.tasks.parts import First
from surgery.training.tasks.rehearsal import rehearse
from surgery.training.tasks.task_losses import made_losses
from surgery.training.tasks.tasks import Loss, Task

if TYPE_CHECKING:
    from accelerate import Accelerator


def train(
    joint: JointModel,
    tasks: Sequence[Task],
    config: Training | Mapping[str, Any] | None = None,
    *,
    settings: Mapping[str, Any] | None = None,
    folder: str | Path | None = None,
    resume: bool = False,
    seed: int = 0,
    cpu: bool = False,
) -> TrainReport:
    """Train all members on their tasks while the alignment of their blocks to hypermodules evolves.

    Runs as it is on one device, and under `accelerate launch` in as many processes as that starts. With `--use_fsdp
    --fsdp_version 2` each of these holds its share of the dictionary and of the members; at the end every process has
    the joint model whole again, on the CPU. After an exception it has not: go on from the state in `folder`.

    Args:
        joint: as `join` made it, or loaded; it is trained in place and left on a hard alignment.
        tasks: at least one.
        config: of the run, as a recipe has it under `train`.
        settings: of the plan's method, as a recipe has them under `settings`, in place of those that it was planned
            with.
        folder: for the log and the state; without one nothing can be resumed.
        resume: whether to go on from the state in `folder`, where there is one.
        seed: of all that is drawn at random.
        cpu: whether to stay on the CPU where there is an accelerator.

    Returns:
        What was reached.

    Raises:
        PlanError: for settings and tasks that do not fit the joint model, all in one error, and for ways of splitting
            it that training cannot take.
        OutputError: for extra state that the run's state cannot hold.
        TrainingError: where training cannot go on; the last good state stays in `folder`.
        Interrupted: on Ctrl-C, after the state was saved.

    Example:
        >>> import surgery, torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> joint = surgery.join([surgery.load_member(net, name="net", inputs=torch.randn(2, 4))], block=(8, 8))
        >>> data = [(torch.randn(8, 4), torch.randint(2, (8,))) for _ in range(4)]
        >>> tasks = [surgery.Task("classes", "net", data)]
        >>> report = surgery.train(joint, tasks, {"burn_in": 0, "generations": 2, "final": 1, "steps": 3})
        >>> report.generations
        3
    """
    training, plan = check_run(joint, tasks, config, settings, folder, seed)
    for name in joint.names:
        to_document(extra_state_of(joint[name]), name)  # it belongs to the run's state
    place = None if folder is None else Path(folder).expanduser()
    with claim_of_first(place):
        return _train(joint, plan, tasks, training, place, resume, seed, cpu)


def _train(
    joint: JointModel,
    plan: Plan,
    tasks: Sequence[Task],
    settings: Training,
    place: Path | None,
    resume: bool,
    seed: int,
    cpu: bool,
) -> TrainReport:
    """`train`, with its folder held by this process."""
    from accelerate.utils import set_seed

    accelerator = _launch(settings, place, cpu)
    if place is not None and accelerator.is_main_process:
        check_folder(place, resume)
    if place is not None and resume:
        settings = begun_with(place, settings)
    sharding = read_sharding(accelerator, settings)
    set_seed(seed)
    if sharding is None:
        joint.to(accelerator.device)
    else:
        check_members(joint, sharding)
        check_losses(tasks)
        joint.to("cpu")  # a device has no room for all of it
    place_original = None if sharding is None else partial(sharding.apply, "original")
    # Distillation is from the members as they were given.
    with made_losses(joint, tasks, place_original) as losses:
        # Under FSDP an original that is distilled is elsewhere than the members are until they are cut.
        rehearse(joint, tasks, losses if sharding is None else {}, seed)
        joint.plan = plan
        _open(joint, settings, seed, sharded=sharding is not None)
        began = measure(joint)[0] if accelerator.is_main_process else None
        with synced_norms(joint, accelerator, settings.sync_norms), _quiet():
            _prepare_members(joint, settings)
            make = _trainer if sharding is None else partial(_sharded_trainer, sharding)
            run = Run(make(joint, tasks, settings, seed, accelerator, losses), settings, seed, place, began)
            if resume:
                run.resume()
            report = run.to_the_end()
    joint.forget_originals()  # what was distilled
    joint.keep_known(replace(joint.known, training=report))
    # What was made is in the banks: a later fit makes what it is asked for.
    joint.plan = replace(joint.plan, banks=tuple(recorded_plan(bank) for bank in joint.plan.banks))
    return report


def _launch(settings: Training, place: Path | None, cpu: bool) -> Accelerator:
    """Join the processes that were launched, or be the only one."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    check_launch()
    joined = torch.distributed.is_available() and torch.distributed.is_initialized()
    # An earlier run in this process may have had another mixed precision, or stayed on the CPU.
    AcceleratorState._reset_state(reset_partial_state=not joined)
    accelerator = Accelerator(
        cpu=cpu or _launched_without_accelerator(),
        mixed_precision=None if settings.mixed_precision == "no" else settings.mixed_precision,  # None: as launched
        log_with=list(settings.trackers) or None,
        project_dir=None if place is None else str(place),
    )  # fmt: skip
    if accelerator.num_processes > 1 and not joined:
        atexit.register(_part)
    return accelerator


def _open(joint: JointModel, settings: Training, seed: int, *, sharded: bool) -> None:
    """Open the dictionary for training; what is private is shared, frozen or kept as the settings say."""
    start(joint, settings, seed)
    if sharded:
        check_banks(joint)
    names = {name: list(joint.private(name)) for name in joint.names}
    share_private(joint, share_selectors(settings.share, names, "train.share"))
    freeze(joint, share_selectors(settings.freeze, names, "train.freeze"))
    keep_private(joint, settings.keep)


def fast(config: Training, tasks: Sequence[Task], batches: int = 2) -> tuple[Training, list[Task]]:
    """A run of seconds that goes through every phase: few steps, and the first batches of every task's data."""
    short = config.model_copy(
        update={
            "steps": 2,
            "burn_in": min(config.burn_in, 1),
            "generations": 2,
            "final": min(config.final, 1),
        }
    )
    few = [
        replace(
            task,
            data=First(task.data, batches),
            validation=None if task.validation is None else First(task.validation, batches),
            test=None if task.test is None else First(task.test, batches),
        )
        for task in tasks
    ]
    return short, few


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, cuDNN does not warn that it copies recurrent weights in each pass: they are others in each."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "RNN module weights are not part of single contiguous chunk")
        yield


def _part() -> None:
    """Leave the other processes: threads of a group that is still joined can abort a process as it ends."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _launched_without_accelerator() -> bool:
    """Whether several processes were started where there is no accelerator: accelerate would not join them unasked."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch.accelerator.is_available()


def _trainer(joint: JointModel, *arguments: Any) -> Trainer:
    """One of processes that each hold everything; arguments are those of `Trainer`."""
    trainer = Trainer(joint, *arguments)
    trainer.optimizer = trainer.accelerator.prepare(trainer.optimizer)
    return trainer


def _sharded_trainer(
    sharding: Sharding,
    joint: JointModel,
    tasks: Sequence[Task],
    settings: Training,
    seed: int,
    accelerator: Any,
    losses: Mapping[str, Loss],
) -> Trainer:
    """One of processes that each hold a part of the joint model."""
    from surgery.training.distributed.sharded import ShardedModel
    from surgery.training.distributed.sharded_processes import ShardedProcesses, check_alike

    check_alike(joint)
    model = ShardedModel(joint, sharding)
    return Trainer(model, tasks, settings, seed, accelerator, losses, ShardedProcesses(accelerator, model))


def _prepare_members(joint: JointModel, settings: Training) -> None:
    for name in joint.names:
        module = joint[name]
        if settings.checkpointing or wants_checkpointing():
            names = ("gradient_checkpointing_enable", "set_grad_checkpointing")  # transformers' and timm's
            enable = next((getattr(module, name) for name in names if hasattr(module, name)), None)
            if enable is not None:
                enable()
        if settings.compile:
            module.compile()
