"""Uses a task's own data as the example inputs of its member."""

from __future__ import annotations

from surgery.errors import PlanError
from surgery.inputs import forward_error
from surgery.members.member import Inputs, Member
from surgery.settings.recipe import Model, TaskSpec
from surgery.training.tasks.parts import Parts
from surgery.training.tasks.rehearsal import only_once
from surgery.training.tasks.sources import Read
from surgery.training.tasks.streams import seeded, seeded_others
from surgery.training.tasks.tasks import Batch, as_batch

FEW = 2  # rows of a batch that a trace needs


class TaskData:
    """The data of a recipe's tasks; each is read when it is first asked for, and kept.

    Args:
        read: reads the data of a task for a member.
        seed: of whatever the data draw at random.
    """

    def __init__(self, read: Read, seed: int):
        self.read, self.seed = read, seed
        self.found: dict[int, tuple[TaskSpec, Parts]] = {}  # by the identity of what the recipe says

    def __call__(self, spec: TaskSpec, member: Member) -> Parts:
        """The parts of a task's data."""
        if id(spec) not in self.found:
            with seeded(self.seed), seeded_others(self.seed):  # what is drawn elsewhere does not depend on it
                self.found[id(spec)] = spec, self.read(spec, member)
        return self.found[id(spec)][1]

    def inputs(self, model: Model, member: Member) -> Inputs | None:
        """The first examples that a model's first task trains on; None for those that the member has otherwise.

        A factory's own example inputs stay. Data that can be read only once are left to training.

        Raises:
            PlanError: where a factory has no example inputs, and its data no batch that can be looked at.
        """
        chosen = member.origin.kind == "factory" and (member.inputs.args or member.inputs.kwargs)
        if chosen or not model.tasks:
            return None
        data = self(model.tasks[0], member).train
        raw = None
        if not only_once(data):
            with seeded(self.seed), seeded_others(self.seed):
                raw = next(iter(data), None)
        if raw is None:
            if member.origin.kind == "factory":
                found = "can be iterated over only once" if only_once(data) else "have no batch"
                raise PlanError(
                    f"The data {model.tasks[0].data} of member '{member.name}' must show what its forward takes and "
                    f"yield batches in every epoch, but they {found}: return a list, a DataLoader or another object "
                    "that can be iterated over again."
                )
            return None
        try:
            batch = as_batch(raw)
        except PlanError as error:
            raise PlanError(f"The data {model.tasks[0].data} of member '{member.name}': {error}") from error
        return self._few(batch, member, f"first batch of {model.tasks[0].data}")

    def _few(self, batch: Batch, member: Member, source: str) -> Inputs | None:
        """A few rows of a batch where the member runs on these, or else all of it."""
        if not batch.args and not batch.kwargs:
            return None
        size = batch.size
        few = batch.map(lambda tensor: tensor[:FEW] if tensor.ndim and len(tensor) == size else tensor)
        inputs = Inputs(few.args, few.kwargs, source)
        if forward_error(member.module, inputs) is None:
            return inputs
        return Inputs(batch.args, batch.kwargs, source)
