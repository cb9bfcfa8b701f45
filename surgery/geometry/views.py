"""The canonical view: any weight tensor of a linear map as a stack of matrices `[S, out, in]`, and back.

A view is written as an einops pattern from the tensor's own axes to `(stack) out in`, for example
`"(g o) i h w -> (g h w) o i"` for a grouped 2-D convolution: every group and every kernel position is its own
matrix (MUiR, section 3.1). The pattern is the whole truth about a view: it is printed by `surgery inspect`,
stored in an artifact, and read backwards to undo the view exactly.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from einops import rearrange
from torch import Tensor

from surgery.disk.untrusted import shown

_LONGEST = 400  # characters of a pattern: the longest layer has some ten axes
_SIDE = re.compile(
    r"(?:1|[a-z]\w*|\((?: ?[a-z]\w*)* ?\))(?: (?:1|[a-z]\w*|\((?: ?[a-z]\w*)* ?\)))*", re.ASCII
)


@dataclass(frozen=True)
class CanonicalView:
    """How one tensor becomes `[S, out, in]`.

    Attributes:
        pattern: an einops pattern whose right side has exactly three axes, stack, out and in; an absent stack
            is written `1`.
        sizes: the length of every named axis, sorted by name, so that the pattern can be inverted.

    Example:
        >>> import torch
        >>> view = CanonicalView.of("(g o) i k -> (g k) o i", (6, 2, 5), g=3)
        >>> matrices = view.to_matrices(torch.randn(6, 2, 5))
        >>> matrices.shape, view.to_tensor(matrices).shape
        (torch.Size([15, 2, 2]), torch.Size([6, 2, 5]))
    """

    pattern: str
    sizes: tuple[tuple[str, int], ...]

    @classmethod
    def of(cls, pattern: str, shape: tuple[int, ...], **known: int) -> CanonicalView:
        """Bind `pattern` to a tensor `shape`; `known` gives the axes that the shape alone does not determine.

        Raises:
            ValueError: where the pattern does not fit the shape.
        """
        left = axes_of(pattern.split("->")[0])
        if len(left) != len(shape):
            raise ValueError(
                f"pattern '{pattern}' has {len(left)} axes, the tensor's shape is {tuple(shape)}"
            )
        sizes = dict(known)
        for names, length in zip(left, shape, strict=True):
            unknown = [name for name in names if name not in sizes]
            rest = math.prod(sizes[name] for name in names if name in sizes)
            if len(unknown) > 1 or (rest and length % rest) or (not unknown and rest != length):
                raise ValueError(f"pattern '{pattern}' with {known} does not fit the shape {tuple(shape)}")
            if unknown:
                sizes[unknown[0]] = length // rest
        return cls(pattern, tuple(sorted(sizes.items())))

    @classmethod
    def bind(cls, pattern: str, shape: tuple[int, ...], known: Mapping[str, int]) -> CanonicalView:
        """`of`, for a pattern that somebody else may have written.

        Raises:
            ValueError: where it is no pattern to a stack of matrices, or does not fit the shape.
        """
        sides = pattern.split("->")
        if (
            len(pattern) > _LONGEST
            or len(sides) != 2
            or not all(_SIDE.fullmatch(side.strip()) for side in sides)
        ):
            raise ValueError(f"{shown(pattern)} is no pattern")
        left, right = (axes_of(side) for side in sides)
        names, used = ([name for axis in side for name in axis] for side in (left, right))
        if (
            len(right) != 3
            or sorted(names) != sorted(used)
            or len({*names}) < len(names)
            or {*known} - {*names}
        ):
            raise ValueError(
                f"{shown(pattern)} with {shown(dict(known))} is no pattern to a stack of matrices"
            )
        return cls.of(pattern, shape, **known)

    def to_matrices(self, tensor: Tensor) -> Tensor:
        """`tensor` as `[S, out, in]`, same dtype."""
        return rearrange(tensor, self.pattern, **dict(self.sizes))

    def to_tensor(self, matrices: Tensor) -> Tensor:
        """The exact inverse of `to_matrices`."""
        left, right = self.pattern.split("->")
        return rearrange(matrices, f"{right} -> {left}", **dict(self.sizes))

    @property
    def flat(self) -> bool:
        """Whether this is the tensor in one row, its elements in the order in which they lie."""
        left, right = self.pattern.split(" -> ")
        return right == f"1 1 ({left})"

    @property
    def in_order(self) -> bool:
        """Whether the elements of the matrices lie as those of the tensor: nothing is moved.

        Example:
            >>> CanonicalView.of("o c k -> 1 o (c k)", (4, 3, 2)).in_order
            True
            >>> CanonicalView.of("o c k -> k o c", (4, 3, 2)).in_order
            False
        """
        left, right = (each.replace("(", "").replace(")", "").split() for each in self.pattern.split("->"))
        return [axis for axis in right if axis != "1"] == [axis for axis in left if axis != "1"]

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(S, out, in)`."""
        sizes = dict(self.sizes)
        stack, out, into = (
            math.prod(sizes[n] for n in names) for names in axes_of(self.pattern.split("->")[1])
        )
        return stack, out, into


def axes_of(side: str) -> list[tuple[str, ...]]:
    """The axes of one side of a pattern, each as the names that make it up (none for `1`)."""
    axes: list[tuple[str, ...]] = []
    group: list[str] | None = None
    for word in side.replace("(", " ( ").replace(")", " ) ").split():
        if word == "(":
            group = []
        elif word == ")":
            axes.append(tuple(group or ()))
            group = None
        elif group is not None:
            group.append(word)
        else:
            axes.append(() if word == "1" else (word,))
    return axes
