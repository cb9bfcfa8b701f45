"""transformers models: a local folder, or a hub id `org/name[@revision]`; `?class=NAME` chooses the class, and
`?pretrained=false` draws weights at random."""

from __future__ import annotations

import inspect
import json
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from surgery.disk.aligned import align_file
from surgery.disk.small import write_files
from surgery.disk.tensorheader import parse_header
from surgery.disk.untrusted import shown
from surgery.errors import LoadError
from surgery.members.member import Origin
from surgery.members.origins.base import (
    Loaded,
    Request,
    check_files,
    read_config,
    read_small_files,
    split_options,
)
from surgery.members.origins.bounded import bounded, by_file
from surgery.members.origins.dtypes import widest
from surgery.members.origins.empty import build_empty
from surgery.members.origins.layers import KEYS, say_layers
from surgery.members.origins.peft import is_adapter, load_onto_base
from surgery.members.origins.prefixes import said
from surgery.members.origins.quantised import check_library
from surgery.members.origins.transformers_dtypes import FileDtypes, decoded_float8
from surgery.members.origins.transformers_options import (
    attention_in_use,
    attention_of,
    forget_renaming,
    renaming,
    wrappers_prefix,
)
from surgery.members.origins.weights import check_safetensors, raise_misfit, save_extra_state
from surgery.permission import Permission
from surgery.util.memory import compact
from surgery.util.quiet import quiet
from surgery.util.text import one_line

FILES = (
    "config.json", "generation_config.json", "tokenizer*.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.spm", "*.tiktoken", "chat_template*",
    "additional_chat_templates/*", "preprocessor_config.json", "processor_config.json",
    "video_preprocessor_config.json", "modules.json",
    "sentence_bert_config.json", "config_sentence_transformers.json", "[0-9]*_*/config.json",
)  # fmt: skip
"""Small files that a folder needs besides its weights, sentence-transformers' own among them."""
_WEIGHTS = ("*.safetensors", "*.bin")
_PATIENCE = 10.0  # seconds for the hub's first answer
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?(@[\w./-]+)?")


def claims(reference: str) -> bool:
    """Whether `reference` is a folder, or could be a hub id."""
    head = reference.partition("?")[0]
    return Path(head).expanduser().is_dir() or bool(_HUB_ID.fullmatch(head))


def check(reference: str) -> None:
    """Whether a folder is complete, or a hub id is cached or can be reached; the hub is asked once.

    Raises:
        LoadError: where it is not.
    """
    head, options = split_options(reference)
    if Path(head).expanduser().is_dir():
        _check_folder(Path(head).expanduser(), options.get("pretrained", True) is not False)
        return
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    where, revision = _split_revision(head)
    if isinstance(try_to_load_from_cache(where, "config.json", revision=revision), str):
        return
    try:
        if constants.HF_HUB_OFFLINE:
            raise LoadError(
                _failed(where, revision, "looking for it", OSError("the hub is set to be offline"))
            )
        get_hf_file_metadata(hf_hub_url(where, "config.json", revision=revision), timeout=_PATIENCE)
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise LoadError(_failed(where, revision, "looking for it", error)) from error
    except (HfHubHTTPError, LoadError) as error:  # what else the hub says, loading understands better
        if isinstance(error, LoadError):
            raise
    except Exception as error:  # no network: the class of the error depends on the hub client's version
        raise LoadError(_failed(where, revision, "looking for it", error)) from error


def load(reference: str, request: Request) -> Loaded:
    """Load config, class, weights and small files, and check that every tensor found its place.

    Raises:
        LoadError: where anything is missing, damaged or does not fit, or the hub cannot be reached.
    """
    head, options = split_options(reference)
    unknown = set(options) - {"class", "unused", "pretrained", "attn_implementation"}
    if unknown:
        raise LoadError(
            "a transformers reference takes ?class=NAME, ?unused=drop, ?pretrained=false and "
            f"?attn_implementation=eager, not {', '.join(sorted(unknown))}"
        )
    stored = options.get("pretrained", True) is not False
    folder = Path(head).expanduser()
    local = folder.is_dir()
    where, revision = (str(folder), None) if local else _split_revision(head)
    if local and is_adapter(folder):
        asked = reference.removeprefix(head)
        return load_onto_base(reference, folder, asked, lambda base: load(base, request), FILES)
    if local:
        _check_folder(folder, stored)
    attention = attention_of(options, reference)
    with quiet():
        config = _read_config(where, revision, request, reference)
        check_library(config.to_dict(), where)
        kind = model_class(config, options.get("class"), where, revision, request)
        prefix = ""
        if stored:
            with bounded(where, **(_bounds(folder) if local else {})):
                prefix = wrappers_prefix(kind, config, folder) if local else ""
                how = {**attention, **renaming(prefix)}
                unused = str(options.get("unused", ""))
                module, extra, dtype = _load_in_file_dtypes(
                    kind, config, where, revision, request, unused, how, prefix
                )
            forget_renaming(module, prefix)
        else:
            module, extra = _draw_weights(kind, config, where), {}
            dtype = module.dtype
            if attention:
                module.set_attn_implementation(attention["attn_implementation"])
        commit = getattr(config, "_commit_hash", None)
        files = read_small_files(folder if local else _snapshot(where, commit or revision), FILES)
    if stored and (note := decoded_float8(config, folder, module)) is not None:
        warnings.warn(f"{reference}: {note}", stacklevel=4)
    if prefix:
        warnings.warn(said(reference, prefix), stacklevel=4)
    made = {"dtype": str(dtype).removeprefix("torch."), **attention, **extra}
    origin = Origin("transformers", reference, type(module).__name__, commit, made)
    return Loaded(module.eval(), origin, files, stored=stored)


def build(origin: Origin, files: Mapping[str, bytes], request: Request) -> nn.Module:
    """The class again on empty parameters, from the configuration among `files`.

    Raises:
        LoadError: where the configuration or the class is not known to this transformers.
    """
    if "config.json" not in files:
        raise LoadError(f"building '{origin.reference}' again needs its config.json, which the files lack")
    with tempfile.TemporaryDirectory() as folder, quiet():
        names = ("config.json", "generation_config.json")
        write_files({name: files[name] for name in names if name in files}, Path(folder))
        where = folder
        if request.permission >= Permission.ALL and "auto_map" in read_config(Path(folder) / "config.json"):
            source = str(origin.options.get("base", origin.reference))
            where = split_options(source)[0].partition("@")[0]  # code stays where it came from
        config = _read_config(where, origin.revision, request, origin.reference)
        kind = model_class(config, origin.architecture, where, origin.revision, request)
        dtype = getattr(torch, str(origin.options.get("dtype", "float32")), None)
        if not isinstance(dtype, torch.dtype):
            raise LoadError(
                f"the dtype of '{origin.reference}' must be one of torch's, found {shown(origin.options['dtype'])}"
            )
        extra = {key: value for key, value in origin.options.items() if key == "add_pooling_layer"}
        extra |= attention_of(origin.options, origin.reference)
        module: Any = build_empty(lambda: kind._from_config(config, dtype=dtype, **extra))
        if "generation_config.json" in files and module.can_generate():
            from transformers.generation.configuration_utils import GenerationConfig

            module.generation_config = GenerationConfig.from_pretrained(folder)
    return module.eval()


def adopt(module: nn.Module) -> Loaded | None:
    """A live module of a class that transformers has, so that it can be built again; None for any other."""
    if "transformers" not in sys.modules:  # then no module can be of its classes
        return None
    import transformers

    kind = type(module)
    if (
        not isinstance(module, transformers.PreTrainedModel)
        or getattr(transformers, kind.__name__, None) is not kind
    ):
        return None
    with tempfile.TemporaryDirectory() as folder, quiet():
        module.config.save_pretrained(folder)
        if module.can_generate() and module.generation_config is not None:
            module.generation_config.save_pretrained(folder)
        files = read_small_files(Path(folder), FILES)
    options = {"dtype": str(module.dtype).removeprefix("torch."), **attention_in_use(module)}
    return Loaded(module, Origin("transformers", kind.__name__, kind.__name__, None, options), files)


def save_plain(module: Any, origin: Origin, files: Mapping[str, bytes], directory: Path) -> None:
    """Write what `from_pretrained(directory)` reads, tokenizer and preprocessor files included."""
    with quiet():
        state = _untied(module)
        module.save_pretrained(
            directory, state_dict={n: t for n, t in state.items() if isinstance(t, torch.Tensor)}
        )
    save_extra_state(state, directory)
    for file in sorted(directory.glob("*.safetensors")):
        align_file(file)
    _state_what_is_written(module, files, directory / "config.json")
    write_files(files, directory, keep=("config.json",))


def _untied(module: nn.Module) -> dict[str, torch.Tensor]:
    """A state dict in which only names share a tensor that the class ties: of others transformers writes just one."""
    state: dict[str, torch.Tensor] = module.state_dict()
    declared: Mapping[str, str] = getattr(module, "all_tied_weights_keys", None) or {}
    tied = {*declared, *declared.values()}
    seen: set[int] = {t.untyped_storage().data_ptr() for name, t in state.items() if name in tied}
    for name, tensor in state.items():
        if isinstance(tensor, torch.Tensor) and name not in tied:
            pointer = tensor.untyped_storage().data_ptr()
            state[name] = tensor.clone() if pointer in seen else compact(tensor)
            seen.add(pointer)
    return state


def _state_what_is_written(module: nn.Module, files: Mapping[str, bytes], path: Path) -> None:
    """Have a configuration name what was written: a dtype that holds it, its layers, and quantisation only if any."""
    state = [t for t in module.state_dict().values() if isinstance(t, torch.Tensor)]
    before = json.loads(path.read_text(encoding="utf-8"))
    config = dict(before)
    layers = json.loads(files.get("config.json", b"{}"))
    config |= {key: layers[key] for key in (*KEYS, "layer_types") if key in layers and key in config}
    if (dtype := widest(tensor.dtype for tensor in state)) is not None:  # all tensors will be cast to it
        config["dtype"] = str(dtype).removeprefix("torch.")
    if all(tensor.dtype.itemsize > 1 or tensor.dtype == torch.bool for tensor in state):
        config.pop("quantization_config", None)
    if config != before:
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def model_class(config: Any, wanted: str | None, where: str, revision: str | None, request: Request) -> Any:
    """The class to load: the one asked for, else the one the config names, else the base model of its type.

    Raises:
        LoadError: where a class that was asked for does not exist, or comes as code that may not run.
    """
    import transformers

    named = wanted or next(iter(getattr(config, "architectures", None) or ()), "")
    kind = getattr(transformers, named, None) if named else None
    if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel):
        return kind
    auto_map = getattr(config, "auto_map", None) or {}
    remote = [
        entry for entry in auto_map.values() if isinstance(entry, str) and entry.rpartition(".")[2] == named
    ]
    remote = remote or [
        entry for name, entry in auto_map.items() if name == "AutoModel" and isinstance(entry, str)
    ]
    if remote:
        return remote_class(remote[0], where, revision, request.permission)
    if wanted:
        raise LoadError(
            f"transformers {transformers.__version__} has no model class '{wanted}': check the name"
        )
    mapping: Any = transformers.AutoModel._model_mapping
    if type(config) not in mapping:
        raise LoadError(
            f"{where}: transformers {transformers.__version__} has neither the class '{named}' nor a base "
            f"model for '{config.model_type}': choose a class with ?class=NAME"
        )
    found = mapping[type(config)]
    return found[0] if isinstance(found, (tuple, list)) else found


def _load_in_file_dtypes(
    kind: Any,
    config: Any,
    where: str,
    revision: str | None,
    request: Request,
    unused: str,
    how: Mapping[str, Any],
    prefix: str,
) -> tuple[Any, dict[str, Any], torch.dtype]:
    """The module with every tensor in its place and in its file's dtype, options, and the dtype to build it in."""
    if Path(where).is_dir():
        dtypes = FileDtypes.of(kind, config, Path(where), prefix)
        module, extra = _load_weights(kind, where, revision, request, unused, dtypes.common or "auto", how)
    else:  # transformers chooses and fetches the files, of which only headers are read again
        module, extra = _load_weights(kind, where, revision, request, unused, "auto", how)
        commit = getattr(config, "_commit_hash", None)
        dtypes = FileDtypes.of(kind, config, _snapshot(where, commit or revision))
        if dtypes.common not in (None, module.config.dtype):
            module, extra = _load_weights(
                kind, where, revision, request, unused, dtypes.common or "auto", how
            )
    dtypes.put(module, where)
    return module, extra, dtypes.common or module.dtype


def remote_class(name: str, where: str, revision: str | None, permission: Permission) -> Any:
    """A class in the Python files that come with a checkpoint, imported.

    Args:
        name: `file.Class`, or `repository--file.Class`.
        where: folder or hub id of the checkpoint.
        revision: of the hub id.
        permission: of the text that names the checkpoint.

    Raises:
        ConsentError: where the permission does not cover code of a checkpoint; nothing was fetched or imported.
    """
    permission.require(Permission.ALL, f"{where} brings its own Python code for {name}")
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    return get_class_from_dynamic_module(name, where, revision=revision)


def _check_kernels(config: Any, where: str, permission: Permission) -> None:
    """Refuse implementations that transformers would fetch from the hub as compiled code, in all parts of a config."""
    for name in ("_attn_implementation", "_experts_implementation"):
        value = str(getattr(config, name, None))
        if "/" in value or value.startswith(
            "flash"
        ):  # without its package, `flash_attention_2` is fetched as well
            least = Permission.ALL if "/" in value else Permission.OWN
            permission.require(least, f"{where} brings its own code, the kernel {value}")
    for key in getattr(config, "sub_configs", None) or ():
        if (part := getattr(config, key, None)) is not None:
            _check_kernels(part, where, permission)


def _load_weights(
    kind: Any,
    where: str,
    revision: str | None,
    request: Request,
    unused: str,
    dtype: torch.dtype | str,
    how: Mapping[str, Any],
) -> tuple[Any, dict[str, Any]]:
    """The module with every tensor in its place, cast to `dtype`, and the options that were needed for it."""
    extra: dict[str, Any] = {}
    module, info = _from_pretrained(kind, where, revision, request, dtype, how)
    missing = sorted(info["missing_keys"])
    optional = "add_pooling_layer" in inspect.signature(kind.__init__).parameters
    if optional and missing and all(name.startswith("pooler.") for name in missing):
        # An encoder that was saved without its pooler is complete without one: invent no weights for it.
        extra["add_pooling_layer"] = False
        module, info = _from_pretrained(kind, where, revision, request, dtype, {**how, **extra})
    unexpected = sorted(info["unexpected_keys"])
    if unused == "drop" and unexpected:
        extra["dropped"], unexpected = unexpected, []
    own = {*module.state_dict()}
    notes = say_layers(module.config.to_dict(), own, (own - {*info["missing_keys"]}) | {*unexpected})
    raise_misfit(
        f"{where} as weights of {kind.__name__}",
        sorted(info["missing_keys"]),
        unexpected,
        sorted(info["mismatched_keys"]),
        "".join(f"The file {note.removeprefix('the ')}: make these agree. " for note in notes)
        + "Check that config.json belongs to the weights, or choose the class that owns exactly these "
        "weights with ?class=NAME; unexpected tensors alone can be left out with ?unused=drop.",
    )
    return module, extra


def _draw_weights(kind: Any, config: Any, where: str) -> Any:
    """The module with weights drawn at random, by its class's own initialisation."""
    try:
        return kind._from_config(config)
    except Exception as error:
        raise LoadError(
            _failed(where, None, f"building {kind.__name__} from its configuration", error)
        ) from error


def _from_pretrained(
    kind: Any,
    where: str,
    revision: str | None,
    request: Request,
    dtype: torch.dtype | str,
    how: Mapping[str, Any],
) -> tuple[Any, dict[str, Any]]:
    """The module, and what transformers says about tensors that did not fit."""
    try:
        return kind.from_pretrained(
            where,
            revision=revision,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that all of them are named in one error
            trust_remote_code=request.permission >= Permission.ALL,
            **how,
        )
    except LoadError:
        raise
    except Exception as error:
        raise LoadError(_failed(where, revision, f"loading weights into {kind.__name__}", error)) from error


def _read_config(where: str, revision: str | None, request: Request, reference: str) -> Any:
    from transformers import AutoConfig

    trusted = request.permission >= Permission.ALL
    try:
        config = AutoConfig.from_pretrained(where, revision=revision, trust_remote_code=trusted)
    except Exception as error:
        if "trust_remote_code" in str(error):
            request.permission.require(Permission.ALL, f"{reference} brings its own Python code")
        raise LoadError(_failed(where, revision, "reading the configuration", error)) from error
    _check_kernels(config, reference, request.permission)
    return config


def _failed(where: str, revision: str | None, step: str, error: BaseException) -> str:
    """One sentence for a failure in transformers: what was tried and what to do."""
    if Path(where).is_dir():
        return (
            f"{where}: {step} failed: {one_line(error)}; check that config.json and the weights are complete"
        )
    at = f" at revision '{revision}'" if revision else ""
    return (
        f"'{where}' is no local folder, and {step} from the hub{at} failed: {one_line(error, 160)}; check "
        "the name and the network (HF_HUB_OFFLINE must be unset unless it is cached), or give a local folder"
    )


def _split_revision(head: str) -> tuple[str, str | None]:
    name, _, revision = head.partition("@")
    return name, revision or None


def _snapshot(where: str, revision: str | None) -> Path:
    """The small files of a hub model, in the hub client's cache."""
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(where, revision=revision, allow_patterns=list(FILES)))


def _bounds(folder: Path) -> dict[str, int]:
    """What the weights of a folder could fill; nothing where they say so only when they are read."""
    headers = [parse_header(path) for path in folder.glob("*.safetensors")]
    return by_file([shape for header in headers for _, shape in header.tensors.values()]) if headers else {}


def _check_folder(folder: Path, stored: bool) -> None:
    """What can be said about a folder before anything is built; `stored` asks for weights."""
    if not any(folder.iterdir()):
        raise LoadError(f"{folder} is empty: give a folder with config.json and weights")
    path = folder / "config.json"
    if not os.path.lexists(path):
        raise LoadError(
            f"{folder} has no config.json: give a folder that save_pretrained wrote, or timm:NAME=weights"
        )
    config = read_config(path)
    if not (config.get("model_type") or config.get("auto_map")):
        raise LoadError(
            f"{path} must name a 'model_type' (transformers) or an 'architecture' (timm), but has neither"
        )
    weights = [file for pattern in _WEIGHTS for file in sorted(folder.glob(pattern))]
    check_files([*weights, *folder.glob("*.json")])
    if not stored:
        return
    if not weights:
        raise LoadError(
            f"{folder} has a config.json but no weights (model.safetensors or pytorch_model.bin): add them, or have "
            f"weights drawn at random with {folder}?pretrained=false"
        )
    for file in weights:
        if file.suffix == ".safetensors":
            check_safetensors(file)
