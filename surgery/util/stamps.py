"""Stamps of tensors: equal as long as none of them is seen to change.

What leaves no trace in a tensor's version, as fused optimizers and changes through `.data` do, is seen in a few of its
values; content hashes, which `surgery.save` compares, find the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

SAMPLE = 8  # values of a tensor that are looked at

Stamp = tuple[object, ...]
"""Identity, place and version of some tensors, and a few values of each."""


def stamp(tensors: Iterable[Tensor]) -> Stamp:
    """Equal for the same tensors as long as none of them is seen to change.

    Example:
        >>> weight = torch.zeros(3)
        >>> before = stamp([weight])
        >>> stamp([weight]) == before, stamp([weight.add_(1)]) == before
        (True, False)
    """
    found = list(tensors)
    return (*versions(found), *_samples(found))


def stamps(tensors: Mapping[str, Tensor]) -> dict[str, Stamp]:
    """A stamp of each tensor, where that takes fewer calls than one after the other.

    Example:
        >>> weights = {"a": torch.zeros(3), "b": torch.ones(3)}
        >>> before = stamps(weights)
        >>> _ = weights["b"].add_(1)
        >>> [name for name, each in stamps(weights).items() if each != before[name]]
        ['b']
    """
    few = {name: each for name, tensor in tensors.items() if (each := _few(tensor)) is not None}
    alike: dict[tuple, list[str]] = {}
    for name, each in few.items():
        alike.setdefault((each.device, each.dtype), []).append(name)
    values: dict[str, bytes] = {}
    for names in alike.values():
        flat = torch.cat([few[name] for name in names]).cpu().view(torch.uint8).numpy().tobytes()
        start = 0
        for name in names:
            values[name] = flat[start : (start := start + few[name].nbytes)]
    return {name: (*versions([each]), values.get(name)) for name, each in tensors.items()}


def versions(tensors: Iterable[Tensor]) -> Stamp:
    """Identity, place and version of tensors: no value is looked at."""
    return tuple((id(t), t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors)


def tensors_of(module: nn.Module) -> Iterator[Tensor]:
    """All parameters and buffers of a module, again where several parts have one: asked for before every pass."""
    yield from (t for t in module._parameters.values() if t is not None)
    yield from (t for t in module._buffers.values() if t is not None)
    for part in module._modules.values():
        if part is not None:
            yield from tensors_of(part)


@torch.no_grad()
def _samples(tensors: Sequence[Tensor]) -> list[bytes]:
    """A few values of every tensor, brought from each device in one go."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        if (few := _few(tensor)) is not None:
            real = torch.view_as_real(few).flatten() if few.is_complex() else few
            by_device.setdefault(tensor.device, []).append(real.double())
    return [torch.cat(few).cpu().numpy().tobytes() for few in by_device.values()]


def _few(tensor: Tensor) -> Tensor | None:
    """A few values of a tensor `[N]`; None where it has none that could be looked at."""
    if not (tensor.is_contiguous() and tensor.numel()) or tensor.device.type == "meta":
        return None
    flat = tensor.detach().view(-1)
    return flat[:: max(1, flat.numel() // SAMPLE)]
