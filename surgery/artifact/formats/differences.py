"""What a member differs by from a base, module by module: matrices taken apart, and everything else."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Difference:
    """What a linear layer differs by, taken apart.

    Attributes:
        left: `U * S` of the weights' difference `[out, k]`.
        right: `V^T` `[k, in]`.
        values: singular values, falling `[k]`.
        bias: difference of the biases; None where there is none.
    """

    left: Tensor
    right: Tensor
    values: Tensor
    bias: Tensor | None

    def rank(self, share: float) -> int:
        """The least rank that leaves out no more than a share of it."""
        energy = self.values.square()
        total = float(energy.sum())
        if not total:
            return 0
        left_out = (energy.sum() - energy.cumsum(0)).clamp_(min=0) / total
        return min(int((left_out > share**2).sum()) + 1, len(self.values))

    def pays(self, rank: int) -> bool:
        """Whether a product of a rank has fewer elements than the weight."""
        return self.elements(rank) < len(self.left) * self.right.shape[1]

    def elements(self, rank: int) -> int:
        """Elements of a product of a rank."""
        return rank * (len(self.left) + self.right.shape[1])


@dataclass(frozen=True)
class Other:
    """What differs and is no linear layer.

    Attributes:
        elements: of its tensors.
        vectors: whether all of these are vectors.
        moved: squared norms of the differences of a table's rows `[rows]`; None of anything but a table.
    """

    elements: int
    vectors: bool
    moved: Tensor | None

    def rows(self, share: float) -> list[int] | None:
        """The fewest rows without which no more than a share of the difference is left out; None for all of it."""
        if self.moved is None:
            return None
        energy, order = self.moved.sort(descending=True)
        left_out = (energy.sum() - energy.cumsum(0)).clamp_(min=0)
        count = int((left_out > share**2 * energy.sum()).sum()) + 1
        return sorted(order[:count].tolist()) if 2 * count < len(order) else None


@torch.no_grad()
def differences_of(module: nn.Module, origin: nn.Module) -> tuple[dict[str, Difference], dict[str, Other]]:
    """Linear layers that differ, taken apart, and other modules that do."""
    differences, others = {}, {}
    tables = _tables(module)
    for (name, mine), (_, theirs) in zip(module.named_modules(), origin.named_modules(), strict=True):
        own = [*mine.named_parameters(recurse=False), *mine.named_buffers(recurse=False)]
        before = dict([*theirs.named_parameters(recurse=False), *theirs.named_buffers(recurse=False)])
        changed = [part for part, tensor in own if not torch.equal(tensor, before[part])]
        if not changed:
            continue
        if is_linear(mine):
            difference = (mine.weight - before["weight"]).double()  # pyright: ignore
            difference = difference.T if is_transposed(mine) else difference
            left, values, right = torch.linalg.svd(difference, full_matrices=False)
            bias = None if "bias" not in changed else (mine.bias - before["bias"]).float()  # pyright: ignore
            differences[name] = Difference((left * values).float(), right.float(), values, bias)
        else:
            moved = None
            if name in tables:
                moved = (mine.weight - before["weight"]).double().square().sum(1)  # pyright: ignore
            tensors = [tensor for _, tensor in own]
            others[name] = Other(sum(t.numel() for t in tensors), all(t.ndim < 2 for t in tensors), moved)
    return differences, others


def _tables(module: nn.Module) -> set[str]:
    """Tables of which peft saves single rows: their weights are nobody else's, and no other module's name ends so."""
    places = [
        (name, each) for name, each in module.named_modules(remove_duplicate=False) if hasattr(each, "weight")
    ]
    users = Counter(id(each.weight) for _, each in places)
    return {
        name
        for name, each in places
        if type(each) is nn.Embedding
        and users[id(each.weight)] == 1
        and sum(other.endswith(name) for other, _ in module.named_modules()) == 1
    }


def is_linear(module: nn.Module) -> bool:
    """Whether peft has products of low rank for it."""
    return type(module) is nn.Linear or is_transposed(module)


def is_transposed(module: nn.Module) -> bool:
    """Whether it is transformers' linear layer with a weight `[in, out]`."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"
