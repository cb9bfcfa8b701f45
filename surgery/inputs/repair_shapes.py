"""Repairs of shapes: sentences that name a number of channels, a width, a length or a size."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from surgery.inputs.complaint import Complaint
from surgery.inputs.sample import Sample, find, number

Arguments = dict[str, Any]
Rule = Callable[[nn.Module, Arguments, Complaint, Sample], Iterable[Arguments]]


def _channels(
    module: nn.Module, arguments: Arguments, said: Complaint, sample: Sample
) -> Iterator[Arguments]:
    """`expected input[2, 2, 16000] to have 1 channels, but got 2 channels instead`."""
    found = re.search(r"expected input\[([\d, ]+)\] to have (\d+) channels", said.said)
    if not found:
        return
    shape, wanted = _numbers(found[1]), int(found[2])
    for name, value in _floats(arguments):
        if list(value.shape) == shape or value.numel() == math.prod(shape):
            if len(shape) == value.ndim:
                yield {**arguments, name: sample.normal(*value.shape[:1], wanted, *value.shape[2:])}
            else:
                yield {**arguments, name: sample.normal(value.shape[0], wanted, *shape[2:])}
        elif value.ndim == 2 and len(shape) == 3 and len(value) == shape[1]:  # a batch taken for channels
            yield {**arguments, name: sample.normal(len(value), wanted, value.shape[1])}
        elif value.ndim == 3 and len(shape) == 3 and value.shape[:2] == tuple(shape[:2]):
            yield {**arguments, name: sample.normal(len(value), wanted, 16000)}


def _product(module: nn.Module, arguments: Arguments, said: Complaint, sample: Sample) -> Iterator[Arguments]:
    """`mat1 and mat2 shapes cannot be multiplied (256x80 and 320x64)`: an input has another width."""
    found = re.search(r"shapes cannot be multiplied \((\d+)x(\d+) and (\d+)x(\d+)\)", said.said)
    if found:
        yield from _resized(arguments, -1, int(found[2]), int(found[3]), sample)


def _norm(module: nn.Module, arguments: Arguments, said: Complaint, sample: Sample) -> Iterator[Arguments]:
    """`normalized_shape=[64], expected input with shape [*, 64], but got input of size[2, 16, 48]`."""
    found = re.search(
        r"expected input with shape \[\*, (\d+)\],? but got input of size ?\[([\d, ]+)\]", said.said
    )
    if found:
        yield from _resized(arguments, -1, _numbers(found[2])[-1], int(found[1]), sample)


def _broadcast(
    module: nn.Module, arguments: Arguments, said: Complaint, sample: Sample
) -> Iterator[Arguments]:
    """`The size of tensor a (80) must match the size of tensor b (560) at non-singleton dimension 2`."""
    found = re.search(r"tensor a \((\d+)\) must match .* tensor b \((\d+)\) at .*dimension (\d)", said.said)
    if found:
        yield from _resized(arguments, int(found[3]), int(found[1]), int(found[2]), sample)


def _joined(module: nn.Module, arguments: Arguments, said: Complaint, sample: Sample) -> Iterator[Arguments]:
    """`Sizes of tensors must match except in dimension 1. Expected size 80 but got size 50`."""
    found = re.search(r"except in dimension \d\. Expected size (\d+) but got size (\d+)", said.said)
    if found:
        one, other = int(found[1]), int(found[2])
        for axis in (1, 2):
            yield from _resized(arguments, axis, one, other, sample)
            yield from _resized(arguments, axis, other, one, sample)


def _patches(module: nn.Module, arguments: Arguments, said: Complaint, sample: Sample) -> Iterator[Arguments]:
    """`shape '[-1, 3, 2, 14, 14]' is invalid for input of size 7168`: rows of one patch each."""
    found = re.search(r"shape '\[-1, ([\d, ]+)\]' is invalid for input of size (\d+)", said.said)
    if not found:
        return
    width, size = math.prod(_numbers(found[1])), int(found[2])
    for name, value in _floats(arguments):
        if value.numel() == size or value.ndim == 2:
            yield {**arguments, name: sample.normal(len(value) if value.ndim == 2 else 16, width)}


def _pairs(module: nn.Module, arguments: Arguments, said: Complaint, sample: Sample) -> Iterator[Arguments]:
    """`Input must be a 5D tensor of shape (batch_size, 2, num_channels, height, width)`."""
    if not re.search(r"5D tensor of shape \(batch_size, 2,", said.said):
        return
    for name, value in _floats(arguments):
        if value.ndim == 4:
            height, width = (max(side, 64) for side in value.shape[2:])
            yield {**arguments, name: sample.normal(1, 2, value.shape[1], height, width)}


def _axes(module: nn.Module, arguments: Arguments, said: Complaint, sample: Sample) -> Iterator[Arguments]:
    """`not enough values to unpack (expected 5, got 4)`: a batch of clips; or the other way round."""
    found = re.search(r"values to unpack \(expected (\d)(?:, got (\d))?\)", said.said)
    wanted = int(found[1]) if found else 0
    # Pictures of one example, taken one by one.
    several = found is not None and wanted == 4 and found[2] == "3"
    found = re.search(r"Dimension out of range \(expected .* \[-(\d), \d\], but got (\d)\)", said.said)
    wanted = int(found[2]) + 1 if found else wanted
    for name, value in _floats(arguments):
        if value.ndim == 4 and wanted == 5:
            frames = find(sample.config, "num_frames frames_per_clip", 2)
            yield {**arguments, name: sample.normal(value.shape[0], int(frames), *value.shape[1:])}
        if (value.ndim == wanted - 1 and wanted in (3, 4)) or (value.ndim == 4 and several):
            yield {**arguments, name: value[:, None]}
        if value.ndim == 3 and wanted == 2:
            yield {**arguments, name: value[..., 0] if value.shape[-1] == 1 else value[:, 0]}
        if value.ndim == 5 and wanted == 4:
            yield {**arguments, name: value[:, 0]}


def _rows_of_pictures(
    module: nn.Module, arguments: Arguments, said: Complaint, sample: Sample
) -> Iterator[Arguments]:
    """`Expected 3D (unbatched) or 4D (batched) input to conv2d, but got input of size: [16, 588]`."""
    if not re.search(r"input to conv2d, but got input of size: \[\d+, \d+\]", said.said):
        return
    patch = number(sample.config, "patch_size", 16, "vision")
    for name, value in _floats(arguments):
        if value.ndim == 2 and value.shape[1] % patch**2 == 0:
            yield {**arguments, name: value.view(len(value), -1, patch, patch)}


def _view(module: nn.Module, arguments: Arguments, said: Complaint, sample: Sample) -> Iterator[Arguments]:
    """`shape '[2, 3, 1, 16, 1, 16]' is invalid for input of size 4704`: sides that patches or windows do not fill.

    Or `shape '[2, 1, 3, 48]' is invalid for input of size 144`: half of it, so one example at a time.
    """
    found = re.search(r"shape '\[([-\d, ]+)\]' is invalid for input of size (\d+)", said.said)
    if not found:
        return
    patch = number(sample.config, "patch_size", 16, "vision")
    for name, value in _floats(arguments):
        for unit in (patch, 2 * patch, 4 * patch):
            sides = [-(-side // unit) * unit for side in value.shape[-2:]]
            if value.ndim >= 4 and unit > 1 and max(sides) <= 2048:
                yield {**arguments, name: sample.normal(*value.shape[:-2], *sides)}
    shape = _numbers(found[1])
    if shape[0] > 1 and math.prod(shape) == shape[0] * int(found[2]):
        yield first_examples(arguments)


def first_examples(arguments: Arguments) -> Arguments:
    """The first of all examples alone; numbers and what is no tensor stay."""
    return {k: v[:1] if isinstance(v, Tensor) and v.ndim else v for k, v in arguments.items()}


def _mono(module: nn.Module, arguments: Arguments, said: Complaint, sample: Sample) -> Iterator[Arguments]:
    """`Audio must be mono, but got 16000`: one channel, not none."""
    for name, value in _floats(arguments):
        if "mono" in said.said and value.ndim == 2:
            yield {**arguments, name: value[:, None]}


def _multiple(
    module: nn.Module, arguments: Arguments, said: Complaint, sample: Sample
) -> Iterator[Arguments]:
    """`length 16000 is not a multiple of 1920`."""
    found = re.search(r"(\d+).{0,40}multiple of.{0,30}?(\d+)", said.said)
    after = re.search(r"multiple of.{0,30}\((\d+)\),? but got (\d+)", said.said)
    if after:
        had, unit = int(after[2]), int(after[1])
    elif found:
        had, unit = int(found[1]), int(found[2])
    else:
        return
    for axis in range(-1, -4, -1):
        yield from _resized(arguments, axis, had, max(unit, had // max(unit, 1) * unit), sample)


def _length(module: nn.Module, arguments: Arguments, said: Complaint, sample: Sample) -> Iterator[Arguments]:
    """`expects the mel input features to be of length 3000, but found 60`."""
    found = re.search(r"of length (\d+),? but (?:found|got) (\d+)", said.said)
    if found:
        for axis in (2, 1, 3):
            yield from _resized(arguments, axis, int(found[2]), int(found[1]), sample)


def _size(module: nn.Module, arguments: Arguments, said: Complaint, sample: Sample) -> Iterator[Arguments]:
    """`Input image size (24*24) doesn't match model (32*32)`; `Image size 192x192 is too small`."""
    found = re.search(r"\(?(\d+)\*(\d+)\)? doesn't match model \(?(\d+)\*(\d+)\)?", said.said)
    side = re.search(r"Input (?:height|width) \((\d+)\) doesn't match model \((\d+)\)", said.said)
    small = re.search(r"[Ii]mage size (\d+)x(\d+) is too small", said.said)
    pictures = {name: value for name, value in _floats(arguments) if value.ndim >= 4}
    if found:
        had, wanted = (int(found[1]), int(found[2])), (int(found[3]), int(found[4]))
        sizes = [wanted]  # of a picture that is made of several, each has its part
        sizes += [(v.shape[-2] * wanted[0] // had[0], wanted[1]) for v in pictures.values()]
    elif side:
        sizes = [(int(side[2]), int(side[2]))]
    elif small:
        sizes = [(k * int(small[1]), k * int(small[2])) for k in (2, 4, 8)]
    else:
        return
    for size in sizes:
        yield {**arguments, **{name: sample.normal(*v.shape[:-2], *size) for name, v in pictures.items()}}


SHAPE_RULES: tuple[Rule, ...] = (
    _channels, _product, _norm, _broadcast, _joined, _patches, _rows_of_pictures, _view, _pairs, _axes, _mono,
    _multiple, _length, _size,
)  # fmt: skip
"""How errors about shapes are read, in the order in which they are tried."""


def _resized(arguments: Arguments, axis: int, had: int, wanted: int, sample: Sample) -> Iterator[Arguments]:
    """Each argument that is `had` along an axis, alone, with another size there, and its mask with it."""
    for name, value in _floats(arguments):
        if -value.ndim <= axis < value.ndim and value.shape[axis] == had and 0 < wanted < 1 << 20:
            shape = list(value.shape)
            shape[axis] = wanted
            masks = {
                key: mask.new_ones(len(mask), wanted)
                for key, mask in arguments.items()
                if key.endswith("mask") and isinstance(mask, Tensor) and mask.shape[1:] == (had,)
            }
            yield {**arguments, **masks, name: sample.normal(*shape)}


def _floats(arguments: Arguments) -> list[tuple[str, Tensor]]:
    return [
        (k, v) for k, v in arguments.items() if isinstance(v, Tensor) and v.is_floating_point() and v.ndim > 1
    ]


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]
