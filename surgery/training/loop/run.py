"""Runs a trainer to its end: validates, logs and saves after each generation."""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surgery.core.registry import active_methods
from surgery.core.sizes import parameters_of_dictionary, parameters_trained
from surgery.disk.records import check_free, note, read_record
from surgery.errors import PlanError, TrainingError
from surgery.settings.training import Training
from surgery.storage.stored import loosened
from surgery.training.loop.agreement import as_begun, differences, flat, terms_of
from surgery.training.loop.checkpoint import pack, raise_unfit, unpack
from surgery.training.loop.describing import adapted_of, describe_run
from surgery.training.loop.interruptions import Interrupted, stop_signals
from surgery.training.loop.keeping import Keeper
from surgery.training.loop.moves import gather
from surgery.training.loop.state import Tensors, read_document, read_state, restore, write_state
from surgery.training.loop.state_check import wrong_model
from surgery.training.loop.state_document import BestDocument
from surgery.training.loop.trainer import Trainer
from surgery.training.report.comparison import Sizes, as_scores, measure
from surgery.training.report.report import TrainReport
from surgery.training.report.runlog import NAME as LOG
from surgery.training.report.runlog import RunLog, first_validation, read_log
from surgery.training.report.trackers import tracked
from surgery.training.tasks.score import Score
from surgery.training.tasks.validation import evaluate
from surgery.util.progress import task as progress_task
from surgery.util.text import one_line

STATE, BEST = "state.safetensors", "best.safetensors"
FILES = tuple(name for each in (LOG, STATE, BEST) for name in (each, f".{each}.new"))
"""What a run writes into its folder; trackers have folders of their own in it, which stay."""


def check_folder(folder: Path, resume: bool) -> None:
    """Whether a run may begin, or go on, in a folder.

    Raises:
        PlanError: where it holds the state of a run that shall not go on.
        OutputError: where it holds files of somebody else's under the names of a run's.
    """
    if os.path.lexists(folder / STATE):
        if not resume:
            raise PlanError(
                f"{folder} holds the state of a training run: go on with it (`resume=True`), or choose "
                " another folder."
            )
        if STATE not in read_record(folder):
            read_state(folder / STATE)  # that it can be read says whose it is: older runs have no record
    else:
        check_free(folder, FILES)


def begun_with(folder: Path, config: Training) -> Training:
    """The settings with which the run in a folder goes on: its own former defaults where nothing is given.

    Args:
        folder: with the state of a run, or none.
        config: as it is asked for now.
    """
    if not os.path.lexists(folder / STATE):
        return config
    return as_begun(config, read_document(folder / STATE).get("plan", {}).get("train"))


class Run:
    """One call of `train`: the trainer, and what is kept of it."""

    def __init__(
        self, trainer: Trainer, config: Training, seed: int, folder: Path | None, began: Sizes | None = None
    ):
        self.trainer, self.config, self.seed, self.folder = trainer, config, seed, folder
        self.terms = terms_of(trainer, seed, folder)
        main = trainer.accelerator.is_main_process
        self.log = RunLog(folder if main else None)
        self.keeper = Keeper(trainer, config)
        self.first_scores: dict[str, Score] = {}
        self.began = None if began is None else {"alone": began["alone"], "start": began["joint"]}
        self.before, self.clock, self.saved = 0.0, time.monotonic(), time.monotonic()
        self._answer: Tensor | None = None

    def to_the_end(self) -> TrainReport:
        """Train until all generations are done, nothing gets better, or somebody interrupts.

        Raises:
            Interrupted: after the state was saved.
        """
        trainer, config = self.trainer, self.config
        self._begin()
        with (
            stop_signals() as asked,
            progress_task("Training", config.total * config.steps) as work,
            self._kept(),
        ):
            work.advance(trainer.generation * config.steps + trainer.step)
            trainer.joint.bodies.train()
            stopped = self._steps(work, asked)
        return self._finish(stopped)

    def _begin(self) -> None:
        """Begin the log of a run that was not begun before, and the trackers."""
        trainer, config = self.trainer, self.config
        if trainer.generation == 0 and trainer.step == 0:
            if self.log.path is not None:
                note(self.log.path.parent, *FILES)
            self.log.begin()
            self.log.write("start", **describe_run(trainer, config, self.seed), sizes=self.began)
        if config.trackers:
            trainer.accelerator.init_trackers("surgery", config=flat(config.model_dump()))

    def _steps(self, work: Any, asked: list[int]) -> str:
        """Take steps until the run ends; why it did, in words.

        Args:
            work: the progress that is shown.
            asked: signals that ask for an end, as they arrive.
        """
        trainer, patience = self.trainer, self.config.stopping.patience
        while not trainer.done:
            generation = trainer.generation
            trainer.advance()
            work.advance()
            if trainer.generation > generation:
                self._after_generation(generation, work)
                if patience is not None and self.keeper.stale >= patience:
                    return f"no better validation in {self.keeper.stale}"
            if self._agreed(bool(asked)):
                trainer.check()
                self._save()
                trainer.accelerator.wait_for_everyone()
                raise Interrupted(*asked[:1])
        return "done"

    @contextmanager
    def _kept(self) -> Iterator[None]:
        """Errors say where the last good state is."""
        try:
            yield
        except TrainingError as error:
            if self.folder is None or not os.path.lexists(self.folder / STATE):
                raise
            raise TrainingError(
                f"{error} The last good state is kept in {self.folder}: go on from it with `resume=True`; "
                "learning rates and clipping may change."
            ) from error

    def _agreed(self, asked: bool) -> bool:
        """Whether any process is asked to stop, known to all so that all save one step; of several the answer is
        that of the step before, for which none waits."""
        accelerator = self.trainer.accelerator
        if accelerator.num_processes == 1:
            return asked
        before = self._answer
        self._answer = accelerator.reduce(torch.tensor(float(asked), device=accelerator.device), "sum")
        return before is not None and bool(before.item() > 0)

    # -- after a generation --------------------------------------------------------------------------------

    def _after_generation(self, generation: int, work: Any) -> None:
        trainer, config = self.trainer, self.config
        losses = trainer.losses_so_far()
        last = generation + 1 == config.total
        if any(each.begins_anew(generation) for each in trainer.moves):
            self.keeper.begin_anew()
        scores: dict[str, Score] = {}
        if last or (generation + 1) % config.validate_every == 0:
            scores = evaluate(trainer.joint, trainer.tasks, trainer.losses, seed=self.seed)
            self.first_scores = scores | self.first_scores
            self._judge(generation, scores, losses)
        now, whole = parameters_of_dictionary(trainer.joint)
        self.log.write(
            "generation",
            generation=generation,
            phase=config.phase(generation),
            losses=losses,
            validation={name: score.document() for name, score in scores.items()},
            numbers=now,
            share=now / max(whole, 1),
            **gather(trainer.moves, "log"),
            best=self.keeper.best == generation,
            seconds=self.seconds,
        )
        if config.trackers:
            sizes = {"share": now / max(whole, 1)}
            for each in trainer.moves:
                sizes |= each.tracked()
            trainer.accelerator.log(tracked(losses, scores, **sizes), generation)
        mean = sum(trainer.weights[name] * value for name, value in losses.items())
        phase = "" if (named := config.phase(generation)) == "evolution" else f" ({named})"
        work.describe(
            f"Generation {generation + 1}/{config.total}{phase}, loss {mean:.4g}, "
            + "".join(f"{words}, " for each in trainer.moves for words in each.words())
            + f"{now / max(whole, 1):.0%} of the parameters"
        )
        if last or self._due():
            self._save()

    def _judge(self, generation: int, scores: Mapping[str, Score], losses: Mapping[str, float]) -> None:
        """Keep what is better now than it ever was, by the tasks' losses on validation data."""
        measured = {name: score.loss for name, score in scores.items() if score.loss is not None}
        found = {task.name: measured.get(task.name, losses[task.name]) for task in self.trainer.tasks}
        for name, value in found.items():
            if not math.isfinite(value):
                raise TrainingError(
                    f"The loss of task '{name}' on held-out data must be finite, found {value} after generation "
                    f"{generation + 1}: look at these data, lower the learning rate, or clip gradients "
                    "(train.optimizer.clip)."
                )
        self.keeper.judge(generation, found)

    # -- saving --------------------------------------------------------------------------------------------

    def _due(self) -> bool:
        """Whether it is time to save, by the first process's clock."""
        accelerator = self.trainer.accelerator
        due = accelerator.is_main_process and time.monotonic() - self.saved >= self.config.save_seconds
        if accelerator.num_processes == 1:
            return due
        return bool(accelerator.reduce(torch.tensor(float(due), device=accelerator.device), "sum") > 0)

    @property
    def seconds(self) -> float:
        """Seconds since the run began, those before it was resumed included."""
        return self.before + time.monotonic() - self.clock

    def _save(self) -> None:
        self.saved = time.monotonic()
        if self.folder is None:
            return
        tensors, document = pack(self.trainer)
        kept, keeper = None, self.keeper
        if keeper.unsaved and keeper.tensors is not None:
            kept = self.trainer.processes.whole(keeper.tensors)
        if self.trainer.accelerator.is_main_process:
            if kept is not None:
                write_state(self.folder / BEST, kept, {"generation": keeper.best})
            document = {**document, "keep": keeper.document(), "plan": self.terms, "seconds": self.seconds}
            write_state(self.folder / STATE, tensors, document)
        keeper.unsaved = False

    def resume(self) -> None:
        """Go on from the state in the folder; start anew where there is none."""
        if self.folder is None or not os.path.lexists(self.folder / STATE):
            return
        tensors, document = read_state(self.folder / STATE)
        if changed := differences(self.terms, document.get("plan")):
            raise TrainingError(
                f"The checkpoint in {self.folder} must be of the same members, tasks, settings and seed, but it "
                f"belongs to another plan ({changed}): run with what it was begun with, choose another folder, or "
                "delete it."
            )
        keep = document["keep"]
        kept = self._read_best(keep)
        self.log.check()
        if self.trainer.accelerator.is_main_process:
            note(self.folder, *FILES)
        unpack(self.trainer, tensors, document)
        self.keeper.take(keep, kept)
        self.before = document["seconds"]
        self.log.cut(self.trainer.generation)
        if self.log.path is not None and self.log.path.exists():
            self.first_scores = as_scores(first_validation(read_log(self.log.path)))

    def _read_best(self, keep: Mapping[str, Any]) -> Tensors | None:
        """The state that validation kept; None where none is kept.

        Raises:
            TrainingError: where it is missing, older than what the run's state says, or does not fit.
        """
        assert self.folder is not None
        path = self.folder / BEST
        if not os.path.lexists(path):
            raise_unfit([f"{BEST}, the best state so far, is missing"] if keep.get("file") else [])
            return None
        tensors, document = read_state(path, BestDocument)
        older = keep.get("file") and document["generation"] < keep["best"]
        raise_unfit(
            [f"{BEST} is of generation {document['generation']}, not {keep['best']}"] if older else []
        )
        try:
            own = self.trainer.processes.own(tensors)
        except (RuntimeError, ValueError, IndexError) as error:  # of a process that holds parts
            raise TrainingError(f"{path} cannot be cut for these processes: {one_line(error)}") from error
        raise_unfit(f"in {BEST} {wrong}" for wrong in wrong_model(self.trainer.joint, own))
        return own

    # -- the end -------------------------------------------------------------------------------------------

    def _finish(self, stopped: str) -> TrainReport:
        trainer, joint = self.trainer, self.trainer.joint
        best, keeper = trainer.generation - 1, self.keeper
        kept = keeper.kept_at(best)
        if keeper.tensors is not None and (keeper.best != best or kept):
            restore(joint, keeper.tensors)
            best = keeper.best
        joint.bodies.eval()
        joint.refresh()
        scores = evaluate(joint, trainer.tasks, trainer.losses, seed=self.seed)
        tests = evaluate(joint, trainer.tasks, trainer.losses, "test", self.seed)
        joint = trainer.joint = trainer.processes.gathered(joint)
        reached, analysis = gather(trainer.moves, "reached"), gather(trainer.moves, "analyse")
        trained = parameters_trained(joint)
        for method in active_methods(joint):
            method.ended(joint)
        sizes, modules = self._sizes()
        phases = Counter(map(self.config.phase, range(trainer.generation)))
        report = TrainReport(
            generations=trainer.generation,
            burn_in=phases["burn-in"],
            final=phases["final"],
            best=best,
            kept=kept,
            scores=scores,
            tests=tests,
            numbers=parameters_of_dictionary(joint),
            trained=trained,
            adapted={task.name: facts for task in trainer.tasks if (facts := adapted_of(task)) is not None},
            first=self.first_scores,
            sizes=sizes,
            loosened=loosened(joint),
            stopped=stopped,
            seconds=self.seconds,
            **reached,
        )
        self.log.write("end", **report.document(), **analysis, stored_modules=modules)
        for tracker in trainer.accelerator.trackers:  # `end_training` would part the processes too
            tracker.finish()
        return report

    def _sizes(self) -> tuple[Sizes, dict[str, int]]:
        """Members alone, at the start and now, and the hypermodules as they will be stored; of the first process."""
        if self.began is None:
            return {}, {}
        now, modules = measure(self.trainer.joint)
        return {**self.began, "joint": now["joint"]}, modules
