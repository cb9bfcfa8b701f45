"""Second moments of the inputs of every site, and the price of errors in its weight.

A site multiplies its inputs x with a weight. An error E in the weight moves what comes out by E x, so the squared
output error over all inputs is tr(E H E^T), H = sum of x x^T: exact for any error, where estimates that take entries
for independent hold for rounding alone.

The sites of a member are watched during ordinary forward passes by a `TorchFunctionMode`, which sees the operations
that use their weights whatever module they are called in. A convolution is the linear map of its unfolded patches; the
weights of a recurrent network see its inputs and its states, one layer after the other. Maps whose inputs are the same
tensor, such as queries, keys and values, are multiplied once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from surgery.anatomy.sites import Site
from surgery.disk.aside import put_aside
from surgery.fitting.shrinkage import best_share, looked_at, shrunk
from surgery.geometry.views import CanonicalView, axes_of
from surgery.slots.slots import locate
from surgery.storage.codecs import Statistics

KERNEL = ("d", "h", "w")  # axes of a stack over which a convolution sums
KEPT = 4  # products of the last inputs that are kept for maps of the same inputs


@dataclass(frozen=True)
class Moments:
    """Second moments of the inputs of one site.

    Attributes:
        view: of the weight as matrices `[G, out, n]`, one for each independent linear map; of a convolution n counts
            channels and kernel positions.
        total: sum of x x^T `[G, n, n]`, or `[1, n, n]` where all maps have the same inputs; float32.
        count: number of inputs x.
        half: of every other batch, the rows and columns of its sum by which shrinkage is chosen `[G or 1, k, k]`; None
            where there was one batch alone.
    """

    view: CanonicalView
    total: Tensor
    count: int
    half: Tensor | None = None

    def price(self, error: Tensor) -> float:
        """tr(E H E^T) of an error in the weight, in its own shape: the squared error of all outputs seen."""
        matrices = self.view.to_matrices(error).float()
        return float(((matrices @ self.total) * matrices).sum(dtype=torch.float64))

    @property
    def statistics(self) -> Statistics | None:
        """What codecs make use of: where rows of the weight, flattened, are rows of its one matrix, else None.

        The moment is shrunk as far as one half of the batches tells of the other (`surgery.fitting.shrinkage`).
        """
        left, _, right = self.view.pattern.partition(" -> ")
        flat = [name for axis in axes_of(left) for name in axis]
        same = flat == [name for axis in axes_of(right) for name in axis] and len(self.total) == 1
        if not same or not self.count:
            return None
        total = self.total[0]
        share = 0.0 if self.half is None else best_share(self.half[0], looked_at(total) - self.half[0])
        return Statistics(put_aside(shrunk(total, share) / self.count), self.count)


def average(moments: Sequence[Moments]) -> Moments:
    """Moments of a weight that several members share: each member's mean counts the same.

    Raises:
        ValueError: where the weights have not one view.
    """
    if len({each.view for each in moments}) != 1:
        raise ValueError(f"moments must be of one view, found {sorted({m.view.pattern for m in moments})}")
    count = sum(each.count for each in moments)
    mean = sum(each.total / max(each.count, 1) for each in moments) / len(moments)
    assert isinstance(mean, Tensor)
    return Moments(moments[0].view, mean * count, count)


def unfolded(site: Site) -> CanonicalView:
    """The view of a site's weight as `[G, out, n]`: kernel positions of a convolution belong to n.

    Example:
        >>> unfolded(site)  # of a grouped convolution
        CanonicalView(pattern='(g o) i h w -> g o (i h w)', ...)
    """
    left, right = (axes_of(side) for side in site.view.pattern.split(" -> "))
    stack, out, into = right
    kernel = tuple(name for name in stack if name in KERNEL) if site.kind.startswith("conv") else ()
    sides = [tuple(name for name in stack if name not in kernel), out, (*into, *kernel)]
    pattern = " -> ".join(" ".join(map(_axis, side)) for side in (left, sides))
    return CanonicalView(pattern, site.view.sizes)


def _axis(names: Sequence[str]) -> str:
    return "1" if not names else names[0] if len(names) == 1 else f"({' '.join(names)})"


def gather(
    module: nn.Module, sites: Iterable[Site], batches: Iterable[tuple[Sequence[Any], Mapping[str, Any]]]
) -> dict[str, Moments]:
    """Moments of the inputs of sites, by name, from one forward pass for each batch.

    A site that is used in a way that is not followed here (through another operation, in a mixture of experts, in a
    packed sequence) or not at all is absent.

    Args:
        module: in eval mode, with its ordinary weights; left as it was.
        sites: of this module. Each takes `[n, n]` elements: give some at a time where memory is short.
        batches: positional and named arguments of a call.
    """
    watch = Watch(module, sites)
    for _ in watched(module, watch, batches):
        watch.recent.clear()
        watch.batch += 1
    return watch.moments()


def watched(
    module: nn.Module, watch: TorchFunctionMode, batches: Iterable[tuple[Sequence[Any], Mapping[str, Any]]]
) -> Iterator[None]:
    """Call a module with each batch while a mode sees what it computes; what it draws is the same each time.

    Args:
        module: in eval mode, with its ordinary weights; left as it was.
        watch: the mode.
        batches: positional and named arguments of a call.
    """
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for args, kwargs in batches:
            torch.manual_seed(0)
            with watch:
                module(*args, **kwargs)
            yield


def names_by_storage(module: nn.Module, names: Iterable[str]) -> dict[int, str]:
    """Names of weights of a module by the address of their storage, which views of them share."""
    return {getattr(*locate(module, name)).untyped_storage().data_ptr(): name for name in names}


class Watch(TorchFunctionMode):
    """While it is the active mode, adds up second moments of what sites are multiplied with."""

    def __init__(self, module: nn.Module, sites: Iterable[Site]) -> None:
        super().__init__()
        self.views = {site.name: unfolded(site) for site in sites}
        self.weights = {name: getattr(*locate(module, name)) for name in self.views}
        self.names = names_by_storage(module, self.views)
        self.total: dict[str, Tensor] = {}
        self.count: dict[str, int] = {}
        self.half: dict[str, Tensor] = {}
        self.batch = 0
        self.lost: set[str] = set()
        self.recent: deque[tuple[Tensor, int, Tensor]] = deque(maxlen=KEPT)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _READERS:
            for weight, inputs in _READERS[name](self, func, args, kwargs):
                self.add(weight, inputs)
        return func(*args, **kwargs)

    def name_of(self, weight: Any) -> str | None:
        """The site that a tensor is a weight of, or a view of one."""
        if not isinstance(weight, Tensor):
            return None
        return self.names.get(weight.untyped_storage().data_ptr())

    def add(self, weight: Tensor, inputs: Tensor) -> None:
        """Count inputs `[G or 1, N, n]` of a weight."""
        name = self.name_of(weight)
        assert name is not None
        groups, _, width = self.views[name].shape
        if inputs.shape[-1] != width or inputs.shape[0] not in (1, groups):
            self.lost.add(name)
            return
        part = weight.numel() / self.weights[name].numel()  # a slice sees its inputs alone
        product = self._product(inputs)
        self.count.setdefault(name, 0)
        self._add(self.total, name, product, part)
        if self.batch % 2:
            self._add(self.half, name, looked_at(product), part)
        self.count[name] += round(inputs.shape[1] * part)

    def _add(self, sums: dict[str, Tensor], name: str, product: Tensor, part: float) -> None:
        if name not in sums:
            sums[name] = put_aside(torch.zeros_like(product))
        if sums[name].shape[0] < product.shape[0]:
            sums[name] = sums[name].expand_as(product).clone()
        sums[name].add_(product, alpha=part)

    def _product(self, inputs: Tensor) -> Tensor:
        for seen, version, product in self.recent:
            if (
                seen.data_ptr() == inputs.data_ptr()
                and seen.shape == inputs.shape
                and version == inputs._version
            ):
                return product
        x = inputs.float()
        product = x.transpose(1, 2) @ x
        self.recent.append((inputs, inputs._version, product))
        return product

    def moments(self) -> dict[str, Moments]:
        """The moments of all sites whose inputs were seen and are finite, by name."""
        return {
            name: Moments(self.views[name], total, self.count[name], self.half.get(name))
            for name, total in self.total.items()
            if name not in self.lost and bool(total.isfinite().all())
        }


Read = Iterator[tuple[Tensor, Tensor]]
"""Weights with their inputs `[G or 1, N, n]`."""


def _linear(watch: Watch, func: Any, args: Any, kwargs: Any) -> Read:
    x, weight = _get(args, kwargs, 0, "input"), _get(args, kwargs, 1, "weight")
    if watch.name_of(weight):
        yield weight, x.reshape(1, -1, x.shape[-1])


def _product(left: int, names: tuple[str, str]) -> Callable[..., Read]:
    def read(watch: Watch, func: Any, args: Any, kwargs: Any) -> Read:
        a, b = _get(args, kwargs, left, names[0]), _get(args, kwargs, left + 1, names[1])
        for weight, x in ((b, a), (a, b.mT if isinstance(b, Tensor) and b.ndim > 1 else b)):
            if watch.name_of(weight) and isinstance(x, Tensor):
                stacked = weight.ndim > 2 and x.ndim == weight.ndim
                yield weight, x.flatten(0, -3) if stacked else x.reshape(1, -1, x.shape[-1])

    return read


def _swapped(watch: Watch, func: Any, args: Any, kwargs: Any) -> Read:
    yield from _product(0, ("other", "input"))(watch, func, (args[1], args[0]), {})


def _conv(rank: int) -> Callable[..., Read]:
    def read(watch: Watch, func: Any, args: Any, kwargs: Any) -> Read:
        x, weight = _get(args, kwargs, 0, "input"), _get(args, kwargs, 1, "weight")
        if not watch.name_of(weight):
            return
        stride, padding, dilation = (
            _get(args, kwargs, place, name, default)
            for place, name, default in ((3, "stride", 1), (4, "padding", 0), (5, "dilation", 1))
        )
        groups = _get(args, kwargs, 6, "groups", 1)
        x = x if x.ndim == rank + 2 else x.unsqueeze(0)
        for (
            one
        ) in x:  # patches of one example at a time: they are many times as large as what they are cut from
            yield weight, patches(one, weight.shape[2:], stride, padding, dilation, groups)

    return read


def patches(
    x: Tensor, kernel: Sequence[int], stride: Any, padding: Any, dilation: Any, groups: int = 1
) -> Tensor:
    """What a convolution multiplies its weight with: `[G, N, n]`, n of channels times kernel positions.

    Args:
        x: `[channels, ...]`, one example.
        kernel: lengths of the kernel's axes.
        stride: of every axis, or one for all; as in `torch.nn.functional.conv2d`.
        padding: likewise, or `same` or `valid`.
        dilation: likewise.
        groups: G.

    Example:
        >>> patches(torch.arange(4.0).view(1, 4), (2,), stride=1, padding=0, dilation=1)
        tensor([[[0., 1.],
                 [1., 2.],
                 [2., 3.]]])
    """
    rank = len(kernel)
    stride, dilation = _each(stride, rank), _each(dilation, rank)
    if padding == "same":
        spans = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        pads = [(span // 2, span - span // 2) for span in spans]
    else:
        pads = [(p, p) for p in _each(0 if padding == "valid" else padding, rank)]
    x = F.pad(x, [p for pair in reversed(pads) for p in pair])
    steps, counts = x.stride()[1:], x.shape[1:]
    places = [
        (n - d * (k - 1) - 1) // s + 1 for n, k, s, d in zip(counts, kernel, stride, dilation, strict=True)
    ]
    windows = x.as_strided(
        (len(x), *kernel, *places),
        (
            x.stride(0),
            *(step * d for step, d in zip(steps, dilation, strict=True)),
            *(step * s for step, s in zip(steps, stride, strict=True)),
        ),
        x.storage_offset(),
    )
    return windows.reshape(groups, -1, _count(places)).transpose(1, 2)


def _count(lengths: Iterable[int]) -> int:
    found = 1
    for each in lengths:
        found *= each
    return found


def _each(value: Any, rank: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * rank if len(values) == 1 else values


def _einsum(watch: Watch, func: Any, args: Any, kwargs: Any) -> Read:
    equation, *operands = args
    operands = list(operands[0]) if len(operands) == 1 and isinstance(operands[0], list | tuple) else operands
    if len(operands) != 2 or "." in equation:
        return
    left, _, output = equation.replace(" ", "").partition("->")
    labels = left.split(",")
    for own in (0, 1):
        weight, x, mine, other = operands[own], operands[1 - own], labels[own], labels[1 - own]
        if not watch.name_of(weight):
            continue
        into = [label for label in mine if label in other and label not in output]
        stack = [label for label in mine if label in other and label in output]
        rest = [label for label in other if label not in mine]
        pattern = f"{' '.join(other)} -> ({' '.join(stack)}) ({' '.join(rest)}) ({' '.join(into)})"
        yield weight, rearrange(x, pattern)


def _recurrent(watch: Watch, func: Any, args: Any, kwargs: Any) -> Read:
    """Every layer and direction by itself: what it reads, and the states that it goes through."""
    if not isinstance(args[3], bool):  # a packed sequence
        return
    x, state, weights, biases, layers, _, _, both, first = args
    if not any(watch.name_of(weight) for weight in weights):
        return
    states, directions = state if isinstance(state, tuple) else (state,), 2 if both else 1
    each = len(weights) // (layers * directions)
    x = x.transpose(0, 1) if first else x  # [time, batch, n]
    for layer in range(layers):
        outputs = []
        for direction in range(directions):
            number = layer * directions + direction
            own = weights[number * each : number * each + each]
            begin = [s[number : number + 1] for s in states]
            read = x.flip(0) if direction else x
            out = func(
                read, tuple(begin) if len(begin) > 1 else begin[0], own, biases, 1, 0.0, False, False, False
            )[0]
            before = torch.cat([begin[0], out[:-1]])  # with a projection, states are what it makes
            for weight, inputs in ((own[0], read), (own[1], before)):
                if watch.name_of(weight):
                    yield weight, inputs.reshape(1, -1, inputs.shape[-1])
            watch.lost |= {name for w in own[2:] if w.ndim > 1 and (name := watch.name_of(w))}
            outputs.append(out.flip(0) if direction else out)
        x = torch.cat(outputs, -1)


def _cell(watch: Watch, func: Any, args: Any, kwargs: Any) -> Read:
    state = args[1][0] if isinstance(args[1], tuple | list) else args[1]
    for weight, inputs in ((args[2], args[0]), (args[3], state)):
        if watch.name_of(weight):
            yield weight, inputs.reshape(1, -1, inputs.shape[-1])


def _attention(watch: Watch, func: Any, args: Any, kwargs: Any) -> Read:
    """Projections of queries, keys and values, each of which sees its own; then the output's."""
    read, joint, out = args[:3], args[5], args[11]
    if watch.name_of(joint):
        alike = read[0] is read[1] and read[1] is read[2]
        for part, x in [(joint, read[0])] if alike else zip(joint.chunk(3), read, strict=True):
            yield part, x.reshape(1, -1, x.shape[-1])
    for name, x in zip(("q_proj_weight", "k_proj_weight", "v_proj_weight"), read, strict=True):
        if watch.name_of(kwargs.get(name)):
            yield kwargs[name], x.reshape(1, -1, x.shape[-1])
    if watch.name_of(out):  # with an identity in its place, what it would have read comes out
        plain = (*args[:11], torch.eye(len(out), dtype=out.dtype, device=out.device), None, *args[13:])
        mixed = func(*plain, **kwargs)[0]
        yield out, mixed.reshape(1, -1, mixed.shape[-1])


def _get(args: Any, kwargs: Any, place: int, name: str, default: Any = None) -> Any:
    return args[place] if place < len(args) else kwargs.get(name, default)


_READERS: dict[str, Callable[..., Read]] = {
    "linear": _linear,
    **dict.fromkeys(("matmul", "__matmul__", "mm", "bmm", "mv"), _product(0, ("input", "mat2"))),
    **dict.fromkeys(("addmm", "addmv"), _product(1, ("mat1", "mat2"))),
    **dict.fromkeys(("baddbmm",), _product(1, ("batch1", "batch2"))),
    "__rmatmul__": _swapped,
    "einsum": _einsum,
    "multi_head_attention_forward": _attention,
    **{f"conv{rank}d": _conv(rank) for rank in (1, 2, 3)},
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), _recurrent),
    **dict.fromkeys(("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"), _cell),
}
