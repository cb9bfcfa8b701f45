"""Reads the layers of a stack for fitting templates, one tensor of all of them at a time.

What templates do to a layer depends on inner products of layers alone, `[L, L]` for each tensor, so every number of
templates is tried without generating a weight; a template's own elements are made when they are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from surgery.anatomy.plan import Plan, torch_dtype
from surgery.anatomy.sites import Site
from surgery.util.dtypes import master_dtype

PIECE = 1 << 16  # elements of every layer that are multiplied at once

Key = tuple[str, str]  # member, tensor name


@dataclass(frozen=True)
class StackTensor:
    """One tensor of all L layers of a stack.

    Attributes:
        stack: whose layers these are.
        key: of its bank.
        sites: in the order of layers.
        weights: the sites' tensors.
        sensitivity: `[L]` float64, relative squared output error per squared error, of each layer's own member.
        gram: `[L, L]` float64, inner products of the tensors.
    """

    stack: str
    key: str
    sites: tuple[Site, ...]
    weights: tuple[Tensor, ...]
    sensitivity: Tensor
    gram: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the members' tensors."""
        return torch_dtype(self.sites[0].dtype)


class TemplateRow(Mapping[str, Tensor]):
    """One tensor of a template, `[1, D]`, under its storage key: made of the layers whenever it is asked for.

    Templates of every number together take many times the layers' memory.
    """

    def __init__(self, part: str, weights: Sequence[Tensor], combine: Tensor, dtype: torch.dtype):
        self.part, self.weights, self.combine, self.dtype = part, weights, combine.tolist(), dtype

    def __getitem__(self, key: str) -> Tensor:
        if key != self.part:
            raise KeyError(key)
        row = torch.zeros(self.weights[0].numel(), dtype=torch.float64, device=self.weights[0].device)
        for weight, factor in zip(self.weights, self.combine, strict=True):
            if factor:
                row.add_(weight.reshape(-1).double(), alpha=factor)
        return row.to(self.dtype).unsqueeze(0)

    def __iter__(self) -> Iterator[str]:
        return iter((self.part,))

    def __len__(self) -> int:
        return 1


def read_stack(
    plan: Plan, stack: str, originals: Mapping[Key, Tensor], sensitivity: Mapping[Key, float]
) -> list[StackTensor]:
    """The tensors of a stack's layers.

    Args:
        plan: as `plan_templates` makes it.
        stack: its name.
        originals: every member's tensors.
        sensitivity: of all tensors of the stack.
    """
    found = []
    for key in plan.stacks[stack]:
        placed = sorted(plan.in_bank(key), key=lambda p: p.start)
        names = [(p.site.member, p.site.name) for p in placed]
        weights = tuple(originals[name] for name in names)
        moved = torch.tensor([sensitivity[name] for name in names], dtype=torch.float64)
        sites, gram = tuple(p.site for p in placed), inner_products(weights)
        found.append(StackTensor(stack, key, sites, weights, moved, gram))
    return found


def inner_products(weights: Sequence[Tensor]) -> Tensor:
    """`[L, L]` float64 of L tensors of one shape, without a second copy of them."""
    flat = [weight.reshape(-1) for weight in weights]
    gram = torch.zeros(len(flat), len(flat), dtype=torch.float64, device=flat[0].device)
    for start in range(0, flat[0].numel(), PIECE):
        piece = torch.stack([each[start : start + PIECE].double() for each in flat])
        gram += piece @ piece.T
    return gram.cpu()


def total_gram(tensors: Sequence[StackTensor]) -> Tensor:
    """Inner products of whole layers, each tensor weighted by how much its error counts in the mean over layers."""
    return torch.stack([each.gram * each.sensitivity.mean() for each in tensors]).sum(0)


def layer_scales(tensors: Sequence[StackTensor]) -> Tensor:
    """How much more than in the mean an error of a layer counts, as factors of its elements of mean square 1: `[L]`."""
    energy = torch.stack([each.gram.diagonal() for each in tensors])
    own = torch.stack([each.sensitivity for each in tensors])
    usual = (own.mean(1, keepdim=True) * energy).sum(0).clamp_min(torch.finfo(torch.float64).tiny)
    power = (own * energy).sum(0) / usual
    return (power / power.mean()).clamp_min(1e-6).sqrt()


def unexplained(tensors: Sequence[StackTensor], mixtures: Tensor, combine: Tensor) -> Tensor:
    """Predicted relative squared output error of each layer, of what templates leave of it: `[L]`.

    Args:
        tensors: of the stack.
        mixtures: `[L, K]`.
        combine: `[K, L]`, templates as combinations of the layers.
    """
    rest = torch.eye(len(mixtures), dtype=torch.float64) - mixtures @ combine
    errors = [each.sensitivity * (rest @ each.gram * rest).sum(1).clamp_min(0) for each in tensors]
    return torch.stack(errors).sum(0)


def distinct_layers(tensors: Sequence[Sequence[Tensor]]) -> Tensor:
    """The number of each layer among those that differ in any tensor: `[L]`.

    Args:
        tensors: of every tensor, all L layers' own.
    """
    layers = list(zip(*tensors, strict=True))
    return numbered(len(layers), lambda one, other: all(map(torch.equal, layers[one], layers[other])))


def numbered(count: int, same: Callable[[int, int], bool]) -> Tensor:
    """The number of each of several things among those that differ, in the order of the first ones: `[count]`.

    Example:
        >>> words = ["a", "b", "a", "c"]
        >>> numbered(4, lambda one, other: words[one] == words[other]).tolist()
        [0, 1, 0, 2]
    """
    first: list[int] = []  # of each number
    found = []
    for at in range(count):
        number = next((n for n, earlier in enumerate(first) if same(at, earlier)), len(first))
        first += [at] * (number == len(first))
        found.append(number)
    return torch.tensor(found)


def row_dtype(tensor: StackTensor, hard: bool) -> torch.dtype:
    """Rows that are summed keep the master dtype; those that are taken as they are, the members'."""
    return tensor.dtype if hard else master_dtype(tensor.dtype)
