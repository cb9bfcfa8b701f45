"""Shrink: transformers model types from their default configurations, made small, with seeded random weights.

Several scales are tried, the smallest first; the first that builds and runs one forward pass is taken. Nothing is
downloaded, and a model is only given memory after its size was counted on the meta device.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks.coverage.shrink_rules import Scale, shrink

_ALL = 1 << 30
SCALES = (
    Scale(16), Scale(8), Scale(32), Scale(4), Scale(2), Scale(16, layers=12), Scale(4, heads=True),
    Scale(2, heads=True), Scale(8, vocabulary=_ALL), Scale(1), Scale(1, _ALL, _ALL, _ALL),
)  # fmt: skip
"""The ways to shrink, in the order in which they are tried; the last keeps the defaults."""
MOST_PARAMETERS = 130_000_000
_TOWERS_PATIENCE = 8.0  # seconds; afterwards a model of which only the text ran is taken
_PATIENCE = 25.0  # seconds; afterwards what was built first is taken, whether or not it ran


@dataclass(frozen=True)
class ModelType:
    """A name in transformers' list of configurations, and its class: the base model where there is one.

    Attributes:
        name: the model type.
        class_name: of the model; empty where only a part of another model has this configuration.
    """

    name: str
    class_name: str


def model_types() -> list[ModelType]:
    """All model types in alphabetical order."""
    from transformers.models.auto import configuration_auto

    return [
        ModelType(name, _class_name(name))
        for name in sorted(vars(configuration_auto)["CONFIG_MAPPING_NAMES"])
    ]


def shrunk_config(model_type: str, scale: Scale = SCALES[0]) -> Any:
    """The default configuration of a model type, made smaller.

    Raises:
        LookupError: where a default configuration needs an optional package that is missing.
        Exception: what the configuration's own class says about values that do not fit together.

    Example:
        >>> shrunk_config("bert").hidden_size
        48
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    with _packages(model_type):
        return shrink(CONFIG_MAPPING[model_type](), scale)


def shrunk_model(model_type: str, class_name: str | None = None, seed: int = 0) -> nn.Module:
    """A small model of a type, in eval mode, with the same random weights for the same seed.

    Args:
        model_type: a name of transformers' list.
        class_name: a class of transformers; by default the one of `model_types`.
        seed: of the weights.

    Raises:
        LookupError: where the type has no model of its own, or needs a package that is missing.
        ValueError: where no scale builds; it tells what each said.

    Example:
        >>> type(shrunk_model("bert")).__name__
        'BertModel'
    """
    import transformers

    name = class_name or _class_name(model_type)
    if not name:
        raise LookupError(f"{model_type}: a part of other models, without a class of its own")
    kind: Any = getattr(transformers, name)
    if kind.forward is nn.Module.forward:
        raise LookupError(f"{name}: its class has no forward pass; its parts have their own classes")
    first: nn.Module | None = None
    running: nn.Module | None = None
    said: list[str] = []
    began = time.monotonic()
    for scale in SCALES:
        try:
            with _packages(model_type):
                model = _build(kind, shrunk_config(model_type, scale), seed)
        except LookupError:
            raise
        except Exception as error:
            said.append(f"{scale.width}: {type(error).__name__}: {' '.join(str(error).split())[:160]}")
            continue
        source = _runs(model, model_type)
        if source and (not _towers(model) or source.startswith("every tower")):
            return model
        first, running = first or model, running or (model if source else None)
        if time.monotonic() - began > (_PATIENCE if running is None else _TOWERS_PATIENCE):
            break
    if first is None:
        raise ValueError(f"{name} builds at no scale: {'; '.join(said)}")
    return running or first


def _build(kind: Any, config: Any, seed: int) -> nn.Module:
    with torch.device("meta"), _seeded(seed):
        size = sum(p.numel() for p in kind(copy.deepcopy(config)).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"{size / 1e6:.0f} M parameters")
    with _seeded(seed):
        model = kind(config).eval()
        _settle(model, seed)
    return model


@torch.no_grad()
def _settle(model: nn.Module, seed: int) -> None:
    """Seeded values for what a class leaves as uninitialised memory."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in model.parameters():
        usual = not tensor.numel() or (tensor.isfinite().all() and tensor.abs().max() < 1e4)
        if tensor.is_floating_point() and not usual:
            tensor.copy_(0.02 * torch.randn(tensor.shape, generator=generator))


def _runs(model: nn.Module, model_type: str) -> str:
    """The source of example inputs with which one forward pass works; empty where there are none."""
    from surgery.errors import LoadError
    from surgery.inputs import example_inputs
    from surgery.members.member import Origin

    try:
        return example_inputs(model, Origin("transformers", model_type, type(model).__name__)).source
    except LoadError:
        return ""


def _towers(model: nn.Module) -> bool:
    """Whether a model reads text and something else, so that a scale should be found at which all of it runs."""
    from surgery.inputs.candidates import every_tower

    return every_tower(model, 0) is not None


def _class_name(model_type: str) -> str:
    """The base model, or the first class that any automatic choice has for this type."""
    from transformers.models.auto import modeling_auto

    tables = sorted(
        name for name in vars(modeling_auto) if name.startswith("MODEL_") and name.endswith("_MAPPING_NAMES")
    )
    for table in ("MODEL_MAPPING_NAMES", *tables):
        found = getattr(modeling_auto, table).get(model_type)
        if found:
            return found if isinstance(found, str) else found[0]
    return ""


@contextlib.contextmanager
def _packages(model_type: str) -> Iterator[None]:
    """Says which optional package is missing."""
    try:
        yield
    except ImportError as error:
        text = " ".join(str(error).split())[:160]
        raise LookupError(f"{model_type}: needs a package that is missing: {text}") from error


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
