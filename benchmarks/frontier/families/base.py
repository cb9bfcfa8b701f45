"""What every family is, and where trained weights are kept."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

State = dict[str, Tensor]


@dataclass(frozen=True)
class Batch:
    """Examples of one task.

    Attributes:
        args: positional inputs, each `[N, ...]`.
        kwargs: inputs by name, each `[N, ...]`.
        target: `[N, ...]`.
    """

    target: Tensor
    args: tuple[Tensor, ...] = ()
    kwargs: Mapping[str, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.target)

    def rows(self, rows: Any) -> Batch:
        """Some of the examples."""
        kwargs = None if self.kwargs is None else {name: t[rows] for name, t in self.kwargs.items()}
        return Batch(self.target[rows], tuple(t[rows] for t in self.args), kwargs)

    def to(self, device: str) -> Batch:
        """On another device."""
        kwargs = None if self.kwargs is None else {name: t.to(device) for name, t in self.kwargs.items()}
        return Batch(self.target.to(device), tuple(t.to(device) for t in self.args), kwargs)

    def split(self, size: int) -> Iterator[Batch]:
        """In pieces of at most so many examples."""
        for start in range(0, len(self), size):
            yield self.rows(slice(start, start + size))

    def run(self, module: nn.Module) -> Tensor:
        """The outputs of a module for these examples."""
        return module(*self.args, **(self.kwargs or {}))


@dataclass(frozen=True)
class Task:
    """What a member is for.

    Attributes:
        calibration: training examples, the only ones that a method may look at.
        validation: examples by which a method's settings are chosen.
        test: examples that are measured once.
        score: of outputs `[N, ...]` and targets, more is better; None where there is nothing to compare with.
    """

    calibration: Batch
    validation: Batch
    test: Batch
    score: Callable[[Tensor, Tensor], float] | None


@dataclass(frozen=True)
class Choice:
    """Which family of a kind.

    Attributes:
        seed: of everything drawn at random.
        fast: tiny models, barely trained, on made-up data.
        members: how many at most.
        longer: times the epochs of every fine-tune.
        only: names of members, of those that there are; all by default.
        device: that members are trained on.
    """

    seed: int = 0
    fast: bool = False
    members: int | None = None
    longer: int = 1
    only: tuple[str, ...] | None = None
    device: str = "cpu"

    def of(self, names: Iterable[str]) -> list[str]:
        """Which members of all there are, in their order."""
        first = list(names)[: self.members]
        return first if self.only is None else [name for name in first if name in self.only]

    @property
    def trained_on(self) -> dict[str, str]:
        """What a model's recipe says of the device; nothing of the CPU."""
        return {} if self.device == "cpu" else {"device": self.device}


@dataclass(frozen=True)
class Family:
    """Models of one architecture.

    Attributes:
        name: of the family.
        build: makes the architecture, whose weights are then replaced.
        states: by member, its weights.
        base: weights from which all were trained; None where there are none.
        tasks: by member.
        measure: name of the score.
        sites: what surgery takes for linear maps, where its own choice leaves out too much.
        seconds: how long training took; 0 where it came from the cache.
    """

    name: str
    build: Callable[[], nn.Module]
    states: Mapping[str, State]
    base: State | None
    tasks: Mapping[str, Task]
    measure: str
    sites: tuple[str, ...] | None = None
    seconds: float = 0.0

    def module(self, state: Mapping[str, Tensor]) -> nn.Module:
        """The architecture with some weights, in eval mode."""
        module = self.build().eval()
        module.load_state_dict(state)
        return module.requires_grad_(False)

    @property
    def whole(self) -> int:
        """Bytes of all members' weights as they are."""
        return sum(t.numel() * t.element_size() for state in self.states.values() for t in state.values())


def default_cache() -> Path:
    """`$XDG_CACHE_HOME/model-surgery/frontier`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "model-surgery" / "frontier"


class Cache:
    """Trained weights in a folder, a file for each model.

    A model's recipe is part of its file's name, so weights of another recipe, another seed or another version of torch
    are never taken for it.

    Args:
        folder: of all families.
        name: of this one.
    """

    def __init__(self, folder: Path, name: str):
        self.folder, self.seconds = folder / name, 0.0

    def path(self, name: str, recipe: Mapping[str, Any]) -> Path:
        """Where a model's weights are.

        Args:
            name: of the model.
            recipe: all that its training depends on, as JSON can hold it.
        """
        text = json.dumps({**recipe, "torch": torch.__version__}, sort_keys=True)
        return self.folder / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.safetensors"

    def get(self, name: str, recipe: Mapping[str, Any], train: Callable[[], State]) -> State:
        """A model's weights: from its file, or trained and written."""
        path = self.path(name, recipe)
        if not path.is_file():
            start = time.perf_counter()
            state = {key: t.detach().contiguous().clone() for key, t in train().items()}
            self.seconds += time.perf_counter() - start
            self.folder.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(f".{os.getpid()}")
            save_file(state, part)
            part.replace(path)
        return load_file(path)


def generator_of(seed: int, *names: str) -> torch.Generator:
    """A generator for one purpose, so that what one purpose draws does not move another's."""
    digest = hashlib.sha256("/".join((str(seed), *names)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def accuracy(outputs: Tensor, target: Tensor) -> float:
    """The share of examples whose class has the largest output."""
    return float((outputs.argmax(1) == target).double().mean())
