"""timm models: `timm:NAME`, `timm:NAME=weights`, `timm:NAME?option=value`, folders in timm's hub format."""

from __future__ import annotations

import inspect
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from surgery.disk.files import write_files
from surgery.disk.untrusted import DOCUMENT_BYTES, as_mapping, read_regular
from surgery.errors import LoadError
from surgery.members.member import Origin
from surgery.members.origins.base import Loaded, Request, read_config, split_options
from surgery.members.origins.bounded import bounded, by_file
from surgery.members.origins.dtypes import file_entries, widest
from surgery.members.origins.empty import build_empty
from surgery.members.origins.prefixes import without_prefix
from surgery.members.origins.weights import check_fit, load_exactly, read_weights, save_weights
from surgery.util.quiet import quiet
from surgery.util.text import one_line, shorten

_WRAPPERS = {"features_only", "out_indices", "output_stride", "feature_cls", "img_size", "num_classes", "in_chans",
             "drop_rate", "drop_path_rate", "global_pool"}  # fmt: skip
_LOADING = {"self", "args", "kwargs", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path",
            "cache_dir", "cfg", "variant"}  # fmt: skip
_WEIGHTS = ("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth")


def claims(reference: str) -> bool:
    """Whether `reference` is `timm:...`, a hub id `timm/...`, or a folder in timm's hub format."""
    if reference.startswith("timm:"):
        return True
    head = reference.partition("?")[0]
    folder = Path(head).expanduser()
    if folder.is_dir():
        return "architecture" in _read_config(folder)
    return head.startswith("timm/") and head.count("/") == 1


def check(reference: str) -> None:
    """Whether timm has the model, and a file of weights is there.

    Raises:
        LoadError: where it has not, or is not.
    """
    if not reference.startswith("timm:"):
        return
    body, weights = _split_weights(reference.removeprefix("timm:"))
    if "?" not in body:
        body, _, weights = body.partition("=")
    _check_name(body.partition("?")[0])
    if weights:
        _file_of(weights, body.partition("?")[0])


def load(reference: str, request: Request) -> Loaded:
    """Create the model and load its weights strictly.

    Raises:
        LoadError: where the name, an option or the weights do not fit, or the hub cannot be reached.
    """
    head = reference.partition("?")[0]
    folder = Path(head).expanduser()
    if folder.is_dir() or head.startswith("timm/"):
        drawn = _wants_drawn(reference)
        return (
            _load_folder(reference, folder, drawn)
            if folder.is_dir()
            else _load_hub_id(reference, head, drawn)
        )
    body, equals, weights = reference.removeprefix("timm:").partition("=")
    if "?" in body:  # an option's '=' comes before the one of the weights, which stand at the very end
        body, weights = _split_weights(reference.removeprefix("timm:"))
        equals = "=" if weights else ""
    name, options = split_options(body)
    if not equals and options.pop("pretrained", True) is False:  # an architecture to be trained from scratch
        return replace(_loaded(_create(name, options), reference, name, options), stored=False)
    if not equals:
        return _load_hub(reference, name, options)
    path = _file_of(weights, name)
    state = read_weights(path)
    module = _create(name, options)
    state = without_prefix(state, module.state_dict(), str(path))
    advice = f"Give weights of timm's '{name}', or the options they were made with, such as ?num_classes=10."
    what = f"{path} as weights of timm:{name}"
    check_fit(module, state, what, advice)
    return _loaded(load_exactly(module, state, what), reference, name, options)


def _file_of(weights: str, name: str) -> Path:
    """The file of the weights of a model.

    Raises:
        LoadError: where there is none, or options follow its name.
    """
    path = Path(weights).expanduser()
    if path.is_file():
        return path
    file, _, options = weights.partition("?")
    if options and Path(file).expanduser().is_file():
        raise LoadError(
            f"options of a timm model stand before its weights: write timm:{name}?{options}={file}"
        )
    raise LoadError(f"the weights file {path} does not exist: check the path")


def build(origin: Origin, files: Mapping[str, bytes], request: Request) -> nn.Module:
    """The architecture on empty parameters, with the recorded configuration where there is one.

    Raises:
        LoadError: where this timm does not know the architecture or its options.
    """
    options = dict(origin.options)
    if "config.json" not in files:
        return build_empty(lambda: _create(origin.architecture, options)).eval()
    with tempfile.TemporaryDirectory() as folder:
        write_files({"config.json": files["config.json"]}, Path(folder))
        check_options(origin.architecture, _read_config(Path(folder)).get("model_args") or {})
        return build_empty(lambda: _create(origin.architecture, options, f"local-dir:{folder}")).eval()


def take_dtypes(module: nn.Module, dtypes: Iterable[torch.dtype]) -> nn.Module:
    """Have what is in no state dict, such as positions, follow the tensors' dtypes, as when weights are loaded."""
    common = widest(dtypes)
    return module if common is None else module.to(common)


def adopt(module: nn.Module) -> Loaded | None:
    """A live module that timm created, so that it can be built again; None for any other."""
    config = getattr(module, "pretrained_cfg", None)
    arguments = getattr(module, "_model_args", None)
    if (
        not isinstance(config, Mapping)
        or not isinstance(arguments, Mapping)
        or not config.get("architecture")
    ):
        return None
    try:
        options = json.loads(json.dumps(dict(arguments)))
        return _loaded(module, type(module).__name__, str(config["architecture"]), options)
    except (TypeError, ValueError):
        return None


def save_plain(module: nn.Module, origin: Origin, files: Mapping[str, bytes], directory: Path) -> None:
    """Write `model.safetensors` and `config.json`; `timm.create_model("local-dir:...")` reads them."""
    save_weights(module, directory)
    write_files(
        files
        if "config.json" in files
        else {**files, **_config_file(module, origin.architecture, dict(origin.options))},
        directory,
    )


def without_weights(reference: str) -> str:
    """The model of `timm:NAME?key=value=weights`, without the file of its weights.

    Example:
        >>> without_weights("timm:resnet18=w.pth"), without_weights("timm:resnet18?num_classes=5=w.pth")
        ('timm:resnet18', 'timm:resnet18?num_classes=5')
    """
    return _split_weights(reference)[0] if "?" in reference else reference.partition("=")[0]


def _split_weights(text: str) -> tuple[str, str]:
    """`NAME?key=value=weights` as `NAME?key=value` and `weights`."""
    head, _, tail = text.rpartition("?")
    last = tail.split("&")[-1]
    if last.count("=") < 2:
        return text, ""
    key, value, weights = last.split("=", 2)
    return f"{head}?{tail[: len(tail) - len(last)]}{key}={value}", weights


def _load_hub(reference: str, name: str, options: dict[str, Any]) -> Loaded:
    """Pretrained weights through timm's own hub client."""
    import timm

    if ":" not in name:
        _check_name(name)
        check_options(name, options)
        if not timm.is_model_pretrained(name):
            raise LoadError(
                f"timm has no pretrained weights for '{name}': {_alike(name, True)} Local weights are given "
                f"as timm:{name}=weights.safetensors"
            )
    try:
        with quiet():
            module = timm.create_model(name, pretrained=True, **options)
    except (OSError, RuntimeError, ValueError, TypeError, AssertionError, ImportError) as error:
        raise LoadError(
            f"timm could not load the pretrained weights of '{reference}' from its hub: {one_line(error)}; "
            "check the "
            "name and the network (HF_HUB_OFFLINE must be unset unless they are cached), or give local "
            "weights as timm:NAME=weights.safetensors"
        ) from error
    config: Any = getattr(module, "pretrained_cfg", {})
    architecture = str(config.get("architecture") or name.partition(".")[0])
    options = {**_arguments(module), **options}
    _narrow(module, config.get("hf_hub_id"))
    return _loaded(module, reference, architecture, options, _revision(config.get("hf_hub_id")))


def _narrow(module: nn.Module, hub_id: str | None) -> None:
    """Give a model its file's dtype where that is one: timm copies values into the float32 that it builds."""
    path = _cached(hub_id)
    if path is not None and path.suffix in (".safetensors", ".bin"):
        floating = {dtype for dtype, _ in file_entries(path).values() if dtype.is_floating_point}
        if len(floating) == 1:
            take_dtypes(module, floating)


def _wants_drawn(reference: str) -> bool:
    """Whether a folder or a hub id is followed by `?pretrained=false`, the one option that it takes."""
    options = split_options(reference)[1]
    if unknown := sorted(set(options) - {"pretrained"}):
        raise LoadError(f"a timm folder or hub id takes ?pretrained=false, not {', '.join(unknown)}")
    return options.get("pretrained", True) is False


def _load_hub_id(reference: str, name: str, drawn: bool) -> Loaded:
    """A model of timm's on the hub, with its weights or with ones drawn at random."""
    if not drawn:
        return _load_hub(reference, f"hf-hub:{name}", {})
    module = _create(name.rpartition("/")[2].partition(".")[0], {}, f"hf-hub:{name}")
    architecture = str(getattr(module, "pretrained_cfg", {}).get("architecture"))
    return replace(_loaded(module, reference, architecture, _arguments(module)), stored=False)


def _load_folder(reference: str, folder: Path, drawn: bool) -> Loaded:
    """A folder in timm's hub format, with its weights or with ones drawn at random."""
    config = read_config(folder / "config.json")
    if drawn:
        name, options = str(config["architecture"]), dict(as_mapping(config.get("model_args") or {}))
        module = _create(name, {}, f"local-dir:{folder}").eval()
        files = {"config.json": read_regular(folder / "config.json", DOCUMENT_BYTES)}
        return Loaded(module, Origin("timm", reference, name, None, options), files, stored=False)
    path = next((folder / name for name in _WEIGHTS if os.path.lexists(folder / name)), None)
    if path is None:
        raise LoadError(
            f"{folder} must hold weights beside its config.json ({', '.join(_WEIGHTS)}), but has none"
        )
    state = read_weights(path)
    name = str(config["architecture"])
    check_options(name, config.get("model_args") or {})
    with bounded(f"'{name}' of {folder}", **by_file([tuple(t.shape) for t in state.values()])):
        module = _create(name, {}, f"local-dir:{folder}")
    state = without_prefix(state, module.state_dict(), str(path))
    advice = "config.json and the weights must belong together."
    what = f"{path} as weights of timm's '{name}'"
    check_fit(module, state, what, advice)
    load_exactly(module, state, what).eval()
    files = {"config.json": read_regular(folder / "config.json", DOCUMENT_BYTES)}
    options = dict(as_mapping(config.get("model_args") or {}))
    return Loaded(module, Origin("timm", reference, name, None, options), files)


def _loaded(
    module: nn.Module, reference: str, name: str, options: dict[str, Any], revision: str | None = None
) -> Loaded:
    origin = Origin("timm", reference, name, revision, options)
    return Loaded(module.eval(), origin, _config_file(module, name, options))


def _create(name: str, options: dict[str, Any], source: str | None = None) -> nn.Module:
    """A timm model with fresh weights; `source` holds its configuration where there is one."""
    import timm

    _check_name(name)
    check_options(name, options)
    try:
        with quiet():
            return timm.create_model(source or name, pretrained=False, **options)
    except LoadError:
        raise
    except Exception as error:
        raise LoadError(
            f"timm could not create '{name}' with the options {options or 'none'}: {one_line(error)}; "
            "check the options"
        ) from error


def _check_name(name: str) -> None:
    import timm

    if not timm.is_model(name):
        raise LoadError(f"timm {timm.__version__} has no model '{name}': {_alike(name, False)}")


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Options shape the architecture alone: none may name files, weights or configurations, which timm would open."""
    _check_name(name)
    wrong = sorted(set(options) - _known_options(name))
    if wrong:
        raise LoadError(
            f"options of timm:{name} are arguments of its architecture, such as num_classes, in_chans or img_size; "
            f"{shorten(wrong)} {'is' if len(wrong) == 1 else 'are'} none: leave it out"
        )


@cache
def _known_options(name: str) -> frozenset[str]:
    """Arguments of the networks and their builders in the model's own file, and of timm's wrapper for features."""
    from timm.models import model_entrypoint

    takers = [
        each
        for key, each in vars(sys.modules[model_entrypoint(name).__module__]).items()
        if (isinstance(each, type) and (issubclass(each, nn.Module) or is_dataclass(each)))
        or (inspect.isfunction(each) and key.startswith(("_gen", "_create")))
    ]
    taken = {argument for each in takers for argument in inspect.signature(each).parameters}
    return frozenset(taken | _WRAPPERS) - _LOADING


def _alike(name: str, pretrained: bool) -> str:
    """Names that timm does have."""
    import difflib

    import timm

    near = difflib.get_close_matches(name, timm.list_models(pretrained=pretrained), n=3, cutoff=0.5)
    return f"did you mean {shorten(near)}?" if near else "timm.list_models() prints all names"


def _arguments(module: nn.Module) -> dict[str, Any]:
    """Arguments that the hub's configuration added while the model was created."""
    arguments = getattr(module, "_model_args", None) or {}
    return json.loads(json.dumps(dict(arguments), default=str))


def _config_file(module: Any, name: str, options: dict[str, Any]) -> dict[str, bytes]:
    """`config.json` in timm's hub format, written by timm."""
    from timm.models._hub import save_config_for_hf

    try:
        with tempfile.TemporaryDirectory() as folder, quiet():
            path = Path(folder) / "config.json"
            save_config_for_hf(module, str(path), model_args=options or None)
            return {"config.json": path.read_bytes()}
    except AttributeError:  # a backbone (features_only) lacks the head that timm writes about
        config: Any = {
            key: value for key, value in dict(module.pretrained_cfg).items() if key != "architecture"
        }
        content = {"architecture": name, "model_args": options, "pretrained_cfg": config}
        return {"config.json": json.dumps(content, indent=2).encode()}


def _revision(hub_id: str | None) -> str | None:
    """The commit of the cached hub files, where the hub's cache tells it."""
    path = _cached(hub_id)
    return None if path is None else path.parent.name


def _cached(hub_id: str | None) -> Path | None:
    """The weights file in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    for name in ("model.safetensors", "pytorch_model.bin") if hub_id else ():
        path = try_to_load_from_cache(str(hub_id).partition("@")[0], name)
        if isinstance(path, str):
            return Path(path)
    return None


def _read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a folder, or nothing where it is absent or not a JSON object."""
    try:
        return read_config(folder / "config.json")
    except LoadError:  # whoever claims the folder says what is wrong with it
        return {}
