"""Adapters that peft wrote: loaded onto their base, and merged into its weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from surgery.errors import LoadError
from surgery.members.origins.base import Loaded, read_config, read_small_files
from surgery.util.quiet import quiet
from surgery.util.text import one_line, shorten

Value = TypeVar("Value")

CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_MODELS = ("model*.safetensors", "pytorch_model*.bin")


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter alone, without the model that it belongs to."""
    return (folder / CONFIG).is_file() and not any(any(folder.glob(pattern)) for pattern in _MODELS)


def base_of(folder: Path) -> str:
    """A reference to the base of the adapter in a folder: a folder beside it or elsewhere, or a hub id.

    Raises:
        LoadError: where the adapter names none.
    """
    config = _read_config(folder)
    base = str(config["base_model_name_or_path"])
    places = (Path(base).expanduser(), folder / base)
    where = next((str(place) for place in places if (place / "config.json").is_file()), base)
    revision = config.get("revision")
    return f"{where}@{revision}" if revision and not Path(where).is_dir() else where


def check_base(folder: Path, check: Callable[[str], None]) -> None:
    """What can be said about an adapter's folder before anything is loaded.

    Args:
        folder: of the adapter.
        check: of a reference to the base.

    Raises:
        LoadError: where peft is not installed, the adapter has no weights, or its base is not there.
    """
    base = str(_read_config(folder)["base_model_name_or_path"])
    _peft(folder, base)
    _of_base(folder, base, lambda: check(base_of(folder)))


def load_onto_base(
    reference: str, folder: Path, asked: str, load_base: Callable[[str], Loaded], patterns: tuple[str, ...]
) -> Loaded:
    """The base model with the adapter merged into its weights, as `merge_and_unload` does it.

    Args:
        reference: what the user typed.
        folder: of the adapter.
        asked: the options behind the base, such as `?class=NAME`, or nothing.
        load_base: from a reference to the base as it is loaded by itself.
        patterns: of small files that the adapter's folder may have in place of the base's.

    Raises:
        LoadError: where peft is not installed, the base cannot be loaded, or the adapter does not fit it or has no
            weights to merge.
    """
    config = _read_config(folder)
    base, where = str(config["base_model_name_or_path"]), base_of(folder)
    peft = _peft(folder, base)
    loaded = _of_base(folder, base, lambda: load_base(f"{where}{asked}"))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            net = peft.PeftModel.from_pretrained(loaded.module, str(folder), autocast_adapter_dtype=False)
            merge = getattr(net, "merge_and_unload", None)
            if merge is None or net.active_peft_config.is_prompt_learning:
                raise LoadError(
                    f"{folder}: an adapter must change weights, so that it can be merged into them, but "
                    f"'{config.get('peft_type')}' adds to the inputs: load it with peft and give the live module"
                )
            module = merge(safe_merge=True)
        except LoadError:
            raise
        except Exception as error:
            raise LoadError(
                f"{folder} as an adapter of {type(loaded.module).__name__} ('{base}'): {one_line(error)}; check "
                "that it was trained on this base, or choose the base's class with ?class=NAME"
            ) from error
    if lost := [str(each.message) for each in said if "adapter keys" in str(each.message)]:
        raise LoadError(
            f"{folder} as an adapter of {type(loaded.module).__name__} ('{base}'): {one_line(Warning(lost[0]))}; check "
            "that it was trained on this base, or choose the base's class with ?class=NAME"
        )
    module.requires_grad_(True)  # peft froze the base
    for left in ("peft_config", "active_adapter"):
        module.__dict__.pop(left, None)
    files = {
        **loaded.files,
        **{k: v for k, v in read_small_files(folder, patterns).items() if k != "config.json"},
    }
    origin = replace(loaded.origin, reference=reference, options={**loaded.origin.options, "base": where})
    return replace(loaded, module=module.eval(), origin=origin, files=files)


def _of_base(folder: Path, base: str, ask: Callable[[], Value]) -> Value:
    """What `ask` says of the base of an adapter, its error with what it is the base of."""
    try:
        return ask()
    except LoadError as error:
        raise LoadError(
            f"{folder} is a peft adapter, whose base must be loaded first ({CONFIG} names '{base}'): {error}"
        ) from error


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    config = read_config(path)
    if not isinstance(config.get("base_model_name_or_path"), str):
        raise LoadError(
            f"{path} must name its base as 'base_model_name_or_path', but does not: merge the adapter with peft and "
            "give the folder of the merged model"
        )
    if config.get("megatron_config"):
        raise LoadError(
            f"{path} asks for Megatron, whose code it names: merge the adapter there, and give that model"
        )
    if not any((folder / name).is_file() for name in _WEIGHTS):
        raise LoadError(
            f"{folder} must hold the adapter's weights ({shorten(_WEIGHTS)}), but has none: add them"
        )
    return config


def _peft(folder: Path, base: str) -> Any:
    try:
        with quiet():
            import peft
    except ImportError as error:
        raise LoadError(
            f"{folder} is a peft adapter of '{base}', and merging it into its base needs peft, which is not installed: "
            "pip install 'model-surgery[peft]', or give the folder of the merged model"
        ) from error
    return peft
