"""transformers' plug-in: `from_pretrained` of a checkpoint that `export(..., format="transformers")` wrote.

    import surgery
    model = AutoModel.from_pretrained("text-small")

The weights are decoded while they are loaded, one at a time; what comes of it is an ordinary model, which trains, and
which `save_pretrained` writes as ordinary weights. `import surgery` registers this as soon as transformers is
imported.

A loader puts a marker in the place of each parameter that has codes, with the dtype and on the device that the
parameter shall have; so `dtype`, `device_map` and parameters that a class keeps in float32 are transformers' affair.
Afterwards each marker gives way to what its codes stand for, before weights are tied and others drawn, which looks at
shapes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from surgery.errors import LoadError, SurgeryWarning, shorten
from surgery.util.devices import cpu_by_default

METHOD = "surgery"
CODES = r"^surgery/"
"""Names that no parameter has."""


class SurgeryConfig(QuantizationConfigMixin):
    """What `quantization_config` says of codes: entries of a manifest; see `surgery.artifact.codes`."""

    def __init__(self, **entries: Any):
        self.quant_method = METHOD  # pyright: ignore[reportAttributeAccessIssue]
        self.entries = {name: each for name, each in entries.items() if name != "quant_method"}

    def to_dict(self) -> dict[str, Any]:
        """What the configuration file has."""
        return {"quant_method": METHOD, **self.entries}


class SurgeryQuantizer(HfQuantizer):
    """Decodes weights while a model is loaded; afterwards the model is an ordinary one."""

    requires_calibration = True
    quantization_config: Any

    def __init__(self, quantization_config: Any, **kwargs: Any):
        if not kwargs.get("pre_quantized", True):
            raise LoadError(
                "`quantization_config` says that codes are read, but the checkpoint holds ordinary weights: leave it "
                'out; of codes, which `surgery.export(..., format="transformers")` writes, config.json says so itself.'
            )
        super().__init__(quantization_config, **kwargs)
        self._handles: Mapping[str, Any] = {}
        self._shapes: Mapping[str, tuple[int, ...]] = {}
        self._where = ""

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse devices on which weights would not be, before anything is read.

        Raises:
            LoadError: where weights would lie on a disk.
        """
        places = device_map.values() if isinstance(device_map, Mapping) else [device_map]
        if "disk" in places:
            raise LoadError(_OFFLOADED)

    def update_tp_plan(self, config: Any) -> Any:
        """Not of a plan: of what versions call with the configuration before files are looked for, the first."""
        return _unlocked(config)

    def update_attn_implementation(self, config: Any) -> Any:
        """As `update_tp_plan`, which newer versions call no more."""
        return _unlocked(config)

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether a tensor of another shape is no mistake: that of a marker whose codes are of the right one."""
        handle = self._handle(model, param_name)
        return handle is not None and handle.shape == self._shapes.get(param_name)

    @cpu_by_default()  # while a model is made, that is the meta device
    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Any = None, **kwargs: Any
    ) -> Any:
        from surgery.artifact.codes import PREFIX, unpack
        from surgery.artifact.sums import Sum, sum_of
        from surgery.util.alignment import align

        if not checkpoint_files:
            raise LoadError(
                "Codes are read from files, but none were given: pass a folder or a hub id, without `state_dict`."
            )
        files = [Path(file) for file in checkpoint_files]
        self._where = str(files[0].parent)
        sums: dict[str, Sum] = {}
        codes: dict[str, Tensor] = {}
        for name, tensor in _read(files):
            sums[name] = sum_of(tensor)
            if name.startswith(PREFIX):
                codes[name] = align(tensor)
        entries = self.quantization_config.entries
        if not codes and any(entries.get(each) for each in ("member", "banks")):
            raise LoadError(_ORDINARY.format(self._where))
        self._handles = unpack(entries, codes, Path(self._where))
        _compare(entries, sums, self._handles, self._where)
        known = model._keys_to_ignore_on_load_unexpected
        model._keys_to_ignore_on_load_unexpected = (
            known | {CODES} if isinstance(known, set) else [*(known or ()), CODES]
        )
        self._shapes = {name: tuple(each.shape) for name, each in model.state_dict().items()}
        self._decode_first(model)
        return model

    def _decode_first(self, model: Any) -> None:
        """Have the first of the steps after loading decode: all of them look at shapes."""
        names = [name for name in _AFTER_LOADING if hasattr(model, name)]

        def before(name: str) -> Callable[..., Any]:
            def decode_and_go_on(*args: Any, **kwargs: Any) -> Any:
                for each in names:
                    vars(model).pop(each, None)  # the method of the class again
                self._decode(model)
                return getattr(model, name)(*args, **kwargs)

            return decode_and_go_on

        for name in names:
            setattr(model, name, before(name))

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        places = {place for place in getattr(model, "hf_device_map", {}).values()}
        if "disk" in places or (len(places) > 1 and "cpu" in places):
            raise LoadError(_OFFLOADED)
        for module in model.modules():
            config = getattr(module, "config", None)
            if config is not None and hasattr(config, "_is_quantized"):
                del config._is_quantized
        self.remove_quantization_config(model)
        self._handles = {}
        return model

    @cpu_by_default()
    @torch.no_grad()
    def _decode(self, model: Any) -> None:
        """Put into the place of each marker what its codes stand for; tied names share a parameter as before."""
        made: dict[int, Tensor] = {}
        kept, bad = [], []  # markers live on until all are replaced, so that no two have one id
        for name, module, attribute, marker in _tensors(model):
            wanted = self._shapes.get(name, ())
            if (marker.shape == wanted and marker.numel()) or 0 in wanted:
                continue
            handle = self._handle(model, name)
            if marker.numel() or handle is None or handle.shape != wanted:
                found = list(marker.shape if marker.numel() else () if handle is None else handle.shape)
                bad.append(f"{name} must be of {list(wanted)}, found {found or 'nothing'}")
                continue
            if id(marker) not in made:
                value = _value(handle, marker)
                made[id(marker)] = (
                    nn.Parameter(value, requires_grad=value.is_floating_point())
                    if isinstance(marker, nn.Parameter)
                    else value
                )
                made[id(marker)]._is_hf_initialized = True  # pyright: ignore[reportAttributeAccessIssue]
            kept.append(marker)
            setattr(module, attribute, made[id(marker)])
        if bad:
            raise LoadError(
                f"{self._where} must hold a tensor for each of {type(model).__name__} in its shape, but "
                f"{shorten(bad, 10, '; ')}; load it with the configuration that it was exported with, or export it "
                "as plain."
            )

    def _handle(self, model: Any, name: str) -> Any:
        """By the name that a model or its base model has for it."""
        prefix = f"{model.base_model_prefix}."
        for each in (name, name.removeprefix(prefix), f"{prefix}{name}"):
            if each in self._handles:
                return self._handles[each]
        return None

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Whether `save_pretrained` may write it, as ordinary weights."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether it trains, as ordinary weights do."""
        return True


_AFTER_LOADING = (
    "mark_tied_weights_as_initialized", "_move_missing_keys_from_meta_to_device", "_initialize_missing_keys",
    "tie_weights",
)  # fmt: skip
"""What transformers calls of a model whose weights were loaded, in the order of its versions."""

_OFFLOADED = (
    "Weights that are decoded must fit the devices that they run on, but `device_map` leaves some on the disk, or on "
    'the CPU beside another device: give one device, such as device_map="cuda:0", or export the member as plain.'
)


_ORDINARY = (
    "config.json says that {0} holds codes, but its weights are ordinary ones: take `quantization_config` out of "
    "config.json. The configuration of a compressed checkpoint has it; of a model that `from_config` makes of that, "
    "`del model.config.quantization_config` before it is saved."
)


def _unlocked(config: Any) -> Any:
    """Take away the name of the file that is not there, by which others are kept from reading markers as weights."""
    if hasattr(config, "transformers_weights"):
        del config.transformers_weights
    return config


def _value(handle: Any, marker: Tensor) -> Tensor:
    """What codes stand for, in the dtype and on the device of their marker; on the meta device nothing is decoded."""
    if marker.is_meta:
        return torch.empty(handle.shape, dtype=marker.dtype, device="meta")
    return handle.read().to(device=marker.device, dtype=marker.dtype)


def _compare(
    entries: Mapping[str, Any], sums: Mapping[str, Any], handles: Mapping[str, Any], where: str
) -> None:
    """Look whether a checkpoint's tensors are those that were written.

    Raises:
        LoadError: naming those that are not.
    """
    from surgery.artifact.sums import wrong_beside, wrong_sums

    if "sums" not in entries:
        warnings.warn(
            f"{where} was exported before checksums were kept, so a tensor that is another one goes unseen: export the "
            "member again.",
            SurgeryWarning,
            stacklevel=2,
        )
        return
    wrong = wrong_sums(entries["sums"], sums)
    if wrong := [*wrong, *wrong_beside(entries.get("beside", {}), Path(where))]:
        lost = [f"there is no {name}" for name in handles if name not in sums]
        raise LoadError(
            f"{where} must hold what was exported, but {shorten([*wrong, *lost], 10, '; ')}: copy it again, or export "
            "the member again."
        )


def _read(files: list[Path]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a checkpoint's files, mapped from the disk."""
    from safetensors import SafetensorError, safe_open

    for path in files:
        if path.suffix != ".safetensors":
            raise LoadError(f"Codes lie in .safetensors files, found {path.name}; export the member again.")
        try:
            with safe_open(str(path), framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    yield name, file.get_tensor(name)
        except SafetensorError as error:
            raise LoadError(
                f"{path} must hold what was exported, but is damaged ({error}): copy it again, or export the member "
                "again."
            ) from error


def _tensors(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Every parameter and buffer of a state dict at every place where it is: name, module, attribute."""
    own = {*model.state_dict()}
    for path, module in model.named_modules(remove_duplicate=False):
        for attribute, tensor in (*module._parameters.items(), *module._buffers.items()):
            name = f"{path}.{attribute}" if path else attribute
            if tensor is not None and name in own:
                yield name, module, attribute, tensor


def register() -> None:
    """Make the codes known to transformers; what is registered already stays."""
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(SurgeryConfig)
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(METHOD)(SurgeryQuantizer)


register()
