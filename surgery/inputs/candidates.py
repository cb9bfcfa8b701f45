"""Example inputs: arguments of one small forward call, for tracing.

What the user gives comes first. Without it, timm models state their input size, and for transformers models a
short list of ways is tried until one forward pass works: text with all that a multimodal model reads beside it, the
model's own dummy inputs, its main input, the required arguments of its forward, the arguments of its modalities,
embeddings for ids, and a batch of one.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from surgery.errors import LoadError, SurgeryWarning
from surgery.inputs.fields import known, make
from surgery.inputs.repairs import outline, repairs
from surgery.inputs.sample import Sample, TooLargeError
from surgery.members.member import Inputs, Origin
from surgery.tracing import run_without_weights
from surgery.util.quiet import quiet
from surgery.util.text import one_line

ROUNDS = 10  # tries for each way to make inputs up
_ALONE = "batch of one"
_CPU_LIMIT = 1 << 27  # parameters; above, a candidate is tried without data first
_TOWERS = (
    "input_ids", "attention_mask", "pixel_values", "image_grid_thw", "mm_token_type_ids", "input_features",
    "input_features_mask", "feature_attention_mask", "image_position_ids", "image_attention_mask",
)  # fmt: skip
_MODALITIES = (
    "input_ids", "attention_mask", "pixel_values", "bbox", "input_features", "input_values",
    "decoder_input_ids", "image_grid_thw", "past_time_features", "past_observed_mask", "pixel_values_videos",
)  # fmt: skip


def as_inputs(inputs: Inputs | tuple | list | Mapping[str, Any] | Tensor, source: str = "given") -> Inputs:
    """What a user may give as example inputs, as `Inputs`.

    Args:
        inputs: positional arguments as a tuple, keyword arguments as a dict, or one tensor.
        source: where they come from.

    Raises:
        LoadError: where it is none of these.

    Example:
        >>> as_inputs({"input_ids": torch.zeros(2, 8, dtype=torch.long)}).kwargs.keys()
        dict_keys(['input_ids'])
    """
    if isinstance(inputs, Inputs):
        return inputs
    if isinstance(inputs, Tensor):
        return Inputs((inputs,), {}, source)
    if isinstance(inputs, (tuple, list)):
        return Inputs(tuple(inputs), {}, source)
    if isinstance(inputs, Mapping) and all(isinstance(key, str) for key in inputs):
        return Inputs((), dict(inputs), source)
    raise LoadError(
        f"example inputs must be a tensor, a tuple of arguments, a dict of keyword arguments or Inputs, "
        f"not {type(inputs).__name__}"
    )


def example_inputs(module: nn.Module, origin: Origin, *, seed: int = 0) -> Inputs:
    """Arguments of one small forward call (a batch of 2 where the model allows it) that was seen to work.

    Args:
        module: in eval mode, weights loaded.
        origin: tells which library's conventions hold.
        seed: of the values.

    Raises:
        LoadError: where nothing is known about the inputs, or no candidate works; it names every failure.

    Example:
        >>> import timm
        >>> net = timm.create_model("resnet10t").eval()
        >>> example_inputs(net, Origin("timm", "timm:resnet10t", "resnet10t")).args[0].shape
        torch.Size([2, 3, 176, 176])
    """
    if origin.kind not in CANDIDATES:
        raise LoadError(
            f"'{origin.reference}' does not tell what its forward takes: give example inputs "
            "(inputs=..., or a factory that returns (module, example inputs))"
        )
    failures: list[str] = []
    for candidate in CANDIDATES[origin.kind]:
        inputs = candidate(module, seed)
        found = None if inputs is None else _until_it_works(module, inputs, seed, failures)
        if found is not None:
            return found
    raise LoadError(
        f"no example inputs could be made up for '{origin.reference}' ({origin.architecture}); tried "
        f"{'; '.join(failures) or 'nothing'}. Give example inputs (inputs=...)"
    )


def inputs_for_part(part: nn.Module) -> Inputs | None:
    """Example inputs for a model that is a part of another; None where there is no way to make them up."""
    config = getattr(part, "config", None)
    if not hasattr(part, "main_input_name") or not hasattr(config, "to_dict"):
        return None
    name = type(part).__name__
    try:
        return example_inputs(part, Origin("transformers", name, name))
    except LoadError:
        return None


def forward_error(module: nn.Module, inputs: Inputs) -> Exception | None:
    """None where one forward pass with `inputs` works, else what it raised.

    Large modules run without their weights first, which reads none and costs no arithmetic.
    """
    apart: Exception | None = None
    if sum(parameter.numel() for parameter in module.parameters()) > _CPU_LIMIT:
        try:
            with torch.no_grad(), quiet(importing=False):
                run_without_weights(module, inputs)
            return None
        except (
            Exception
        ) as error:  # some models compute with values of their weights; the pass with data decides
            apart = error
    try:
        with torch.no_grad(), quiet(importing=False):
            module(*inputs.args, **inputs.kwargs)
    except Exception as error:
        return error
    if apart is not None:
        warnings.warn(
            f"{type(module).__name__} runs with its weights alone, all of which were read: without them it raises "
            f"{one_line(apart)}",
            SurgeryWarning,
            stacklevel=2,
        )
    return None


def floating_dtype(module: nn.Module) -> torch.dtype:
    """The dtype that floating-point inputs need: the one of the first floating-point parameter."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)


def timm_picture(module: Any, seed: int) -> Inputs | None:
    """One normalised picture batch of the size that timm's configuration states."""
    config = getattr(module, "pretrained_cfg", None) or getattr(module, "default_cfg", {})
    channels, height, width = config.get("input_size") or (3, 224, 224)
    # Arguments of its creation win over the pretrained configuration.
    changed = getattr(module, "_model_args", {})
    channels = changed.get("in_chans") or channels
    side = changed.get("img_size") or (height, width)
    height, width = (side, side) if isinstance(side, int) else side
    generator = torch.Generator().manual_seed(seed)
    picture = torch.randn((2, channels, height, width), generator=generator).to(floating_dtype(module))
    return Inputs((picture,), {}, "timm input_size")


def dummy_inputs(module: Any, seed: int) -> Inputs | None:
    """The dummy inputs of classes that state their own; the base class has ids, whatever the model reads."""
    from transformers import PreTrainedModel

    if type(module).dummy_inputs is PreTrainedModel.dummy_inputs:
        return None
    try:
        found = dict(module.dummy_inputs)
    except Exception:  # a few of them are out of date and raise
        return None
    known = _accepted(module, found)
    return Inputs((), known, "dummy_inputs") if known else None


def main_input(module: Any, seed: int) -> Inputs | None:
    """The argument that the class calls its main input, with a mask for text."""
    return _fields(module, seed, _main(module), "main_input_name")


def required_arguments(module: Any, seed: int) -> Inputs | None:
    """The main input, every argument that forward requires, and the ids of a decoder where there is one."""
    names = _main(module)
    for name, parameter in inspect.signature(module.forward).parameters.items():
        if parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD:
            names.append(name)
    return _fields(module, seed, [*names, "decoder_input_ids", "image_grid_thw"], "forward signature")


def every_tower(module: Any, seed: int) -> Inputs | None:
    """Text together with pictures and sound, for models that have a part for each; None for all others."""
    parts = {name for name, value in vars(module.config).items() if hasattr(value, "to_dict")}
    if not parts & {"vision_config", "audio_config", "thinker_config"} or "input_ids" not in _accepted(
        module, {"input_ids": None}
    ):
        return None
    return _fields(module, seed, list(_TOWERS), "every tower")


def modalities(module: Any, seed: int) -> Inputs | None:
    """Every argument of forward that carries text, pictures, sound or time series."""
    return _fields(module, seed, list(_MODALITIES), "modalities")


def embeddings(module: Any, seed: int) -> Inputs | None:
    """Embeddings in place of ids."""
    return _fields(module, seed, ["inputs_embeds", "attention_mask"], "inputs_embeds")


def batch_of_one(module: Any, seed: int) -> Inputs | None:
    """The main input alone, for models that take one example at a time."""
    return _fields(module, seed, _main(module), _ALONE, batch=1)


CANDIDATES: dict[str, tuple[Callable[[Any, int], Inputs | None], ...]] = {
    "timm": (timm_picture,),
    "transformers": (
        every_tower,
        dummy_inputs,
        main_input,
        required_arguments,
        modalities,
        embeddings,
        batch_of_one,
    ),
}
"""For each kind of origin, the ways to make up inputs, in the order in which they are tried."""


def _main(module: Any) -> list[str]:
    """Names of the main input, with the mask of text."""
    main = module.main_input_name
    names = [main] if isinstance(main, str) else list(main)
    return [*names, "attention_mask"] if "input_ids" in names else names


def _fields(module: Any, seed: int, names: list[str], source: str, batch: int = 2) -> Inputs | None:
    """Values for those of `names` that forward accepts and that are known how to make."""
    sample = _sample(module, seed, batch)
    try:
        values = {name: make(name, sample) for name in _accepted(module, dict.fromkeys(names)) if known(name)}
    except TooLargeError:
        return None
    return Inputs((), values, source) if values else None


def _accepted(module: nn.Module, values: Mapping[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(module.forward).parameters
    return {name: value for name, value in values.items() if name in parameters}


def _sample(module: Any, seed: int, batch: int = 2) -> Sample:
    accepts = frozenset(inspect.signature(module.forward).parameters)
    generator = torch.Generator().manual_seed(seed)
    return Sample(module.config, generator, floating_dtype(module), batch, accepts=accepts)


def _until_it_works(module: Any, inputs: Inputs, seed: int, failures: list[str]) -> Inputs | None:
    """`inputs`, changed as errors ask for until one forward pass works; None where `ROUNDS` tries did not help."""
    tried: set[str] = set()
    waiting = [inputs]
    while waiting and len(tried) < ROUNDS:
        inputs = waiting.pop()
        outlined = outline(dict(inputs.kwargs))
        if outlined in tried:
            continue
        tried.add(outlined)
        error = forward_error(module, inputs)
        if error is None:
            return inputs
        failures.append(f"{inputs.source}: {one_line(error, 120)}")
        repaired = _repaired(module, inputs, error, seed)
        waiting += reversed(repaired)  # what the last error asks for comes first
    return None


def _repaired(module: Any, inputs: Inputs, error: Exception, seed: int) -> list[Inputs]:
    if inputs.args or not hasattr(module, "config"):
        return []
    source = f"{inputs.source.removesuffix(', repaired')}, repaired"
    batch = 1 if source.startswith(_ALONE) else 2
    changed = repairs(module, dict(inputs.kwargs), error, _sample(module, seed, batch))
    return [Inputs((), arguments, source) for arguments in changed]
