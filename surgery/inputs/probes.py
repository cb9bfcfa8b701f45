"""Probe inputs: batches, made up or read from the user's files, on which a change of outputs is measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery.errors import SurgeryError
from surgery.inputs.calibration import picture_statistics, read_calibration
from surgery.inputs.leaves import dead_leaves
from surgery.inputs.sample import Sample, find
from surgery.inputs.text import end_token, text_length, vocabulary
from surgery.members.member import Inputs, Member, Spread
from surgery.util.randomness import seeded

MADE_UP = "made up"  # the source of inputs that are
_LENGTH = 32  # tokens of made-up text
# Between the seeds of probes and of inputs that a fit learns from: generators take 32 bits of a seed.
_APART = 0x9E3779B9
_CHANNELS, _SIDE = 4, 8  # of arrays that may be pictures: at most and at least
_TEXT = {"input_ids", "decoder_input_ids", "attention_mask", "decoder_attention_mask", "token_type_ids"}
_SOUND_OR_PICTURE = {"pixel_values", "input_values", "input_features"}
_STRUCTURE = ("mask", "grid", "shape", "length", "position", "type")  # integers that describe, not data
_CACHES = ("past_key_values", "cache_params", "mems", "state")


def probe_inputs(
    member: Member, *, seed: int = 0, count: int = 8, calibrate: str | Path | None = None
) -> list[Inputs]:
    """Batches for measuring how much a member's outputs change.

    Made-up text is random ordinary token ids of varied lengths; made-up pictures are smooth noise,
    normalised as the model expects; anything else is like the member's example inputs with fresh values.

    Args:
        member: loaded.
        seed: of made-up inputs.
        count: number of made-up batches, each as large as the example inputs' batch.
        calibrate: `.txt` (one text per line), a picture or a folder of pictures, `.npz` or `.safetensors` of
            arrays named by forward's arguments (or `arg0`, `arg1`); all its examples are used, 8 a batch.

    Raises:
        LoadError: where the calibration file cannot be read or does not suit the member.
        ValueError: where `count` is below 1.

    Example:
        >>> from surgery.members.references import load_member
        >>> member = load_member(nn.Linear(3, 5), name="probe", inputs=torch.randn(2, 3))
        >>> [batch.args[0].shape for batch in probe_inputs(member, count=2)]
        [torch.Size([2, 3]), torch.Size([2, 3])]
    """
    if calibrate is not None:
        return read_calibration(member, Path(calibrate))
    if count < 1:
        raise ValueError(f"count must be at least 1, not {count}")
    likeness = _Likeness(member, torch.Generator().manual_seed(seed))
    return [likeness.batch() for _ in range(count)]


def calibration_inputs(member: Member, *, seed: int = 0, count: int = 16) -> list[Inputs]:
    """Made-up batches from which a fit learns how its errors move outputs.

    None of them are among `probe_inputs`, on which these errors are then measured, and pictures are of another kind,
    dead leaves: an error that is small on what a fit has learned from alone does not look small.

    Args:
        member: loaded.
        seed: of both.
        count: number of batches, each as large as the example inputs' batch.

    Example:
        >>> from surgery.members.references import load_member
        >>> member = load_member(nn.Linear(3, 5), name="probe", inputs=torch.randn(2, 3))
        >>> len(calibration_inputs(member)), len(probe_inputs(member))
        (16, 8)
    """
    likeness = _Likeness(member, torch.Generator().manual_seed(seed + _APART), leaves=True)
    return [likeness.batch() for _ in range(count)]


def followed(member: Member) -> frozenset[str]:
    """Places of the example inputs on whose values made-up probe inputs depend.

    Example:
        >>> from surgery.members.references import load_member
        >>> followed(load_member(nn.Linear(3, 5), name="probe", inputs=torch.randn(2, 3)))
        frozenset({'0'})
    """
    likeness = _likeness(member)
    return frozenset(likeness.by_spread | {place for place, t in likeness.by_value.items() if _counts(t)})


def unknown_in_probes(member: Member) -> list[str]:
    """Places of the example inputs on whose values made-up probe inputs depend, although these were not kept."""
    likeness, spreads = _likeness(member), member.inputs.spreads
    unknown = {place for place in likeness.by_spread if place in spreads and spreads[place] is None}
    for place in likeness.by_value.keys() & spreads.keys():
        spread = spreads[place]
        constant = spread is not None and spread.low == spread.high and _counts(likeness.by_value[place])
        unknown |= set() if constant else {place}
    return sorted(unknown)


def spread_of(tensor: Tensor) -> Spread:
    """Smallest and largest value of a tensor, and mean and standard deviation where they are real.

    Example:
        >>> spread_of(torch.tensor([1, 5, 3]))
        Spread(low=1, high=5, mean=0.0, deviation=0.0)
    """
    if not tensor.is_floating_point():
        return Spread(int(tensor.min()), int(tensor.max()))
    numbers = tensor.float()
    found = numbers.min(), numbers.max(), numbers.mean(), numbers.std(correction=0)
    return Spread(*(float(each) for each in found))


def tensors_at(inputs: Inputs) -> list[tuple[str, Tensor]]:
    """The tensors among arguments, each with its place, such as `0`, `ids` or `states.1`."""
    named = [*((str(i), value) for i, value in enumerate(inputs.args)), *inputs.kwargs.items()]
    return [found for place, value in named for found in _tensors_at(value, place)]


def outputs_of(module: nn.Module, inputs: Inputs) -> tuple[Tensor, ...]:
    """The floating-point tensors that one forward pass without gradients returns, caches left out.

    A model that draws random numbers draws the same ones each time, or two passes could not be compared; the
    caller's random state is left as it was.

    Args:
        module: any.
        inputs: arguments of the call.

    Returns:
        tensors in the order of the output's fields, nested ones flattened.

    Example:
        >>> [t.shape for t in outputs_of(nn.LSTM(3, 5), Inputs((torch.randn(2, 3),)))]
        [torch.Size([2, 5]), torch.Size([1, 5]), torch.Size([1, 5])]
    """
    with same_draws(module), torch.no_grad():
        return tuple(tensors_in(module(*inputs.args, **inputs.kwargs)))


@contextmanager
def same_draws(module: nn.Module) -> Iterator[None]:
    """Inside, a module that draws random numbers draws the same ones each time; generators are left as they were."""
    devices = {p.device for p in module.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices), enabled=bool(devices)), seeded(0):
        if devices:
            torch.manual_seed(0)
        yield


def outputs_over(module: nn.Module, probes: Sequence[Inputs]) -> tuple[Tensor, ...]:
    """A module's output tensors, each over all probe inputs."""
    return over_all([outputs_of(module, batch) for batch in probes])


def over_all(batches: Sequence[Sequence[Tensor]]) -> tuple[Tensor, ...]:
    """Output tensors by batch as one each, flat, over all batches."""
    return tuple(torch.cat([t.flatten() for t in tensors]) for tensors in zip(*batches, strict=True))


def relative_error(reference: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> float:
    """The largest `|other - reference| / |reference|` over output tensors, L2 norms in float64.

    A tensor whose reference is all zero counts with its absolute difference; a NaN makes the result NaN.

    Raises:
        SurgeryError: where the two do not have the same tensors.

    Example:
        >>> relative_error((torch.ones(4),), (torch.full((4,), 1.5),))
        0.5
    """
    if [t.shape for t in reference] != [t.shape for t in other]:
        raise SurgeryError(
            "outputs must have the same shapes to be compared, but have "
            f"{[tuple(t.shape) for t in reference]} and {[tuple(t.shape) for t in other]}"
        )
    errors = []
    for expected, found in zip(reference, other, strict=True):
        expected, found = expected.detach().cpu().double(), found.detach().cpu().double()
        norm = float(expected.norm())
        difference = float((found - expected).norm())
        errors.append(difference / norm if norm else difference)
    return float("nan") if any(error != error for error in errors) else max(errors, default=0.0)


def tensors_in(value: Any) -> list[Tensor]:
    """Floating-point tensors in outputs of any kind."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() or value.is_complex() else []
    if isinstance(value, Mapping):
        return [t for key, item in value.items() if str(key) not in _CACHES for t in tensors_in(item)]
    if isinstance(value, (tuple, list)):
        return [t for item in value for t in tensors_in(item)]
    if is_dataclass(value) and not isinstance(value, type):
        return [t for f in fields(value) if f.name not in _CACHES for t in tensors_in(getattr(value, f.name))]
    return []  # caches and other objects


class _Likeness:
    """Batches like a member's example inputs with new values, and which values of theirs these follow.

    Attributes:
        by_spread: places of tensors of which smallest value, largest, mean or deviation are followed.
        by_value: tensors that are taken as they are, by their place.

    Args:
        member: whose example inputs.
        generator: of values.
        leaves: whether pictures, and what may be pictures, are dead leaves.
    """

    def __init__(self, member: Member, generator: torch.Generator, *, leaves: bool = False):
        self.member, self.generator, self.leaves = member, generator, leaves
        self.by_spread: set[str] = set()
        self.by_value: dict[str, Tensor] = {}

    def batch(self) -> Inputs:
        """The next one."""
        kwargs = dict(self.member.inputs.kwargs)
        text = _text(self.member, self.generator) if isinstance(kwargs.get("input_ids"), Tensor) else {}
        for name, value in kwargs.items():
            if name not in text:
                kwargs[name] = self._like(value, name, name)
        args = tuple(self._like(value, "", str(i)) for i, value in enumerate(self.member.inputs.args))
        return Inputs(args, {**kwargs, **text}, MADE_UP)

    def _like(self, value: Any, name: str, place: str) -> Any:
        """A fresh value of the same shape, dtype and range; pictures are smooth, structural integers stay."""
        if isinstance(value, (tuple, list)):
            return type(value)(self._like(item, name, f"{place}.{i}") for i, item in enumerate(value))
        if not isinstance(value, Tensor) or value.numel() == 0:
            self.by_value.update(_tensors_at(value, place))
            return value
        if value.dim() == 4 and (name.startswith("pixel_values") or self.member.origin.kind == "timm"):
            return _pictures(value, self.member, self.generator, self.leaves)
        real = value.is_floating_point()
        described = (
            value.is_complex() or value.dtype == torch.bool or any(word in name for word in _STRUCTURE)
        )
        if described and not real:
            self.by_value[place] = value
            return value
        self.by_spread.add(place)
        known = self.member.inputs.spreads.get(place)
        if real:
            known = known or spread_of(value)
            if self.leaves and _may_be_pictures(value):
                fresh = dead_leaves(value.shape, self.generator)
                fresh = (fresh - fresh.mean()) / fresh.std()
            else:
                fresh = torch.randn(value.shape, generator=self.generator)
            fresh = fresh * known.deviation + known.mean
            return fresh.clamp(known.low, known.high).to(value)
        known = known or spread_of(value)
        return torch.randint(int(known.low), int(known.high) + 1, value.shape, generator=self.generator).to(
            value
        )


def _counts(tensor: Tensor) -> bool:
    """Whether a tensor holds whole numbers."""
    return not tensor.is_floating_point() and not tensor.is_complex()


def _likeness(member: Member) -> _Likeness:
    """One that has made a batch."""
    likeness = _Likeness(member, torch.Generator().manual_seed(0))
    likeness.batch()
    return likeness


def _tensors_at(value: Any, place: str) -> list[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        return [(place, value)]
    if isinstance(value, Mapping):
        inner = [(str(key), item) for key, item in value.items()]
    else:
        inner = [(str(i), item) for i, item in enumerate(value)] if isinstance(value, (tuple, list)) else []
    return [found for key, item in inner for found in _tensors_at(item, f"{place}.{key}")]


def _text(member: Member, generator: torch.Generator) -> dict[str, Tensor]:
    """Random ordinary ids of varied lengths, where no other example input has the text's length."""
    examples, config = member.inputs.kwargs, getattr(member.module, "config", None)
    if config is None or set(examples) - _TEXT - _SOUND_OR_PICTURE:
        return {}
    batch = len(examples["input_ids"])
    length = text_length(Sample(config, generator, torch.float32, batch, _LENGTH))
    allowed = vocabulary(config)
    made = {
        name: allowed[torch.randint(len(allowed), (batch, length), generator=generator)]
        for name in ("input_ids", "decoder_input_ids")
        if name in examples
    }
    if "token_type_ids" in examples:
        made["token_type_ids"] = torch.zeros(batch, length, dtype=torch.long)
    if "attention_mask" in signature(member.module.forward).parameters:
        shortest = max(1, length // 2)
        ends = torch.randint(shortest, length + 1, (batch,), generator=generator)
        ends[0] = length  # a batch is as long as its longest text
        made["attention_mask"] = (torch.arange(length)[None] < ends[:, None]).long()
        padding = find(config, "pad_token_id", None, "text")
        end = end_token(config)
        if end is not None:
            made["input_ids"][torch.arange(batch), ends - 1] = end
        if isinstance(padding, int) and padding >= 0:
            made["input_ids"] = torch.where(made["attention_mask"] > 0, made["input_ids"], padding)
    if "decoder_attention_mask" in examples:
        made["decoder_attention_mask"] = torch.ones(batch, length, dtype=torch.long)
    return made


def _may_be_pictures(value: Tensor) -> bool:
    return value.dim() == 4 and value.shape[1] <= _CHANNELS and min(value.shape[2:]) >= _SIDE


def _pictures(value: Tensor, member: Member, generator: torch.Generator, leaves: bool) -> Tensor:
    """Pictures in [0, 1], smooth noise at two scales or dead leaves, normalised by the model's mean and deviation."""
    batch, channels, height, width = value.shape
    if leaves:
        picture = dead_leaves((batch, channels, height, width), generator)
    else:
        picture = torch.zeros(batch, channels, height, width)
        for cells, weight in ((4, 0.7), (16, 0.3)):
            noise = torch.rand((batch, channels, cells, cells), generator=generator)
            picture += weight * F.interpolate(noise, (height, width), mode="bicubic", align_corners=False)
    mean, deviation = picture_statistics(member, channels)
    return ((picture.clamp(0, 1) - mean) / deviation).to(value)
