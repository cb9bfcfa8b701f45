"""What a method may look at: the members' weights, the base, and second moments of inputs on calibration data."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, nn

from benchmarks.frontier.families import Batch, Family

Made = TypeVar("Made")
SMALL = 2048  # elements below which a tensor is left to its member, in bfloat16 or 8 bits
CHUNK = 64  # examples of a forward pass


def second_moments(module: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """`E[x x^T]` of what each parameter is multiplied with, `[in, in]`; of an embedding, frequencies `[rows]`.

    Linear maps, convolutions (unfolded patches) and one-layer LSTMs are seen; other parameters are missing.

    Args:
        module: in eval mode.
        batch: calibration examples.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def add(name: str, x: Tensor) -> None:
        x = x.reshape(-1, x.shape[-1]).float()
        sums[name] = sums.get(name, 0) + x.T @ x
        counts[name] = counts.get(name, 0) + len(x)

    def watch(path: str) -> Callable[..., None]:
        def hook(
            part: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], outputs: object
        ) -> None:
            x = next(iter((*args, *kwargs.values())))
            if isinstance(part, nn.Linear):
                add(f"{path}.weight", x)
            elif isinstance(part, nn.Conv2d) and part.groups == 1:
                patches = nn.functional.unfold(
                    x,
                    part.kernel_size,
                    part.dilation,
                    part.padding,
                    part.stride,  # pyright: ignore
                )
                add(f"{path}.weight", patches.transpose(1, 2))
            elif isinstance(part, nn.Embedding):
                seen = torch.bincount(x.flatten(), minlength=part.num_embeddings).float()
                sums[f"{path}.weight"] = sums.get(f"{path}.weight", 0) + seen
                counts[f"{path}.weight"] = counts.get(f"{path}.weight", 0) + x.numel()
            elif isinstance(part, nn.LSTM) and part.num_layers == 1:
                assert isinstance(outputs, tuple)
                add(f"{path}.weight_ih_l0", x)
                add(f"{path}.weight_hh_l0", outputs[0][:, :-1])

        return hook

    kinds = (nn.Linear, nn.Conv2d, nn.Embedding, nn.LSTM)
    hooks = [
        part.register_forward_hook(watch(path), with_kwargs=True)
        for path, part in module.named_modules()
        if isinstance(part, kinds)
    ]
    try:
        with torch.no_grad():
            for piece in batch.split(CHUNK):
                piece.run(module)
    finally:
        for each in hooks:
            each.remove()
    return {name: total / counts[name] for name, total in sums.items()}


@dataclass
class _Frame:
    """What is being made: what it has used so far, and seconds in which something else was made for it."""

    used: set[object] = field(default_factory=set)
    within: float = 0.0


@dataclass
class Scene:
    """A family as methods see it.

    Attributes:
        states: by member, its weights.
        base: weights from which all were trained, or None.
        family: for methods that run it on calibration data.
    """

    states: Mapping[str, Mapping[str, Tensor]]
    base: Mapping[str, Tensor] | None
    family: Family | None = None
    _made: dict[object, object] = field(default_factory=dict)
    _own: dict[object, float] = field(default_factory=dict)  # seconds of each, without what it needed
    _needs: dict[object, set[object]] = field(default_factory=dict)
    _open: list[_Frame] = field(default_factory=list)

    @classmethod
    def of(cls, family: Family) -> Scene:
        """The scene of a family."""
        return cls(family.states, family.base, family)

    def once(self, key: object, make: Callable[[], Made]) -> Made:
        """Something that several settings need, made when it is first asked for."""
        if key not in self._made:
            self._open.append(_Frame())
            start = time.perf_counter()
            made = make()
            elapsed = time.perf_counter() - start
            frame = self._open.pop()
            self._made[key] = made
            self._own[key], self._needs[key] = elapsed - frame.within, {key, *frame.used}
            if self._open:
                self._open[-1].within += elapsed
        if self._open:
            self._open[-1].used |= self._needs[key]
        return self._made[key]  # type: ignore[return-value]

    def timed(self, make: Callable[[], Made]) -> tuple[Made, float]:
        """What a function makes, and the seconds that it would take by itself: what was made for others counts once."""
        self._open.append(_Frame())
        start = time.perf_counter()
        made = make()
        elapsed = time.perf_counter() - start
        frame = self._open.pop()
        return made, elapsed - frame.within + sum(self._own[key] for key in frame.used)

    def forget(self) -> None:
        """Drop what was made."""
        self._made.clear()

    @property
    def names(self) -> list[str]:
        """Of the members."""
        return list(self.states)

    @property
    def matrices(self) -> list[str]:
        """Tensors that methods compress."""
        first = next(iter(self.states.values()))
        return [
            name for name, t in first.items() if t.is_floating_point() and t.dim() > 1 and t.numel() >= SMALL
        ]

    @property
    def rest(self) -> list[str]:
        """All others."""
        chosen = set(self.matrices)
        return [name for name in next(iter(self.states.values())) if name not in chosen]

    def matrix(self, member: str, name: str) -> Tensor:
        """A tensor of a member as `[first axis, the rest]`."""
        return self.states[member][name].float().flatten(1)

    def centre(self, kind: str, name: str) -> Tensor:
        """The members' mean, or the base, as a matrix."""
        if kind == "base":
            assert self.base is not None
            return self.base[name].float().flatten(1)
        return self.once(
            ("mean", name), lambda: torch.stack([self.matrix(each, name) for each in self.names]).mean(0)
        )

    def moments(self, member: str | None = None) -> Mapping[str, Tensor]:
        """Second moments of a member's inputs, or their mean over all members."""

        def measure() -> Mapping[str, Tensor]:
            if self.family is None:
                return {}
            if member is not None:
                module = self.family.module(dict(self.states[member]))
                return second_moments(module, self.family.tasks[member].calibration)
            every = [self.moments(each) for each in self.names]
            return {name: torch.stack([each[name] for each in every]).mean(0) for name in every[0]}

        return self.once(("moments", member), measure)

    def cost(self, member: str | None, name: str, error: Tensor) -> Tensor:
        """`tr(E H E^T)`, of an embedding the rows' errors by frequency; plain squares where inputs are not seen."""
        return weighted(error, self.moments(member).get(name))


def weighted(error: Tensor, moment: Tensor | None) -> Tensor:
    """Mean squared output error that an error `[out, in]` of a matrix makes, for second moments or frequencies.

    Args:
        error: of the matrix.
        moment: `[in, in]`; `[out]` for an embedding, whose rows are looked up; None for white inputs of variance 1.
    """
    if moment is None:
        return error.square().sum()
    if moment.dim() == 1:
        return (error.square().sum(1) * moment).sum()
    return ((error @ moment) * error).sum()
