"""The synthetic multitask benchmark: 30 small linear regressions in three groups, whose groups must be found.

The tasks of a group have one direction in common and differ by a factor (Kang, Grauman and Sha, *Learning with
Whom to Share in Multi-task Feature Learning*, ICML 2011). Each has 15 examples with 20 inputs, so alone it cannot
be learned, and together it can: a group's direction has 150 examples. The data are generated here to the figures of
that benchmark; the original file is read where a path is given. All tasks live in one member, whose weight
`[tasks, 1, inputs]` gives one block of 1 x inputs for each task.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from surgery.errors import LoadError
from surgery.training.tasks.sources import Parts
from surgery.training.tasks.streams import Batches

GROUPS = 3
TRAIN, TEST = 15, 50  # examples of a task
NOISE = 0.32
NORMS = (0.2, 8.2)  # least and largest length of a task's weights
SPREAD = 2.3 / 0.6745  # of the normal distribution whose absolute values have median 2.3
KEYS = ("train_X", "train_Y", "noisy_train_Y", "test_X", "test_Y", "noisy_test_Y")


class Regressions(nn.Module):
    """Independent linear regressions, side by side.

    Args:
        tasks: how many.
        inputs: of each.
    """

    def __init__(self, tasks: int = 30, inputs: int = 20):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(tasks, 1, inputs) / inputs**0.5)

    def forward(self, examples: Tensor) -> Tensor:
        """`[B, tasks, inputs]` -> `[B, tasks]`."""
        return torch.matmul(examples.transpose(0, 1), self.weight.mT).squeeze(2).t()


def regressions(tasks: int = 30, inputs: int = 20) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A `Regressions` and two blank examples of each task."""
    return Regressions(tasks, inputs), (torch.zeros(2, tasks, inputs),)


def grouped(tasks: int = 30, inputs: int = 20) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Like `regressions`, the tasks of a group with one weight, so that `join` lets them share from the start."""
    module, examples = regressions(tasks, inputs)
    with torch.no_grad():
        first = torch.arange(tasks) // (tasks // GROUPS) * (tasks // GROUPS)
        module.get_parameter("weight").copy_(module.get_parameter("weight")[first])
    return module, examples


@dataclass(frozen=True)
class Problem:
    """Examples of all tasks.

    Attributes:
        train: inputs `[15, tasks, inputs]` and targets `[15, tasks]`.
        test: the same of 50 others.
        group: `[tasks]`, which group each task belongs to.
    """

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    group: Tensor


def generate(noisy: bool, seed: int, tasks: int = 30, inputs: int = 20) -> Problem:
    """Draw a problem: inputs uniform in [-1, 1], a random direction for each group, positive factors.

    Args:
        noisy: whether targets have noise of deviation 0.32; a few tasks are weaker than it.
        seed: of all that is drawn.
        tasks: how many, the groups one after another.
        inputs: of each task.
    """
    generator = torch.Generator().manual_seed(seed)
    group = torch.arange(tasks) * GROUPS // tasks
    direction = torch.randn(GROUPS, inputs, generator=generator)
    direction = direction / direction.norm(dim=1, keepdim=True)
    # The inverse distribution function, so that every norm lies in its bounds without a second draw.
    low, high = torch.erf(torch.tensor(NORMS) / SPREAD / 2**0.5)
    norm = torch.erfinv(low + (high - low) * torch.rand(tasks, generator=generator)) * SPREAD * 2**0.5
    weights = norm.unsqueeze(1) * direction[group]
    parts = []
    for count in (TRAIN, TEST):
        examples = torch.rand(count, tasks, inputs, generator=generator) * 2 - 1
        target = torch.einsum("bti,ti->bt", examples, weights)
        noise = NOISE * torch.randn(target.shape, generator=generator)
        parts.append((examples, target + noise if noisy else target))
    return Problem(parts[0], parts[1], group)


def read(path: str | Path, noisy: bool) -> Problem:
    """Read the file of the original benchmark, `.npz` with `train_X [tasks, examples, inputs]` and so on.

    Raises:
        LoadError: where it is not there, or not that file.
    """
    import numpy as np

    try:
        with np.load(Path(path).expanduser(), allow_pickle=False) as arrays:
            found = {key: torch.from_numpy(arrays[key]).float() for key in KEYS}
    except (OSError, ValueError, KeyError) as error:
        raise LoadError(f"{path} must be an .npz file with {', '.join(KEYS)}, but: {error}.") from None
    kind = "noisy_" if noisy else ""
    train = found["train_X"].transpose(0, 1).contiguous(), found[f"{kind}train_Y"].t().contiguous()
    test = found["test_X"].transpose(0, 1).contiguous(), found[f"{kind}test_Y"].t().contiguous()
    tasks = train[1].shape[1]
    return Problem(train, test, torch.arange(tasks) * GROUPS // tasks)


def problem(noisy: bool = True, file: str | None = None, seed: int = 0) -> Problem:
    """The problem in a file, or one drawn by the seed."""
    return generate(noisy, seed) if file is None else read(file, noisy)


def data(
    noisy: bool = True, file: str | None = None, validation: int = 0, seed: int = 0, batch: int = 10
) -> Parts:
    """The problem as a task's data.

    Args:
        noisy: whether targets have noise.
        file: the original benchmark's file; without it, a problem is drawn by the seed.
        validation: how many of the 15 examples training does not see, drawn by the seed for each task.
        seed: of the problem, of the split and of the order.
        batch: examples of each task in a batch.
    """
    return split(problem(noisy, file, seed), validation, seed, batch)


def split(found: Problem, validation: int, seed: int, batch: int) -> Parts:
    """A problem in batches, `validation` examples of each task held back."""
    examples, target = found.train
    count, tasks = target.shape
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(count, tasks, generator=generator).argsort(0)
    examples = examples.gather(0, order.unsqueeze(2).expand_as(examples))
    target = target.gather(0, order)
    kept = count - validation
    held = Batches(examples[kept:], target[kept:], max(validation, 1), shuffle=False) if validation else None
    return Parts(
        Batches(examples[:kept], target[:kept], batch, seed=seed),
        held,
        Batches(*found.test, batch=len(found.test[1]), shuffle=False),
    )
